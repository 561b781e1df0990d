"""``/api/documents``: what is written, kept in SQLite, exported as text or Markdown."""

from __future__ import annotations

import re
import urllib.parse
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from gpt2_app.web.schemas import Brief, Document, Draft, ErrorBody, Restore, Save, Version
from gpt2_app.web.store import Store, Written

router = APIRouter(prefix="/api/documents", tags=["documents"])

Identity = Annotated[str, Path(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9_-]+$")]
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody}, 422: {"model": ErrorBody}}
_CONFLICT: dict[int | str, dict[str, Any]] = {**_MISSING, 409: {"description": "Changed elsewhere; ``current`` is it."}}


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _written(body: Draft) -> Written:
    marks = [mark.model_dump(exclude_defaults=True) for mark in body.marks]
    return Written(body.title, body.text, marks, body.settings.model_dump(exclude_none=True))


@router.get("")
def all_documents(request: Request) -> list[Brief]:
    """All documents in short, the last changed first."""
    return [Brief(**each) for each in _store(request).all()]


@router.post("", status_code=201, responses={409: {"model": ErrorBody}, 422: {"model": ErrorBody}})
def create(body: Draft, request: Request) -> Document:
    """A new document."""
    return Document(**_store(request).create(_written(body)))


@router.get("/{identity}", responses=_MISSING)
def get(identity: Identity, request: Request) -> Document:
    """One document."""
    return Document(**_store(request).get(identity))


@router.put("/{identity}", responses=_CONFLICT)
def save(identity: Identity, body: Save, request: Request) -> Document:
    """Save a document in the place of version ``base``; where it is at another one, 409 and nothing is changed."""
    return Document(**_store(request).save(identity, body.base, _written(body)))


@router.delete("/{identity}", status_code=204, response_class=Response, responses=_MISSING)
def delete(identity: Identity, request: Request) -> Response:
    """Delete a document and all its versions."""
    _store(request).delete(identity)
    return Response(status_code=204)


@router.get("/{identity}/versions", responses=_MISSING)
def versions(identity: Identity, request: Request) -> list[Version]:
    """Older states, the newest first."""
    return [Version(**each) for each in _store(request).versions(identity)]


@router.post("/{identity}/restore", responses=_CONFLICT)
def restore(identity: Identity, body: Restore, request: Request) -> Document:
    """Bring an older state back as the newest."""
    return Document(**_store(request).restore(identity, body.version, body.base))


@router.get(
    "/{identity}/export",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}, "text/markdown": {}}}, **_MISSING},
)
def export(identity: Identity, request: Request, format: Annotated[Literal["txt", "md"], Query()] = "txt") -> Response:
    """The document as a file: its text, or with its title as a Markdown heading."""
    found = _store(request).get(identity)
    title, text = found["title"] or "Untitled", found["text"]
    body = text if format == "txt" else f"# {_heading(title)}\n\n{text}"
    body += "" if body.endswith("\n") or not body else "\n"
    name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]+', " ", title).strip(" .") or "Untitled"
    plain = name.encode("ascii", "replace").decode().replace("?", "_")
    quoted = urllib.parse.quote(name, safe="")
    return Response(
        body.encode(),
        media_type=f"text/{'plain' if format == 'txt' else 'markdown'}; charset=utf-8",
        headers={
            "content-disposition": f"attachment; filename=\"{plain}.{format}\"; filename*=UTF-8''{quoted}.{format}"
        },
    )


def _heading(title: str) -> str:
    """A title as Markdown takes it: on one line, and its marks as text."""
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", " ".join(title.split()))
