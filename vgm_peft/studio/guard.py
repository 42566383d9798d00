"""The door: an ASGI middleware that answers only to the Studio's own names and only to its own pages.

A page of a stranger that the user's browser happens to have open can reach loopback addresses; DNS rebinding even makes
it look like the same site. So the `Host` must be one of ours, and a request that says it comes from elsewhere (`Origin`,
`Sec-Fetch-Site`) is refused before anything is read. Passwords are not to be tried out: after a few wrong ones in a minute
nobody at that address is let in for the rest of it. And whatever is answered, an error of ours included, carries `HEADERS`.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy", b"frame-ancestors 'none'; object-src 'none'; base-uri 'self'"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
TRIES, WHILE = 8, 60.0
"""Wrong passwords from one address in so many seconds."""
ADDRESSES = 10_000
"""Addresses whose wrong passwords are remembered."""


class Tries:
    """Counts wrong passwords by address."""

    def __init__(self) -> None:
        self._wrong: dict[str, deque[float]] = {}

    def too_many(self, address: str) -> bool:
        """Whether an address has to wait."""
        now, wrong = time.monotonic(), self._wrong.get(address)
        while wrong and now - wrong[0] > WHILE:
            wrong.popleft()
        return wrong is not None and len(wrong) >= TRIES

    def wrong(self, address: str) -> None:
        """Count one; of very many addresses the first is forgotten."""
        self._wrong.setdefault(address, deque(maxlen=TRIES)).append(time.monotonic())
        if len(self._wrong) > ADDRESSES:
            del self._wrong[next(iter(self._wrong))]


class Guard:
    """Wraps an ASGI application. `hosts` are the names it answers to, lower case and without port; empty means any."""

    def __init__(self, app: App, hosts: frozenset[str] = frozenset()) -> None:
        self.app, self.hosts, self._tries = app, hosts, Tries()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass on what is ours and refuse the rest with 403, closing websockets likewise."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self.hosts and (why := self._refusal(scope)):
            await _refuse(scope["type"], 403, why, send)
            return
        address, login, begun = str((scope.get("client") or ("",))[0]), _is_login(scope), list[int]()
        if login and self._tries.too_many(address):
            await _refuse(scope["type"], 429, "Too many wrong passwords. Wait a minute.", send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
                if login and message["status"] >= 400:
                    self._tries.wrong(address)
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, guarded)
        except Exception:
            if not begun and scope["type"] == "http":
                await _refuse("http", 500, "This went wrong here. The Studio's own output says how.", send)
            raise

    def _refusal(self, scope: MutableMapping[str, Any]) -> str:
        """Say why a request is not for us, or nothing."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]

        def all_of(name: bytes) -> list[str]:
            return [value.decode("latin-1") for key, value in headers if key.lower() == name]

        hosts, origins = all_of(b"host"), all_of(b"origin")
        if len(hosts) != 1 or _name(hosts[0]) not in self.hosts:
            return "This name is not served here. If it should be, start vgm-studio with --name and this name."
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            return "Requests from other pages are refused."
        site, mode = all_of(b"sec-fetch-site"), all_of(b"sec-fetch-mode")
        foreign = any(value not in ("same-origin", "none") for value in site)
        if foreign and not (scope.get("method") == "GET" and mode == ["navigate"] and scope["path"] == "/"):
            return "Requests from other pages are refused."
        return ""


def _name(host: str) -> str:
    """The name in a `Host` header, without port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _is_login(scope: MutableMapping[str, Any]) -> bool:
    return scope["type"] == "http" and scope.get("method") == "POST" and scope["path"].rstrip("/").endswith("/login")


async def _refuse(kind: str, status: int, why: str, send: Send) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})
