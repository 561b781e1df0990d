"""What all tests start from: no setting of the user's hub reaches them, and slow ones wait to be asked for."""

from __future__ import annotations

import os

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
