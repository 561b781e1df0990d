"""`gpt2 write`: the Write With Transformer page, on this machine alone."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import socket
import sys
import urllib.parse
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2_app import backends, terminal
from gpt2_app.vocabularies import DEFAULT_MODEL
from gpt2_core.errors import InputError, WriteError

PORT = 8014
_NEEDED = ("fastapi", "uvicorn")


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME|FOLDER", help="gpt2-tales ships with the package.")
    ] = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME|FOLDER", help="Whose vocabulary, where the model's folder has none.")
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option("--framework", "-F", metavar=backends.CHOICES, help="Default: the first that is installed."),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; any but this machine's own asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.")] = PORT,
    token: Annotated[
        str | None,
        typer.Option(envvar="GPT2_WRITE_TOKEN", help="Ask for this; drawn where one is needed and none is given."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="HOST", help="Another name that this server goes by.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the documents are; by default in your own data folder.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="For the models' weights together. Default: half of the memory.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", help="Write each request to stderr.")] = False,
) -> None:
    """Open a page where you write and GPT-2 writes along.

    It runs on this machine: nothing is sent anywhere, and models are taken from what is here. Documents are kept in one
    SQLite file. Programs find OpenAI's completions interface at /v1.
    """
    missing = [each for each in _NEEDED if importlib.util.find_spec(each) is None]
    if missing:
        raise InputError(f"gpt2 write needs {' and '.join(missing)}, not installed; pip install 'gpt2-duet[web]'")
    if memory is not None and not 0 < memory < 1e6:
        raise typer.BadParameter(f"--memory is {memory}, expected gigabytes, more than 0")
    from gpt2_app.web import models, safety, server, store
    from gpt2_app.web.metrics import Metrics

    if token is not None and not (token.isascii() and token.isprintable() and len(token) >= 8 and " " not in token):
        raise typer.BadParameter("--token must be at least 8 ASCII characters without spaces")
    if token is None and not safety.is_loopback(host):
        token = secrets.token_urlsafe(24)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(message)s")
    with terminal.busy("looking for models ..."):
        catalogue = models.Catalogue(model)
        frameworks = models.installed_frameworks(framework)
    metrics = Metrics()
    budget = models.default_budget() if memory is None else int(memory * 1e9)
    pool = models.Pool(catalogue, frameworks, budget, metrics=metrics, tokenizer=tokenizer)
    kept = store.Store(default_documents() if documents is None else documents)
    listening = _listen(host, port)
    app = server.make_app(pool, kept, safety.safety_for(host, token, name or ()), metrics)
    _serve(app, listening, _address(host, listening, token), pool, browser=browser, verbose=verbose)


def default_documents() -> Path:
    """The file of documents in the user's own data folder."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "gpt2-duet" / "documents.sqlite3"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: InputError, WriteError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as cause:
        raise InputError(f"--host {host} is no address of this machine ({cause.strerror}); use 127.0.0.1") from cause
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(place)
        listening.listen(128)
    except OSError as cause:
        listening.close()
        raise WriteError(
            cause.errno, f"cannot listen on {host}:{port}: {cause.strerror}; choose another with --port (0: any)"
        ) from cause
    return listening


def _address(host: str, listening: socket.socket, token: str | None) -> str:
    """What to open in a browser."""
    shown = (
        "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else f"[{host}]" if ":" in host else host
    )
    query = "" if token is None else "?" + urllib.parse.urlencode({"token": token})
    return f"http://{shown}:{listening.getsockname()[1]}/{query}"


def _serve(app: Any, listening: socket.socket, address: str, pool: Any, *, browser: bool, verbose: bool) -> None:
    """Serve until Ctrl-C."""
    import threading

    import uvicorn

    config = uvicorn.Config(
        app, log_level="info" if verbose else "error", server_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=2, limit_concurrency=512, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip

    class Server(uvicorn.Server):
        async def startup(self, *arguments: Any, **options: Any) -> None:
            await super().startup(*arguments, **options)
            # On stdout and at once: programs that start the server wait for this line.
            terminal.write(f"{address}\n")
            if sys.stderr.isatty():
                terminal.note("Write With Transformer is open there; Ctrl-C ends it.")
            threading.Thread(target=_warm, args=(pool,), daemon=True).start()
            if browser:
                threading.Thread(target=_open, args=(address,), daemon=True).start()

    Server(config).run(sockets=[listening])


def _warm(pool: Any) -> None:
    """Load the default model before anybody asks, and let it write a little."""
    from gpt2_app.web.scheduler import Busy
    from gpt2_app.web.warming import warm

    try:
        warm(pool)
    except Busy:  # it serves somebody already, or is told to end
        pass
    except Exception as error:  # the first request will say it again, to whom it matters
        logging.getLogger("gpt2.write").error("the model cannot be loaded: %s", error)


def _open(address: str) -> None:
    import webbrowser

    webbrowser.open(address)
