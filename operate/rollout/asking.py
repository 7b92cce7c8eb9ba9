"""Have two versions of a model answer the same requests: images of files, or copies of what clients send."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from client.errors import ClientError, NotAuthorized, NothingListens
from client.inputs import Source
from client.torchserve import Prediction, TorchServe
from operate.rollout.comparison import Answer, Comparison, Limits

_THREADS = 4


@dataclass(frozen=True)
class Turn:
    """One request; `compared` where the new version gets it too."""

    read: Callable[[], bytes]
    """Its body; raises OSError."""
    compared: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)


class Due(Protocol):
    """Where requests come from."""

    @property
    def watch_s(self) -> float: ...

    @property
    def compared(self) -> int:
        """Most requests that are compared."""

    def due(self) -> Iterator[Turn | None]:
        """Each request when its time has come, and None now and then."""


@dataclass(frozen=True)
class Plan:
    """Images of files: which are sent, and when.

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

    def due(self) -> Iterator[Turn]:
        """Each of `turns` when its time has come."""
        started = time.monotonic()
        for number, (source, compared) in enumerate(self.turns()):
            time.sleep(max(0.0, started + number / self.rate - time.monotonic()))
            yield Turn(source.read, compared)


def compare(
    server: TorchServe,
    model: str,
    versions: tuple[str, str],
    plan: Due,
    limits: Limits,
    report: Callable[[float, Comparison], None],
) -> Comparison:
    """Ask the old version every request and the new one its share, until the time is over or it has lost.

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
        for number, turn in enumerate(plan.due()):
            running = _collect(running, _THREADS - 1, comparison)
            passed_s = time.monotonic() - started
            report(passed_s, comparison)
            if passed_s >= plan.watch_s or comparison.is_lost(limits):
                break
            if turn is not None:
                running.add(pool.submit(_take_turn, server, model, *versions, turn, number % 2 == 0))
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
    server: TorchServe, model: str, old: str, new: str, turn: Turn, old_first: bool
) -> tuple[Answer, Answer] | None:
    """Both answers, one after the other; None where the old version alone was asked."""
    body = turn.read()

    def ask(version: str) -> Answer:
        started = time.perf_counter()
        try:
            answer = server.answer(model, body, turn.headers, version)
        except (NothingListens, NotAuthorized):
            raise
        except ClientError as error:
            return Answer((), 1000 * (time.perf_counter() - started), str(error))
        return Answer(list(_rows(answer)), 1000 * (time.perf_counter() - started))

    if not turn.compared:
        ask(old)
        return None
    if old_first:
        return ask(old), ask(new)
    new_answer = ask(new)
    return ask(old), new_answer


def _rows(answer: Any) -> Iterator[Prediction]:
    """The prediction for each image, in whichever form the request had; the error of an image is its class."""
    if isinstance(answer, dict) and isinstance(outputs := answer.get("outputs"), list):  # Open Inference
        tensors = {output["name"]: output for output in outputs}
        images, classes = tensors["label"]["shape"]
        for first in range(0, images * classes, classes):
            both = (tensors[name]["data"][first : first + classes] for name in ("label", "probability"))
            yield dict(zip(*both, strict=True))
        return
    if isinstance(answer, dict):
        predictions = answer.get("predictions")
        answer = predictions if isinstance(predictions, list) else [answer]
    for row in answer:
        yield {row["type"]: 1.0} if isinstance(row.get("type"), str) else row
