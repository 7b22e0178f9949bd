"""A client of an ASGI application, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


async def send(app: Any, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "scheme": "http", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    said: list[dict] = []
    waiting = [{"type": "http.request", "body": body[n : n + 4096], "more_body": True}
               for n in range(0, len(body), 4096)] + [{"type": "http.request", "body": b""}]  # fmt: skip

    async def receive() -> dict:
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def sent(message: dict) -> None:
        said.append(message)

    await app(scope, receive, sent)
    start = said[0]
    told = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], told, b"".join(message.get("body", b"") for message in said[1:]))


def post(app: Any, path: str, body: Any, **headers: str) -> Reply:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(send(app, "POST", path, raw, **headers))


def post_all(app: Any, path: str, bodies: Sequence[Any]) -> list[Reply]:
    """Send all at once."""

    async def run() -> list[Reply]:
        return await asyncio.gather(*(send(app, "POST", path, json.dumps(body).encode()) for body in bodies))

    return asyncio.run(run())


def get(app: Any, path: str, **headers: str) -> Reply:
    return asyncio.run(send(app, "GET", path, **headers))
