"""Copies of what clients send, from an edge: nginx mirrors a share of their requests to a socket in its folder.

A client neither waits for its copy nor sees what becomes of it. The copies that both versions have not answered yet are
few: one that finds the queue full is left out and counted.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

from operate.rollout.asking import Turn

_MOST_WAITING = 32
"""Of the largest bodies 210 MB."""
_HEADERS = ("Content-Type", "Accept", "X-Top-K", "Inference-Header-Content-Length")
"""Those that decide what the answer is: a copy has no deadline, and no id, which stay with the client's own request."""
_TICK_S = 0.5


class Mirror:
    """The copies that come to a socket.

    Args:
        share: of the requests that are copied, in 0..1.
        rate: most copies a second that are compared.
    """

    def __init__(self, socket: Path, watch_s: float, rate: float, share: float) -> None:
        self.socket, self.watch_s, self.rate, self.share = socket, watch_s, rate, share
        self.left_out = 0
        self._waiting: queue.Queue[Turn] = queue.Queue(_MOST_WAITING)

    @property
    def compared(self) -> int:
        return int(self.rate * self.watch_s)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take copies within.

        Raises:
            OSError: the socket cannot be made.
        """
        self.socket.unlink(missing_ok=True)
        with _Server(str(self.socket), self) as server:
            if os.geteuid() == 0:  # nginx's workers run as the folder's owner
                owner = self.socket.parent.stat()
                os.chown(self.socket, owner.st_uid, owner.st_gid)
            threading.Thread(target=server.serve_forever, args=(_TICK_S,), name="copies", daemon=True).start()
            try:
                yield
            finally:
                server.shutdown()
                self.socket.unlink(missing_ok=True)

    def take(self, copy: Turn) -> None:
        try:
            self._waiting.put_nowait(copy)
        except queue.Full:
            self.left_out += 1

    def due(self) -> Iterator[Turn | None]:
        """Copies as they come, at most `rate` a second, until the time is over."""
        end = time.monotonic() + self.watch_s
        while time.monotonic() < end:
            try:
                yield self._waiting.get(timeout=_TICK_S)
                time.sleep(1 / self.rate)
            except queue.Empty:
                yield None


class _Server(UnixStreamServer):
    request_queue_size = 128

    def __init__(self, socket: str, mirror: Mirror) -> None:
        self._mirror = mirror
        super().__init__(socket, _handler(mirror))

    def handle_error(self, request: object, client_address: object) -> None:
        """As where nginx has given up a copy meanwhile."""
        self._mirror.left_out += 1


def _handler(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 1  # seconds; nginx has all of a body before it sends any

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(length)
            if len(body) < length:
                raise EOFError
            headers = {name: value for name in _HEADERS if (value := self.headers[name])}
            mirror.take(Turn(lambda: body, headers=headers))
            self.send_response_only(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    return Handler
