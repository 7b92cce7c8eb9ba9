"""Readiness over HTTP, for load balancers and orchestrators: `/healthz` and `/readyz`, without a token.

    python -m client ready lenet5-digits --http 8090 --golden runs/lenet5-digits/golden

`/healthz` says that this process lives, `/readyz` with 200 or 503 whether the model answers. Whoever asks learns no
more than that, and cannot make the model work harder than a look every two seconds.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from client.readiness import Watch


class ProbeServer(ThreadingHTTPServer):
    """Serves one watch; `server_address` says on which port."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], watch: Watch) -> None:
        super().__init__(address, _Handler)
        self.watch = watch


class _Handler(BaseHTTPRequestHandler):
    server: ProbeServer
    server_version, sys_version = "readiness", ""
    timeout = 10
    """Seconds that a client may take to send its request."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(HTTPStatus.OK, {"status": "alive"})
        elif path == "/readyz":
            readiness = self.server.watch.look()
            status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, readiness.document())
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"reason": "there are /healthz and /readyz"})

    def _answer(self, status: HTTPStatus, document: dict[str, object]) -> None:
        body = json.dumps(document).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A line for each look would be all there is in the log."""
