"""The server process: a socket, and an end in which what was asked is still answered."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from hstu.interrupt import Stopped, patience, requested
from hstu.serving.service import Service

logger = logging.getLogger(__name__)

_ASKED_TO_END = 0.1  # seconds between looks at whether a signal came
_OUTSTANDING = 6.0  # seconds for requests that are under way when it came; the process has 8 in all


class Server(uvicorn.Server):
    """An HTTP server of ``app`` that leaves signals to ``hstu.interrupt``."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(_OUTSTANDING),
                server_header=False,
                h11_max_incomplete_event_size=1 << 16,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        if requested() is not None and threading.current_thread() is threading.main_thread():
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at ``host`` and ``port``; 0 takes any that is free.

    Raises:
        ValueError: if it cannot.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port = {port}: must be between 0 and 65535; 0 takes any that is free")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Where a socket does not say that it is of TCP, asyncio leaves it Nagle's delay: 40 ms an answer.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise ValueError(f"--host = {host!r}, --port = {port}: {error.strerror or error}; choose another") from None


def serve(app: ASGIApp, service: Service, sock: socket.socket) -> None:
    """Serve until a signal comes; then answer what was asked, and raise ``Stopped``."""
    server = Server(app)
    with patience(lambda: "stopped; some requests were not answered", lambda: False):
        server.run(sockets=[sock])
        service.close(timeout=1.0)
        if (number := requested()) is not None:
            logger.info("stopped; %s", "everything that was asked is answered")
            raise Stopped(number, told=True)
