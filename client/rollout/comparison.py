"""Two versions of a model on the same images: errors, latency and disagreement, and whether the new one may stay."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from client.errors import ClientError, NotAuthorized, NothingListens
from client.inputs import Source
from client.torchserve import TorchServe

P99_SLACK_MS = 10.0
"""The new version's p99 may always be larger by this much, so that noise between two small figures does not decide."""
_THREADS = 4


@dataclass(frozen=True)
class Limits:
    """What the new version must keep to; shares are in 0..1."""

    errors: float = 0.001
    """Most that its share of errors may be above the old version's."""
    p99_ratio: float = 1.5
    """Most that its p99 may be of the old version's."""
    disagreement: float = 0.05
    """Most images to which it may give another best class."""
    compared: int = 100
    """Fewer images are no evidence."""


@dataclass(frozen=True)
class Plan:
    """Which images are asked for, and when.

    Args:
        rate: images a second that the old version gets.
        share: of them the new version gets too, in 0..1.
        seed: decides which, and in which order.
    """

    images: Sequence[Source]
    watch_s: float
    rate: float
    share: float
    seed: int = 0

    def turns(self) -> list[tuple[Source, bool]]:
        """Each image in its turn, and whether the new version gets it too."""
        generator = random.Random(self.seed)
        count = int(self.rate * self.watch_s)
        order: list[Source] = []
        while len(order) < count:
            order += generator.sample(self.images, len(self.images))
        compared = set(generator.sample(range(count), self.compared))
        return [(source, turn in compared) for turn, source in enumerate(order[:count])]

    @property
    def compared(self) -> int:
        return round(self.share * int(self.rate * self.watch_s))


@dataclass(frozen=True)
class Answer:
    """What one version made of one image: its best class, or why there is none."""

    label: str | None
    latency_ms: float
    error: str = ""


@dataclass(frozen=True)
class Figures:
    """One version's answers; times in milliseconds are None where it gave none."""

    images: int
    errors: int
    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Figures:
        latencies_ms = sorted(answer.latency_ms for answer in answers if not answer.error)
        errors = len(answers) - len(latencies_ms)
        return cls(len(answers), errors, _quantile(latencies_ms, 0.5), _quantile(latencies_ms, 0.99))


@dataclass
class Comparison:
    """The images that both versions were asked for, so far."""

    planned: int
    pairs: list[tuple[Answer, Answer]] = field(default_factory=list)
    excess: int = 0
    """Errors of the new version, less those of the old one."""
    disagreements: int = 0

    def add(self, old: Answer, new: Answer) -> None:
        self.pairs.append((old, new))
        self.excess += bool(new.error) - bool(old.error)
        self.disagreements += not old.error and not new.error and old.label != new.label

    @property
    def old(self) -> Figures:
        return Figures.of([old for old, _ in self.pairs])

    @property
    def new(self) -> Figures:
        return Figures.of([new for _, new in self.pairs])

    @property
    def slowest_ms(self) -> float:
        return max((answer.latency_ms for pair in self.pairs for answer in pair), default=0.0)

    def reasons(self, limits: Limits) -> list[str]:
        """Why the new version must go; none where it may stay."""
        old, new = self.old, self.new
        answered = sum(not old.error and not new.error for old, new in self.pairs)
        reasons = []
        if old.images - old.errors < limits.compared:
            reasons.append(f"only {old.images - old.errors} images to compare, {limits.compared} are evidence")
        if self.excess > limits.errors * new.images:
            first = next(answer.error for _, answer in self.pairs if answer.error)
            reasons.append(f"{new.errors} errors against {old.errors} in {new.images} images ({first})")
        if self.disagreements > limits.disagreement * answered:
            share, allowed = 100 * self.disagreements / answered, 100 * limits.disagreement
            reasons.append(f"another class for {share:.1f} % of the images, {allowed:g} % are allowed")
        if old.p99_ms is not None and new.p99_ms is not None:
            allowed_ms = max(limits.p99_ratio * old.p99_ms, old.p99_ms + P99_SLACK_MS)
            if new.p99_ms > allowed_ms:
                reasons.append(f"p99 {new.p99_ms:.1f} ms against {old.p99_ms:.1f}, {allowed_ms:.1f} are allowed")
        return reasons

    def is_lost(self, limits: Limits) -> bool:
        """Whether errors or other classes are too many already, even if all images to come are answered alike."""
        return self.excess > limits.errors * self.planned or self.disagreements > limits.disagreement * self.planned


def compare(
    server: TorchServe,
    model: str,
    versions: tuple[str, str],
    plan: Plan,
    limits: Limits,
    report: Callable[[float, Comparison], None],
) -> Comparison:
    """Ask the old version for every image and the new one for its share, until the time is over or it has lost.

    Args:
        server: one with `retry_s=0`, so that an error is seen.
        versions: the old and the new one.
        report: called now and then with the seconds since the beginning.

    Raises:
        NothingListens, NotAuthorized: nothing can be compared any more.
        OSError: an image cannot be read.
    """
    comparison = Comparison(plan.compared)
    running: set[Future[tuple[Answer, Answer] | None]] = set()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="compare")
    started = time.monotonic()
    try:
        for turn, (source, compared) in enumerate(plan.turns()):
            time.sleep(max(0.0, started + turn / plan.rate - time.monotonic()))
            running = _collect(running, _THREADS - 1, comparison)
            passed_s = time.monotonic() - started
            report(passed_s, comparison)
            if passed_s >= plan.watch_s or comparison.is_lost(limits):
                break
            asked = (model, *versions, source, compared, turn % 2 == 0)
            running.add(pool.submit(_take_turn, server, *asked))
        _collect(running, 0, comparison)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return comparison


def _collect(
    running: set[Future[tuple[Answer, Answer] | None]], most: int, comparison: Comparison
) -> set[Future[tuple[Answer, Answer] | None]]:
    """Take what is answered, and wait until at most `most` are under way; returns those."""
    while True:
        done, running = wait(running, None if len(running) > most else 0, FIRST_COMPLETED)
        for future in done:
            if (pair := future.result()) is not None:
                comparison.add(*pair)
        if len(running) <= most:
            return running


def _take_turn(
    server: TorchServe, model: str, old: str, new: str, source: Source, compared: bool, old_first: bool
) -> tuple[Answer, Answer] | None:
    """Both answers, one after the other; None where the old version alone was asked."""
    image = source.read()
    if not compared:
        _ask(server, model, old, image)
        return None
    if old_first:
        return _ask(server, model, old, image), _ask(server, model, new, image)
    new_answer = _ask(server, model, new, image)
    return _ask(server, model, old, image), new_answer


def _ask(server: TorchServe, model: str, version: str, image: bytes) -> Answer:
    started = time.perf_counter()
    try:
        prediction = server.predict(model, image, version)
    except (NothingListens, NotAuthorized):
        raise
    except ClientError as error:
        return Answer(None, 1000 * (time.perf_counter() - started), str(error))
    return Answer(next(iter(prediction), ""), 1000 * (time.perf_counter() - started))


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
