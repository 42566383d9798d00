"""The door: an ASGI middleware that answers only to the Studio's own names and only to its own pages.

A page of a stranger that the user's browser happens to have open can reach loopback addresses; DNS rebinding even makes
it look like the same site. So the `Host` must be one of ours, and a request that says it comes from elsewhere (`Origin`,
`Sec-Fetch-Site`) is refused before anything is read.
"""

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


class Guard:
    """Wraps an ASGI application. `hosts` are the names it answers to, lower case and without port; empty means any."""

    def __init__(self, app: App, hosts: frozenset[str] = frozenset()) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass on what is ours and refuse the rest with 403, closing websockets likewise."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self.hosts and (why := self._refusal(scope)):
            await _refuse(scope["type"], why, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)

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


async def _refuse(kind: str, why: str, send: Send) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})
