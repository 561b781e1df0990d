"""A server on a free port of this machine, in a thread, with the embedded model; and a headless browser."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from web_server import Server, serve

MISSING = [name for name in ("fastapi", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
# Without the server's packages there is nothing to test; test_needs.py says so, once.
_TESTS = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_needs.py"]
collect_ignore = _TESTS if MISSING else []

FRAMEWORK = "pt" if importlib.util.find_spec("torch") else "numpy"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page and its interface over the embedded model."""
    from gpt2_app.web.metrics import Metrics
    from gpt2_app.web.models import Catalogue, Pool
    from gpt2_app.web.safety import safety_for
    from gpt2_app.web.server import make_app
    from gpt2_app.web.store import Store

    environment = pytest.MonkeyPatch()
    environment.setenv("HF_HUB_OFFLINE", "1")
    environment.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("no-cache")))
    path = tmp_path_factory.mktemp("documents") / "documents.sqlite3"
    metrics = Metrics()
    frameworks = [FRAMEWORK] if FRAMEWORK == "numpy" else [FRAMEWORK, "numpy"]
    pool, store = Pool(Catalogue(), frameworks, 1 << 30, metrics=metrics), Store(path)
    pool.release(pool.hold())
    address, stop = serve(make_app(pool, store, safety_for("127.0.0.1", None), metrics))
    yield Server(address, pool, store, metrics, path)
    stop()
    environment.undo()


@pytest.fixture
def http(server: Server) -> Iterator[Any]:
    """A client of the server."""
    import httpx

    with httpx.Client(base_url=server.address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; skips where there is none.

    For one module: while it runs, playwright's own event loop does in this thread, where other tests start theirs.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: the page is not tested (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        # As root, which CI often is, Chromium's own sandbox cannot start.
        started = running.chromium.launch(executable_path=found, args=["--no-sandbox"] if _is_root() else [])
        yield started
        started.close()


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


# Suggestions of few tokens take less time.
_SHORT = """
const place = 'gpt2-write:settings';
if (location.protocol === 'http:' && !localStorage.getItem(place)) localStorage.setItem(place, '{"length": 6}');
"""


@pytest.fixture
def open_page(server: Server, browser: Any) -> Iterator[Any]:
    """Open a path of the server in a window of its own; what it writes to its console fails the test."""
    contexts, complaints = [], []

    def open_one(path: str = "/", context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1000, "height": 720}, **options})
            context.add_init_script(_SHORT)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.complaints = complaints
        page.goto(server.address + path)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []
