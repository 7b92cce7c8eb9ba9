"""Whether a model answers, as against TorchServe's own `/ping`, which says Healthy for minutes with no worker alive.

Ready means: as many workers as the model declares have loaded it, and a golden image, where there is one, is answered
as training measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from Python 3.11
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from client.errors import ClientError
from client.golden import GoldenImage
from client.torchserve import TorchServe

INTERVAL_S = 2.0
LIMIT_S = 2.0
"""Together they bound the time after which a dead worker shows: 4 s."""
ANSWER_TIMEOUT_S = 1.8
"""Longest wait for one answer within a check."""


@dataclass(frozen=True)
class Readiness:
    """The result of one check."""

    ready: bool
    reason: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


class ModelCheck:
    """Looks at one model; each look asks for one golden image, the next one in turn.

    Args:
        server: one with `timeout_s=ANSWER_TIMEOUT_S` and `retry_s=0`, since a look is to say how things are now.
        golden_images: may be empty, then the workers' states decide.
    """

    def __init__(self, server: TorchServe, model: str, golden_images: Sequence[GoldenImage]) -> None:
        self._server = server
        self._model = model
        self._golden_images = golden_images
        self._turn = count()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="golden")

    def __call__(self) -> Readiness:
        # Both at a time: on a GPU TorchServe asks nvidia-smi for each worker before it describes the model.
        answered = self._beside.submit(self._ask_golden)
        try:
            ready = self._server.check_workers(self._model)
            return Readiness(True, f"{ready} workers ready; {answered.result()}")
        except ClientError as error:
            return Readiness(False, str(error))

    def _ask_golden(self) -> str:
        """Raises:
        ClientError: no answer, or not the measured one.
        """
        if not self._golden_images:
            return "no golden image was asked for"
        image = self._golden_images[next(self._turn) % len(self._golden_images)]
        image.check(self._server.predict(self._model, image.data))
        return f"{image.name} answered as measured"


class Watch:
    """A check that is made at most once in `interval_s`, however many threads ask, and waited for `limit_s` at most."""

    def __init__(
        self, check: Callable[[], Readiness], interval_s: float = INTERVAL_S, limit_s: float = LIMIT_S
    ) -> None:
        self._check = check
        self._interval_s, self._limit_s = interval_s, limit_s
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="readiness")
        self._running: Future[Readiness] | None = None
        self._started = 0.0
        self._latest: Readiness | None = None

    def look(self) -> Readiness:
        """The latest result, or a new one where that is too old."""
        with self._lock:
            if self._latest is None or time.monotonic() - self._started >= self._interval_s:
                self._latest = self._renewed()
            return self._latest

    def _renewed(self) -> Readiness:
        # A check that hangs is not joined by others: the server would be asked by more and more.
        if self._running is not None and not self._running.done():
            return Readiness(False, f"no answer for {time.monotonic() - self._started:.1f} s")
        self._started = time.monotonic()
        self._running = self._worker.submit(self._check)
        try:
            return self._running.result(self._limit_s)
        except FutureTimeout:
            return Readiness(False, f"no answer within {self._limit_s:g} s")
