"""The application: routes, errors in one form, and the page.

    app = make_app(pool, store, safety)

Every error is ``{"error": {message, type, param, code}}``, as OpenAI's clients expect it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from gpt2_app.web import autocomplete, completions, documents
from gpt2_app.web.metrics import Metrics
from gpt2_app.web.models import Failure, NoRoom, Pool, UnknownModel
from gpt2_app.web.safety import Guard, Safety
from gpt2_app.web.scheduler import Busy
from gpt2_app.web.schemas import MOST_NEW, MOST_SAMPLES, MOST_SECONDS, MOST_TOP_K
from gpt2_app.web.serving import Gone
from gpt2_app.web.store import Conflict, NoDocument, Store, TooMany
from gpt2_core import __version__
from gpt2_core.errors import Gpt2Error

logger = logging.getLogger("gpt2.write")

STATIC = Path(__file__).parent / "static"
# Seconds after which it is worth asking again whether models that were at work have ended.
_NO_ROOM_RETRY = 5


def make_app(pool: Pool, store: Store, safety: Safety, metrics: Metrics | None = None) -> Any:
    """The ASGI application that serves ``pool`` and ``store`` to whoever ``safety`` lets in."""
    app = FastAPI(
        title="Write With Transformer", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan
    )
    app.state.pool, app.state.store = pool, store
    app.state.metrics = metrics = metrics or Metrics()
    metrics.gauge("gpt2_models", lambda: len(pool.loaded()))
    metrics.gauge("gpt2_model_bytes", lambda: sum(model.bytes for model in pool.loaded()))
    metrics.gauge("gpt2_waiting", lambda: sum(model.scheduler.load[0] for model in pool.loaded()))
    metrics.gauge("gpt2_rows", lambda: sum(model.scheduler.load[1] for model in pool.loaded()))
    for router in (autocomplete.router, completions.router, documents.router):
        app.include_router(router)
    _add_rest(app)
    _add_errors(app)
    return Guard(_Counted(app, metrics), safety)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.pool.stop()
    app.state.store.close()


class _Counted:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # where nothing was answered: the client went away

        async def counting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            # The route and not the path, of which there are as many as documents.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count("gpt2_http_requests_total", route=route, status=str(status))
            self._metrics.observe("gpt2_http_seconds", time.monotonic() - started)


# -- the page, and what it needs to know ---------------------------------------------------------------------


def _add_rest(app: FastAPI) -> None:
    app.get("/api/models", tags=["writing"])(_models)
    app.get("/healthz", tags=["server"])(_health)
    app.get("/metrics", tags=["server"], response_class=PlainTextResponse)(_metrics)
    for path in ("/", "/d/{identity}", "/doc/{model:path}", "/share"):
        app.get(path, include_in_schema=False)(_page)
    app.get("/favicon.ico", include_in_schema=False)(_icon)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")


async def _models(request: Request) -> dict[str, Any]:
    """The models, frameworks and limits that the page offers."""
    pool: Pool = request.app.state.pool
    loaded = {(model.entry.name, model.framework) for model in pool.loaded()}
    return {
        "default": pool.catalogue.default,
        "models": [
            {
                "name": entry.name,
                "window": entry.config.n_positions,
                "loaded": [framework for framework in pool.frameworks if (entry.name, framework) in loaded],
            }
            for entry in pool.catalogue.values()
        ],
        "frameworks": list(pool.frameworks),
        "limits": {"samples": MOST_SAMPLES, "length": MOST_NEW, "max_time": MOST_SECONDS, "top_k": MOST_TOP_K},
        "version": __version__,
    }


async def _health() -> dict[str, str]:
    """Whether the server runs."""
    return {"status": "ok"}


async def _metrics(request: Request) -> Response:
    """Counts and times, for Prometheus."""
    metrics: Metrics = request.app.state.metrics
    return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _page() -> FileResponse:
    return FileResponse(STATIC / "index.html", media_type="text/html; charset=utf-8")


async def _icon() -> FileResponse:
    return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")


# -- errors --------------------------------------------------------------------------------------------------


def _problem(
    status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None,
    retry: int | None = None, **more: Any,
) -> JSONResponse:  # fmt: skip
    clean = message.encode("utf-8", "replace").decode()
    headers = None if retry is None else {"retry-after": str(retry)}
    body = {"error": {"message": clean, "type": kind, "param": param, "code": code}, **more}
    return JSONResponse(body, status_code=status, headers=headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        where = where.encode("utf-8", "replace").decode()[:200]
        status = 400 if request.url.path.startswith("/v1/") else 422
        return _problem(status, f"{where}: {first['msg']}", "invalid_request_error", param=where)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _problem(error.status_code, str(error.detail), "invalid_request_error")

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return _problem(429, str(error), "rate_limit_error", code="rate_limit_exceeded", retry=error.retry_after)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # as nginx writes it down; nobody reads it

    @app.exception_handler(Failure)
    async def failed(request: Request, error: Failure) -> Response:
        logger.error("a model cannot be read: %s", error)
        return _problem(503, str(error), "server_error")

    @app.exception_handler(Gpt2Error)
    async def library(request: Request, error: Gpt2Error) -> Response:
        if isinstance(error, Conflict):
            return _problem(409, str(error), "conflict", current=error.current)
        if isinstance(error, UnknownModel):
            return _problem(404, str(error), "invalid_request_error", param="model", code="model_not_found")
        if isinstance(error, NoRoom):
            return _problem(503, str(error), "server_error", retry=_NO_ROOM_RETRY)
        status = 404 if isinstance(error, NoDocument) else 409 if isinstance(error, TooMany) else 400
        return _problem(status, str(error), "invalid_request_error", param=getattr(error, "param", None))
