"""Whether a model answers, as against TorchServe's own `/ping`, which says Healthy for minutes with no worker alive.

Ready means: as many workers as the model declares have loaded it, and a golden image, where there is one, is answered
as training measured. The readiness server and the edge both find that out by `ModelCheck`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from Python 3.11
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from client.errors import ClientError
from client.torchserve import TorchServe, Workers
from operate.errors import NotAsMeasured
from operate.golden import GoldenFile
from system.printable import counted

INTERVAL_S = 2.0
LIMIT_S = 2.0
"""Together they bound the time after which a dead worker shows: 4 s."""
ANSWER_TIMEOUT_S = 1.8
"""Longest wait for one answer within a check."""


BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Upper bounds of the histogram of a golden image's answer times; the last one is longer than a look waits."""


@dataclass(frozen=True)
class Readiness:
    """The result of one check."""

    ready: bool
    reason: str
    workers: Workers | None = None
    """None where the server did not say."""

    def document(self) -> dict[str, Any]:
        return {"ready": self.ready, "reason": self.reason}


@dataclass(frozen=True)
class GoldenAnswers:
    """What became of all golden images so far."""

    right: int = 0
    wrong: int = 0
    none: int = 0
    within: tuple[int, ...] = (0,) * len(BOUNDS_S)
    """How many were answered, rightly or not, within each of `BOUNDS_S`."""
    seconds: float = 0.0
    """Waited for all of them together."""

    @property
    def asked(self) -> int:
        return self.right + self.wrong + self.none

    def with_answer(self, seconds: float, right: bool) -> GoldenAnswers:
        """And one that was answered after so many seconds."""
        within = tuple(number + (seconds <= bound) for number, bound in zip(self.within, BOUNDS_S, strict=True))
        return replace(
            self,
            right=self.right + right,
            wrong=self.wrong + (not right),
            within=within,
            seconds=self.seconds + seconds,
        )

    def without_answer(self, seconds: float) -> GoldenAnswers:
        """And one that was given up after so many seconds."""
        return replace(self, none=self.none + 1, seconds=self.seconds + seconds)


class ModelCheck:
    """Looks at one model; each look asks for one golden image, the next one in turn.

    Args:
        server: one with `timeout_s=ANSWER_TIMEOUT_S` and `retry_s=0`, since a look is to say how things are now.
        model: NAME or NAME/VERSION.
        golden_file: without one the workers' states decide.

    Attributes:
        golden: what became of the golden images, or None where there are none.
    """

    def __init__(self, server: TorchServe, model: str, golden_file: GoldenFile | None = None) -> None:
        self.model = model
        self.golden = GoldenAnswers() if golden_file else None
        self._server = server
        self._golden_file = golden_file
        self._images = golden_file.images if golden_file else ()
        """What this server was last right about."""
        self._turn = count()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="golden")

    def __call__(self) -> Readiness:
        # Both at a time: on a GPU TorchServe asks nvidia-smi for each worker before it describes the model.
        answered = self._beside.submit(self.ask_golden)
        workers = None
        try:
            workers = self.workers()
            workers.check()
            return Readiness(True, f"{counted(workers.ready, 'worker')} ready; {answered.result()}", workers)
        except ClientError as error:
            return Readiness(False, str(error), workers)

    def workers(self) -> Workers:
        """How many have loaded the model."""
        return Workers.of(self._server.describe(self.model))

    def ask_golden(self) -> str:
        """Ask for the next golden image; returns what came of it.

        Raises:
            ClientError: no answer, or not the measured one, be it by the images that this server was last right about
                or by those that their file has by now.
        """
        if self._golden_file is None or self.golden is None:
            return "no golden image was asked for"
        turn, images = next(self._turn), self._images
        while True:
            image = images[turn % len(images)]
            started = time.monotonic()
            try:
                answer = self._server.predict(self.model, image.data)
            except ClientError:
                self.golden = self.golden.without_answer(time.monotonic() - started)
                raise
            seconds = time.monotonic() - started
            try:
                image.check(answer)
            except NotAsMeasured:
                newer = self._golden_file.after(images)
                if newer is images:
                    self.golden = self.golden.with_answer(seconds, right=False)
                    raise
                images = newer
            else:
                self.golden = self.golden.with_answer(seconds, right=True)
                self._images = images
                return f"{image.name} answered as measured"


class Watch:
    """A check that is made at most once in `interval_s`, however many threads ask, and waited for `limit_s` at most.

    Attributes:
        ended_at: when the last check came to its end, in Unix time; None before the first.
    """

    def __init__(
        self, check: Callable[[], Readiness], interval_s: float = INTERVAL_S, limit_s: float = LIMIT_S
    ) -> None:
        self.ended_at: float | None = None
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
        self._running = self._worker.submit(self._checked)
        try:
            return self._running.result(self._limit_s)
        except FutureTimeout:
            return Readiness(False, f"no answer within {self._limit_s:g} s")

    def _checked(self) -> Readiness:
        try:
            return self._check()
        except Exception as error:  # a server that answers nonsense is not ready either
            return Readiness(False, f"the server is not what it should be ({type(error).__name__}: {error})")
        finally:
            self.ended_at = time.time()
