"""Documents and their older versions, in one SQLite file.

A save says which version it takes the place of; another one is a conflict, and nothing is overwritten. Every save is
on the disk when it is answered (WAL with full synchronisation), so that a killed server loses nothing it had confirmed.

Every value reaches SQL as a parameter.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_core.errors import Gpt2Error, WriteError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, text TEXT NOT NULL, marks TEXT NOT NULL, settings TEXT NOT NULL,
    version INTEGER NOT NULL, created REAL NOT NULL, updated REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (
    document TEXT NOT NULL REFERENCES documents (id) ON DELETE CASCADE, version INTEGER NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL, marks TEXT NOT NULL, saved REAL NOT NULL, PRIMARY KEY (document, version)
) WITHOUT ROWID;
"""
# Of a stretch of writing one version is kept every so many seconds, and this many of a document.
_APART = 120.0
_VERSIONS = 100
_DOCUMENTS = 5000
_OPENING = 80


class NoDocument(Gpt2Error, LookupError):
    """A document or version that is not there."""


class TooMany(Gpt2Error):
    """More documents than are kept."""


class Conflict(Gpt2Error):
    """The document was changed by someone else; ``current`` is how it stands."""

    def __init__(self, current: dict[str, Any]) -> None:
        super().__init__(f"the document was changed elsewhere: it is at version {current['version']}; load it again")
        self.current = current


@dataclass(frozen=True)
class Written:
    """What of a document is the writer's."""

    title: str
    text: str
    marks: list[Any]
    settings: dict[str, Any]


class Store:
    """The documents of one file; any thread may ask."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        where = ":memory:"
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.touch(mode=0o600, exist_ok=True)
            except OSError as cause:
                raise WriteError(
                    cause.errno, f"cannot write the documents to {path}: {cause.strerror}", str(path)
                ) from cause
            where = str(path)
        self._db = sqlite3.connect(where, check_same_thread=False, isolation_level=None, timeout=10)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as cause:
            self._db.close()
            raise WriteError(
                0, f"{path} is not a file of documents ({cause}); name another with --documents", str(path)
            ) from cause

    def close(self) -> None:
        """No more."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One change, whole or not at all, also where another process has the file open."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _one(self, identity: str) -> dict[str, Any]:
        row = self._db.execute("SELECT * FROM documents WHERE id = ?", (identity,)).fetchone()
        if row is None:
            raise NoDocument(f"there is no document {identity!r}; it may have been deleted")
        return {**dict(row), "marks": json.loads(row["marks"]), "settings": json.loads(row["settings"])}

    def all(self) -> list[dict[str, Any]]:
        """The documents in short, the last changed first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id, title, text, version, updated FROM documents ORDER BY updated DESC"
            ).fetchall()
        return [_brief(dict(row)) for row in rows]

    def get(self, identity: str) -> dict[str, Any]:
        """One document. Raises: NoDocument."""
        with self._lock:
            return self._one(identity)

    def create(self, new: Written) -> dict[str, Any]:
        """A new document. Raises: TooMany."""
        identity, now = secrets.token_urlsafe(16), time.time()
        with self._change() as db:
            if db.execute("SELECT count(*) FROM documents").fetchone()[0] >= _DOCUMENTS:
                raise TooMany(f"there are {_DOCUMENTS} documents, which is as many as are kept; delete some")
            db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, 1, ?, ?)", (identity, *_columns(new), now, now))
            return self._one(identity)

    def save(self, identity: str, base: int, new: Written) -> dict[str, Any]:
        """The document in a new state, in the place of version ``base``. Raises: NoDocument, Conflict."""
        with self._change() as db:
            old = self._one(identity)
            if old["version"] != base:
                raise Conflict(old)
            self._keep(db, old, shorter=len(new.text) < len(old["text"]) // 2)
            db.execute(
                "UPDATE documents SET title = ?, text = ?, marks = ?, settings = ?, version = version + 1, updated = ? "
                "WHERE id = ?",
                (*_columns(new), time.time(), identity),
            )
            return self._one(identity)

    def _keep(self, db: sqlite3.Connection, old: dict[str, Any], *, shorter: bool) -> None:
        """Remember the old state, where enough time has passed since the last one, or much of it is about to go."""
        last = db.execute("SELECT max(saved) FROM versions WHERE document = ?", (old["id"],)).fetchone()[0]
        if not old["text"] or (last is not None and not shorter and old["updated"] - last < _APART):
            return
        db.execute(
            "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?)",
            (old["id"], old["version"], old["title"], old["text"], json.dumps(old["marks"]), old["updated"]),
        )
        db.execute(
            "DELETE FROM versions WHERE document = ? AND version NOT IN "
            "(SELECT version FROM versions WHERE document = ? ORDER BY version DESC LIMIT ?)",
            (old["id"], old["id"], _VERSIONS),
        )

    def delete(self, identity: str) -> None:
        """The document and all its versions are gone. Raises: NoDocument."""
        with self._change() as db:
            self._one(identity)
            db.execute("DELETE FROM documents WHERE id = ?", (identity,))

    def versions(self, identity: str) -> list[dict[str, Any]]:
        """Older states in short, the newest first. Raises: NoDocument."""
        with self._lock:
            self._one(identity)
            rows = self._db.execute(
                "SELECT version, saved, title, text FROM versions WHERE document = ? ORDER BY version DESC", (identity,)
            ).fetchall()
        return [_brief(dict(row)) for row in rows]

    def restore(self, identity: str, version: int, base: int) -> dict[str, Any]:
        """The text of an older version as the newest; what it replaces is kept. Raises: NoDocument, Conflict."""
        with self._change() as db:
            old = self._one(identity)
            if old["version"] != base:
                raise Conflict(old)
            row = db.execute(
                "SELECT title, text, marks FROM versions WHERE document = ? AND version = ?", (identity, version)
            ).fetchone()
            if row is None:
                raise NoDocument(f"the document has no version {version}; it may have made room for newer ones")
            self._keep(db, old, shorter=True)
            db.execute(
                "UPDATE documents SET title = ?, text = ?, marks = ?, version = version + 1, updated = ? WHERE id = ?",
                (row["title"], row["text"], row["marks"], time.time(), identity),
            )
            return self._one(identity)


def _columns(new: Written) -> tuple[str, str, str, str]:
    return new.title, new.text, json.dumps(new.marks), json.dumps(new.settings)


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    text = row.pop("text")
    return {**row, "words": len(text.split()), "opening": " ".join(text[: 4 * _OPENING].split())[:_OPENING]}
