"""What stands before every request: whose page it comes from, which name it called, how much it may send, who may ask.

    Host      only names of this server: a name that was rebound to this address is refused
    Origin    of what changes something, only this server's own pages (browsers send it; other programs need not)
    token     where one is set, as a cookie that the first visit sets, or as ``Authorization: Bearer``
    body      only JSON, at most so many bytes, whatever Content-Length says

Responses carry a policy under which a browser runs nothing but this server's own files.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "gpt2-write"
# 1,000,000 characters of text, each at most 4 bytes or 6 as an escape, would be 6 MB; with what marks them.
LARGEST_BODY = 8_000_000
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
_TOO_LARGE = (413, f"the body is larger than {LARGEST_BODY:,} bytes; send less")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# What anyone may ask: whether the server runs.
_OPEN = ("/healthz",)


@dataclass(frozen=True)
class Safety:
    """Which names this server answers to, and the token it asks for, if any."""

    hosts: frozenset[str]
    any_address: bool = False
    token: str | None = None

    def answers_to(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name = _hostname(host)
        if name in self.hosts:
            return True
        return self.any_address and _is_address(name)


def safety_for(host: str, token: str | None, more_hosts: Iterable[str] = ()) -> Safety:
    """The names of a server bound to ``host``."""
    names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more_hosts)}
    everywhere = host in ("0.0.0.0", "::", "")
    if everywhere:
        names.add(socket.gethostname().lower())
    return Safety(frozenset(names), everywhere, token)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _hostname(host: str) -> str:
    """Of ``name:port`` or ``[::1]:port`` the name."""
    try:
        return (urllib.parse.urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


class Guard:
    """ASGI middleware that does what the head of this module says."""

    def __init__(self, app: App, safety: Safety) -> None:
        self._app, self._safety = app, safety

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        refusal = self._refusal(scope, headers)
        dressed = _dressed(send)
        if refusal is not None:
            await _answer(dressed, *refusal)
            return
        if self._token_in_query(scope):
            await self._let_in(scope, dressed)
            return
        body = _Body(receive, dressed)
        await self._app(scope, body.receive, body.send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host, method, path = headers.get("host", ""), scope["method"], scope["path"]
        if not self._safety.answers_to(host):
            return 421, "this server does not go by that name; open it by the address it printed when it started"
        if method not in _SAFE_METHODS:
            origin = headers.get("origin")
            if origin is not None and not _is_same(origin, host):
                return 403, "the request comes from a page of another site; use this server's own page"
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return 403, "the request comes from a page of another site; use this server's own page"
            if not _is_allowed_length(headers.get("content-length", "0")):
                return _TOO_LARGE
            has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if has_body and kind != "application/json":
                return 415, "the body must be application/json; set the Content-Type"
        if path not in _OPEN and not self._may_ask(scope, headers):
            return (
                401,
                "this server asks for a token; open the address it printed when it started, or send it as Bearer",
            )
        return None

    def _may_ask(self, scope: Scope, headers: dict[str, str]) -> bool:
        token = self._safety.token
        if token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(given.strip(), token):
            return True
        return _equal(_cookie(headers.get("cookie", "")), token) or self._token_in_query(scope)

    def _token_in_query(self, scope: Scope) -> bool:
        token = self._safety.token
        if token is None or scope["method"] != "GET":
            return False
        given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return _equal(given, token)

    async def _let_in(self, scope: Scope, send: Send) -> None:
        """Keep the token in a cookie, and show the page without it in the address."""
        cookie = f"{COOKIE}={self._safety.token}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
        place = urllib.parse.quote(scope["path"]).replace("//", "/")
        headers = [(b"location", place.encode()), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


class _Body:
    """Counts what comes in, and hangs up when it is too much, whatever length was announced."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._count = 0
        self._answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._count += len(message.get("body", b""))
        if self._count > LARGEST_BODY:
            if not self._answered:
                self._answered = True
                await _answer(self._send, *_TOO_LARGE, hang_up=True)
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """What the application answers, unless it was answered already."""
        if not self._answered:
            await self._send(message)


def _headers(scope: Scope) -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in scope["headers"]:
        name = key.decode("latin-1").lower()
        # Two of a kind are a trick: together they are no name, no origin and no token.
        out[name] = f"{out[name]},{value.decode('latin-1')}" if name in out else value.decode("latin-1")
    return out


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of ``origin`` is one of the server called ``host``, port and all."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()


def _is_allowed_length(length: str) -> bool:
    return length.isascii() and length.isdigit() and len(length) < 12 and int(length) <= LARGEST_BODY


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))


def _cookie(header: str) -> str:
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def _dressed(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {key.lower() for key, _ in message.get("headers", ())}
            message = {**message, "headers": [*message.get("headers", ()), *(h for h in _HEADERS if h[0] not in there)]}
            if b"cache-control" not in there:
                message["headers"].append((b"cache-control", b"no-store"))
        await send(message)

    return wrapped


async def _answer(send: Send, status: int, message: str, *, hang_up: bool = False) -> None:
    body = json.dumps({"error": {"message": message, "type": "refused", "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if hang_up:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
