"""A hub in a thread: the part of the Hugging Face Hub's protocol that a download needs, and its faults on demand.

HEAD and GET of /{repository}/resolve/{revision}/{file}, with ETag, X-Repo-Commit, X-Linked-Size and X-Linked-Etag;
large files redirect to /cdn/{sha256}, which serves ranges; 401, 403 and 404 carry X-Error-Code.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """What the server has, what it shall do wrong, and what it was asked."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> file -> content
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: set[str] = field(default_factory=set)
    cut_after: int | None = None  # drop the connection after so many bytes of a large file, once
    stop_short: bool = False  # serve half of a large file and say that this is all
    flip: bool = False  # serve a large file with one bit changed
    requests: list[str] = field(default_factory=list)
    url: str = ""
    cdn: str = ""  # the same server under another host's name, as large files come from another host

    def asked(self, *parts: str) -> list[str]:
        return [request for request in self.requests if all(part in request for part in parts)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        requested = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {requested}".strip())
        if self.path.startswith("/cdn/"):
            return self._large(self.path.removeprefix("/cdn/"), body=body)
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository in self.hub.gated:
            return self._fail(403, "GatedRepo")
        if repository not in self.hub.files:
            return self._fail(401, "RepoNotFound")
        commit = self.hub.revisions.get(revision) or (revision if revision == COMMIT else None)
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        content = self.hub.files[repository].get(name)
        if content is None:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self._send(302, b"", {**headers, "Location": f"{self.hub.cdn}/cdn/{digest}"}, body=body)
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}, body=body)

    def _large(self, digest: str, *, body: bool) -> None:
        everything = [content for files in self.hub.files.values() for content in files.values()]
        content = next(each for each in everything if hashlib.sha256(each).hexdigest() == digest)
        if self.hub.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        part, status = content[start:], 206 if start else 200
        headers = {"Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.hub.stop_short:
            part = part[: len(part) // 2]
        if body and self.hub.cut_after is not None:
            keep, self.hub.cut_after = self.hub.cut_after, None
            return self._send(status, part[:keep], {**headers, "Content-Length": str(len(part))}, body=True, cut=True)
        return self._send(status, part, headers, body=body)

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}, body=True)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
            self.wfile.flush()
        if cut:
            self.close_connection = True


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the hub until the block ends; `hub.url` is its endpoint."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
