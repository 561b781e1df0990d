"""What all tests start from: no setting of the user's hub reaches them, and slow ones wait to be asked for."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# huggingface_hub reads these when it is imported, so they go before any test module is.
for _name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when they are asked for: ``pytest -m slow``."""
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Take away the permission to read a file, or to look into a folder; from root too, whom the system lets do all."""
    locked: list[Path] = []

    def refusing(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            if isinstance(path, (str, os.PathLike)):
                place = Path(os.path.abspath(path))  # noqa: PTH100 (asks nothing of the file system)
                if any(one in place.parents or (one == place and what == "read") for one in locked):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *arguments, **named)

        return call

    for owner, names, what in (
        (os, ("open", "listdir", "scandir"), "read"),
        (io, ("open",), "read"),
        (Path, ("open", "iterdir"), "read"),
        (os, ("stat", "lstat"), "see"),
        (Path, ("stat", "lstat"), "see"),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refusing(getattr(owner, name), what))
    monkeypatch.setattr("builtins.open", io.open)
    return locked.append
