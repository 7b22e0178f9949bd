"""What stands before the routes: the token, the size of a body, and the count of what was asked."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hstu.serving.metrics import Metrics

OPEN = ("/", "/docs", "/openapi.json", "/health")  # what needs no token
_BODY_SECONDS = 30.0  # for a body to arrive


class Guard:
    """An ASGI application in front of ``app``.

    Args:
        app: What answers.
        metrics: Counts what is asked.
        routes: Paths that are counted by their names; others are "other".
        max_body: Bytes of a body.
        token: What ``Authorization: Bearer`` has to say; None: anybody may ask.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: set[str], max_body: int, token: str | None) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes
        self.max_body, self.token = max_body, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self.routes else "other"
        began, status = time.perf_counter(), 500

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, receive, told)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self.token is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
                more = [(b"www-authenticate", b"Bearer")]
                await refuse(send, 401, "Authorization: give the server's token, as Bearer TOKEN", more)
                return
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > self.max_body:
                        await refuse(send, 413, f"the body has more than {self.max_body:,} bytes; ask for less at once",
                                     [(b"connection", b"close")])  # fmt: skip
                        return
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            await refuse(send, 408, "the body did not arrive", [(b"connection", b"close")])
            return
        left: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def whole() -> Message:
            return left.pop() if left else await receive()

        await self.app(scope, whole, send)


async def refuse(send: Send, status: int, line: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send an error of one line."""
    body = said({"error": line})
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


def said(content: Any) -> bytes:
    """Return JSON in ASCII, which any text can be said in; numbers that are none become null, dates text."""
    try:
        return json.dumps(content, allow_nan=False, default=str).encode()
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, default=str).encode()


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
