"""Let a server finish what it has taken before it is stopped: TorchServe itself cuts every open connection.

TorchServe has no way to refuse new requests only. So first the file `logs/ready` is removed, for load balancers, and
requests are served until no more come. If they continue, the inference token is exchanged and its file removed: later
requests are refused in order (400), and accepted ones are finished.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from client import metrics
from client.errors import ClientError, ServerUnreachable
from client.torchserve import TorchServe
from server import processes

FINISH_TIMEOUT_S = 30.0
"""For requests that were taken before the tokens were exchanged."""
_WINDOW_S = 1.0
_IDLE_S = 0.05
"""Processor time that workers spend in a window without any request, telling their metrics."""


@dataclass(frozen=True)
class Activity:
    """What a server has done so far, and what waits."""

    requests: float
    waiting: int
    busy_s: float
    """Processor time of all workers."""

    def is_still_after(self, earlier: Activity) -> bool:
        """Whether nothing came, waited or was computed in between."""
        idle = abs(self.busy_s - earlier.busy_s) < _IDLE_S
        return self.requests == earlier.requests and self.waiting == earlier.waiting == 0 and idle


class Drain:
    """The last calls to a server."""

    def __init__(self, run_dir: Path, server: TorchServe, metrics_url: str) -> None:
        self.run_dir = run_dir
        self.server = server
        self.metrics_url = metrics_url

    def finish(self, timeout_s: float) -> bool:
        """Wait until no request comes any more, at most `timeout_s`; then refuse new ones and finish the others.

        Returns:
            Whether every request that was taken has been answered, as far as can be seen.
        """
        if self.wait_until_still(timeout_s):
            return True
        self.refuse_requests()
        return self.wait_until_still(FINISH_TIMEOUT_S)

    def wait_until_still(self, timeout_s: float) -> bool:
        """Whether the server stood still before the time was over; one that is gone does."""
        deadline = time.monotonic() + timeout_s
        try:
            earlier = self.activity()
            while time.monotonic() < deadline:
                time.sleep(_WINDOW_S)
                now = self.activity()
                if now.is_still_after(earlier):
                    return True
                earlier = now
        except ClientError:
            return processes.find(self.run_dir) is None
        return False

    def activity(self) -> Activity:
        """Raises:
        ClientError: the server does not answer.
        """
        waiting = 0
        for model in self.server.models():
            for version in self.server.describe_versions(model):
                waiting += version.get("jobQueueStatus", {}).get("pendingRequests", 0)
        return Activity(self._requests(), waiting, self._busy_s())

    def _requests(self) -> float:
        """How many the server has counted; 0 where it counts none, without metrics_mode=prometheus."""
        try:
            samples = metrics.read(self.metrics_url)
        except ServerUnreachable:
            raise
        except ClientError:
            return 0
        return sum(sample.value for sample in samples if sample.name == "ts_inference_requests_total")

    def refuse_requests(self) -> None:
        """Make every inference token that a client may have invalid, and take the file from which it would get a new
        one; requests that were taken are not touched."""
        with suppress(ClientError):
            self.server.token("management")  # renewed where it would not outlive the drain
            self.server.tokens.keep("management")
            self.server.token(refused=self.server.token())
        (self.run_dir / "key_file.json").unlink(missing_ok=True)

    def _busy_s(self) -> float:
        total = 0.0
        for worker in processes.workers(self.run_dir):
            try:
                times = worker.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total
