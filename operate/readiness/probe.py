"""Readiness over HTTP: `/healthz` and `/readyz` for load balancers and orchestrators, `/metrics` for Prometheus.

    python -m operate ready lenet5-digits --http 8090 --golden runs/lenet5-digits/golden

`/healthz` says that this process lives, `/readyz` with 200 or 503 whether the model answers, and `/metrics` the same in
figures. None requires a token, and a caller cannot make the model work harder than a look every two seconds.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from operate.readiness import exposition
from operate.readiness.checks import ModelCheck, Watch

HEAD_TIMEOUT_S = 10.0
"""That a client may take for all of its request, however it sends it."""
MOST_CONNECTIONS = 64
"""Each has a thread."""
_Request = socket.socket | tuple[bytes, socket.socket]


class ProbeServer(ThreadingHTTPServer):
    """Serves one check; `server_address` says on which port."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], check: ModelCheck) -> None:
        super().__init__(address, _Handler)
        self.check = check
        self.watch = Watch(check)
        self._lock = threading.Lock()
        self._open: dict[_Request, float | None] = {}
        """When each connection came; None once its request is there."""

    def process_request(self, request: _Request, client_address: object) -> None:
        """In a thread. Of too many connections the one that has been sending its request for longest is ended."""
        with self._lock:
            if len(self._open) >= MOST_CONNECTIONS:
                sending = [other for other, since in self._open.items() if since is not None]
                _end(sending[0] if sending else request)
                self._open.pop(sending[0] if sending else request, None)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: _Request) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second: end the connections whose request takes too long."""
        latest = time.monotonic() - HEAD_TIMEOUT_S
        with self._lock:
            for request, since in self._open.items():
                if since is not None and since < latest:
                    _end(request)

    def has_sent(self, request: _Request) -> None:
        """This connection's request is there."""
        with self._lock:
            if request in self._open:
                self._open[request] = None

    def metrics(self) -> str:
        """What a look finds, for Prometheus."""
        readiness = self.watch.look()
        return exposition.text(self.check.model, readiness, self.watch.ended_at, self.check.golden)


class _Handler(BaseHTTPRequestHandler):
    server: ProbeServer
    server_version, sys_version = "readiness", ""
    timeout = 10
    """Seconds that a client may take to read its answer."""

    def handle(self) -> None:
        with suppress(OSError):  # a client that has gone, or was ended
            super().handle()

    def do_GET(self) -> None:
        self.server.has_sent(self.request)
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(HTTPStatus.OK, {"status": "alive"})
        elif path == "/readyz":
            readiness = self.server.watch.look()
            status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, readiness.document())
        elif path == "/metrics":
            self._send(HTTPStatus.OK, exposition.CONTENT_TYPE, self.server.metrics().encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"reason": "there are /healthz, /readyz and /metrics"})

    def _answer(self, status: HTTPStatus, document: dict[str, object]) -> None:
        self._send(status, "application/json", json.dumps(document).encode() + b"\n")

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A line for each look would be all there is in the log."""


def _end(request: _Request) -> None:
    """Have the thread that reads from it find its end."""
    assert isinstance(request, socket.socket)
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
