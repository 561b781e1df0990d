"""Who may import whom, and that importing does nothing else."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent / "src"
PACKAGES = ("gpt2_core", "gpt2_pt", "gpt2_tf", "gpt2_app")
PYTORCH, TENSORFLOW = {"torch"}, {"tensorflow", "keras"}

# What no file of a package may import, anywhere in it, a function's body included.
FORBIDDEN = {
    "gpt2_core": PYTORCH | TENSORFLOW | {"jax", "transformers", "gpt2_pt", "gpt2_tf", "gpt2_app", "typer", "rich"},
    "gpt2_pt": TENSORFLOW | {"transformers", "gpt2_tf", "gpt2_app", "typer", "rich"},
    "gpt2_tf": PYTORCH | {"transformers", "gpt2_pt", "gpt2_app", "typer", "rich"},
}

# The one exception: a tokenizer gives back the tensors that it is asked for, and imports their package only then.
ALLOWED = {
    ("gpt2_core", "torch"): "return_tensors='pt'",
    ("gpt2_core", "tensorflow"): "return_tensors='tf'",
}
ALLOWED_IN = {"batch_encoding.py", "tokenizer.py"}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """The top-level names that a file imports, and whether it does so when it is imported itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for name in names:
            yield name.split(".")[0], id(node) not in inside


def files() -> list[tuple[str, Path]]:
    return [(package, file) for package in PACKAGES for file in sorted((SOURCE / package).rglob("*.py"))]


@pytest.mark.parametrize(("package", "file"), files(), ids=lambda value: getattr(value, "name", value))
def test_arrows_between_packages_go_one_way(package, file):
    for name, at_once in imports(file):
        if name in FORBIDDEN.get(package, ()):
            excused = (package, name) in ALLOWED and file.name in ALLOWED_IN and not at_once
            assert excused, f"{file.name} imports {name}"


def test_the_check_sees_imports_of_every_kind(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import torch.nn as nn\nfrom tensorflow import keras\nfrom . import sibling\n"
        "def f():\n    import gpt2_pt.model\n    importlib.import_module('gpt2_app.cli')\n"
    )
    assert set(imports(file)) == {("torch", True), ("tensorflow", True), ("gpt2_pt", False), ("gpt2_app", False)}


PROBE = """
import builtins, json, socket, sys

def refused(*args, **kwargs):
    raise AssertionError("the network is touched")

socket.socket.connect = refused
socket.getaddrinfo = refused
import random
import numpy
before = random.getstate(), numpy.random.get_state()[1].tolist()
{code}
after = random.getstate(), numpy.random.get_state()[1].tolist()
assert before == after, "the global random state has changed"
names = {{name.split(".")[0] for name in sys.modules}}
open({report!r}, "w").write(json.dumps(sorted(names)))
"""


def modules_after(code: str, tmp_path: Path) -> set[str]:
    """What is loaded after running ``code`` in a fresh process, which must say nothing and touch no network."""
    report = tmp_path / "modules.json"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::DeprecationWarning:gpt2_core",
            "-c",
            PROBE.format(code=code, report=str(report)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    return set(json.loads(report.read_text()))


USE_CORE = """
import gpt2_core
from gpt2_core import GPT2Config, GPT2Tokenizer, GenerationConfig, ReferenceModel
config = GPT2Config(vocab_size=50257, n_positions=16, n_embd=4, n_layer=1, n_head=1)
tokenizer = GPT2Tokenizer()
ids = tokenizer("Once upon a time")["input_ids"]
model = ReferenceModel.from_seed(config)
tokenizer.decode(model.generate([ids], max_new_tokens=2)[0].tolist())
"""


def test_core_at_work_loads_no_framework(tmp_path):
    loaded = modules_after(USE_CORE, tmp_path)
    assert not loaded & (PYTORCH | TENSORFLOW | {"gpt2_pt", "gpt2_tf", "gpt2_app", "transformers", "jax"})


def test_importing_core_is_light(tmp_path):
    loaded = modules_after("import gpt2_core", tmp_path)
    assert not loaded & {"huggingface_hub", "h5py", "safetensors", "regex", "typer", "rich"}


def test_importing_the_pytorch_package_is_silent_and_loads_no_other_framework(tmp_path):
    pytest.importorskip("torch")
    code = (
        "import torch\nstate = torch.get_rng_state()\nthreads = torch.get_num_threads()\n"
        "dtype = torch.get_default_dtype()\nimport gpt2_pt\nassert torch.equal(torch.get_rng_state(), state)\n"
        "assert threads == torch.get_num_threads() and dtype == torch.get_default_dtype()"
    )
    loaded = modules_after(code, tmp_path)
    assert not loaded & (TENSORFLOW | {"gpt2_tf", "gpt2_app", "transformers", "huggingface_hub", "h5py"})


def test_importing_the_tensorflow_package_is_silent_and_loads_no_other_framework(tmp_path):
    pytest.importorskip("keras")
    code = (
        "import gpt2_tf\nimport keras, tensorflow as tf\nassert keras.config.floatx() == 'float32'\n"
        "assert keras.config.dtype_policy().name == 'float32' and tf.executing_eagerly()\n"
        "assert not tf.config.functions_run_eagerly()"
    )
    loaded = modules_after(code, tmp_path)
    assert not loaded & (PYTORCH | {"gpt2_pt", "gpt2_app", "transformers", "jax"})


@pytest.mark.parametrize(
    ("backend", "before", "words"),
    [
        ("torch", "", "is to run on 'torch'"),
        ("jax", "", "is to run on 'jax'"),
        ("torch", "import keras; ", "runs on 'torch'"),
        ("unknown", "keras.json", "cannot be imported"),
    ],
)
def test_another_backend_of_keras_is_refused_with_what_to_do(tmp_path, backend, before, words):
    pytest.importorskip("keras")
    pytest.importorskip(backend) if "import" in before else None
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    if before == "keras.json":
        (tmp_path / "keras.json").write_text(json.dumps({"backend": backend}))
        environment["KERAS_HOME"] = str(tmp_path)
    else:
        environment["KERAS_BACKEND"] = backend
    done = subprocess.run(
        [sys.executable, "-c", f"{before if 'import' in before else ''}import gpt2_tf"],
        capture_output=True, text=True, timeout=300, check=False, env=environment | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gpt2_tf needs Keras on the TensorFlow backend, but Keras " + words), (
        done.stderr
    )
    assert "KERAS_BACKEND=tensorflow before Keras is first imported, or use gpt2_pt" in last
