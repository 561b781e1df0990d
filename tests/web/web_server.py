"""A server in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A server that runs."""

    address: str
    pool: Any
    store: Any
    metrics: Any
    path: Path

    @property
    def host(self) -> str:
        """Name and port."""
        return self.address.removeprefix("http://")


def serve(app: Any) -> tuple[str, Any]:
    """Run an application in a thread; its address, and a function that ends it."""
    import uvicorn

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)

    def stop() -> None:
        running.should_exit = True
        thread.join(10)

    return f"http://127.0.0.1:{listening.getsockname()[1]}", stop


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    """Wait until something is so."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise AssertionError("it did not become so in time")
        time.sleep(0.01)
