"""Before anything else: Keras on TensorFlow, or a word on what to do; and TensorFlow's banner kept off the terminal."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# How a line starts that TensorFlow's native code writes before its log level is in force, whatever that level is.
_BANNER = (b"I0000 ", b"WARNING: All log messages before absl::InitializeLog()")


@contextmanager
def _without_banner() -> Iterator[None]:
    """Hold back what native code writes to stderr, and pass all of it on but the informational lines."""
    try:
        sys.stderr.flush()
        kept, held = os.dup(2), tempfile.TemporaryFile()  # noqa: SIM115 - closed below, after stderr is put back
    except (AttributeError, OSError, ValueError):  # no stderr to keep clean
        yield
        return
    os.dup2(held.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        held.seek(0)
        said = [line for line in held.read().splitlines(keepends=True) if not line.startswith(_BANNER)]
        held.close()
        if said:
            os.write(2, b"".join(said))


def _unfit(what: str) -> ImportError:
    return ImportError(
        f"gpt2_tf needs Keras on the TensorFlow backend, but Keras {what} here (KERAS_BACKEND, or "
        "~/.keras/keras.json); set the environment variable KERAS_BACKEND=tensorflow before Keras is first imported, "
        "or use gpt2_pt"
    )


def _import_frameworks() -> None:
    for name in ("tensorflow", "keras"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ImportError(f"gpt2_tf needs {name}, which is not installed; pip install 'gpt2-duet[tf]'")
    wanted = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if wanted != "tensorflow" and "keras" not in sys.modules:  # which need not be loaded to be refused
        raise _unfit(f"is to run on {wanted!r}")
    try:
        backend = _import_quietly()
    except (ImportError, ValueError) as cause:
        raise _unfit(f"cannot be imported ({cause})") from cause
    if backend != "tensorflow":
        raise _unfit(f"runs on {backend!r}")


def _import_quietly() -> str:
    """Import Keras and TensorFlow; returns Keras's backend."""
    if "tensorflow" in sys.modules or os.environ.get(_LEVEL) == "0":  # loaded by the user, or wanted with all it says
        import keras
    else:
        # TensorFlow reads the level once, while it is loaded: 1 leaves out what is merely informational.
        level = os.environ.get(_LEVEL)
        os.environ[_LEVEL] = level or "1"
        state = random.getstate()  # from which TensorFlow draws while it is loaded
        try:
            with _without_banner():
                import keras
                import tensorflow  # noqa: F401
        finally:
            random.setstate(state)
            if level is None:
                del os.environ[_LEVEL]
    return str(keras.config.backend())


_import_frameworks()
