"""What the web tests need."""

from __future__ import annotations

import importlib.util

import pytest


def test_the_packages_of_the_page_are_installed() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the page is not tested: {', '.join(missing)} not installed (pip install 'gpt2-duet[web]' httpx)")
