"""Readiness over HTTP: `/healthz` and `/readyz` for load balancers and orchestrators, `/metrics` for Prometheus.

    python -m client ready lenet5-digits --http 8090 --golden runs/lenet5-digits/golden

`/healthz` says that this process lives, `/readyz` with 200 or 503 whether the model answers, and `/metrics` the same in
figures. None wants a token, and whoever asks cannot make the model work harder than a look every two seconds.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from client import exposition
from client.readiness import ModelCheck, Watch


class ProbeServer(ThreadingHTTPServer):
    """Serves one check; `server_address` says on which port."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], check: ModelCheck) -> None:
        super().__init__(address, _Handler)
        self.check = check
        self.watch = Watch(check)

    def metrics(self) -> str:
        """What a look finds, for Prometheus."""
        readiness = self.watch.look()
        return exposition.text(self.check.model, readiness, self.watch.ended_at, self.check.golden)


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
