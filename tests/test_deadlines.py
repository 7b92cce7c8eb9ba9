"""What nobody waits for any more is refused before it is computed; what can be answered in time is answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from handler.arrival import Arrival
from handler.deadline import HEADER, Deadlines
from tests.worker import ask, load

NOW = 1_790_000_000.0


def codes(
    *requests: tuple[str | None, str | None], max_wait_s: float = 10, took: Sequence[tuple[int, float]] = ()
) -> list[int]:
    """200, or the status of the refusal, for requests with these `X-Request-Start` and deadlines, in one batch.

    Args:
        took: images and seconds of the batches before.
    """
    deadlines = Deadlines(max_wait_s)
    for images, seconds in took:
        deadlines.computed(images, seconds)
    named = ({"x-request-start": start, HEADER: waits} for start, waits in requests)
    headers = [{name: value for name, value in each.items() if value is not None} for each in named]
    refusals = deadlines.refusals([Arrival.of(each) for each in headers], headers, NOW)
    return [refusal.code if refusal else 200 for refusal in refusals]


def ago(seconds: float) -> str:
    return f"t={NOW - seconds:.3f}"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (ago(11), 504),
        (ago(11)[2:], 200),
        (f"t={NOW - 11:.0f}", 200),
        ("t=soon", 200),
        ("t=" + "9" * 400, 200),
        ("", 200),
    ],
)
def test_what_nobody_waits_for(start: str, expected: int) -> None:
    """By the edge's header, which is Unix time; another form of it, or one that lies ahead, changes nothing."""
    assert codes((start, None)) == [expected]
    assert codes((start, None), max_wait_s=20) == [200]


@pytest.mark.parametrize(
    ("waits_ms", "start", "expected"),
    [
        ("1000", ago(2), 504),
        ("3000", ago(2), 200),
        ("60000", ago(11), 504),  # never longer than max_wait_s
        ("0", ago(2), 200),
        ("0", ago(11), 504),
        ("1000", None, 200),  # nobody knows how long it waited
        ("1000", ago(-60), 200),
        *((broken, None, 400) for broken in ("", "1s", "-1", "1.5", "1e3", " 5", "٣", "5\n", "9" * 10, "9" * 10_000)),
    ],
)  # fmt: skip
def test_a_client_says_how_long_it_waits(waits_ms: str, start: str | None, expected: int) -> None:
    """In milliseconds, within what the recipe allows; what is no number is the client's mistake."""
    assert codes((start, waits_ms)) == [expected]


def test_a_batch_takes_no_more_than_its_clients_wait_for() -> None:
    """By what images took before: those that would make an earlier one late are refused, and those that do not wait
    are not."""
    took = [(2, 0.2)] * 3
    assert codes(*[(ago(0.5), "750")] * 4, took=took) == [200, 200, 504, 504]
    assert codes(*[(ago(0.5), "750")] * 4) == [200] * 4
    assert codes((ago(0.7), "750"), (ago(0.1), "750"), (ago(0.1), "350"), (ago(0.1), "750"), took=took) == [
        504, 200, 200, 504
    ]  # fmt: skip
    assert codes((ago(5), None), (ago(0), "150"), (ago(0), "250"), (ago(5), None), took=took) == [200, 504, 200, 200]


def test_who_is_refused_for_what_others_took_is_tried_again() -> None:
    """Soon one is computed, since it may be quicker."""
    deadlines = Deadlines(10)
    deadlines.computed(1, 1.0)
    deadlines.computed(1, 3.0)
    headers = [{"x-request-start": ago(0), HEADER: "900"}]
    refused = []
    for _ in range(3):
        [refusal] = deadlines.refusals([Arrival.of(headers[0])], headers, NOW)
        refused.append(refusal is not None)
        deadlines.computed(0, 0.0)
    assert refused == [True, True, False]


def test_what_is_late_is_never_computed(run: Path, digit: bytes) -> None:
    """Neither decoded nor given to the model, while its neighbours are; without the header it is."""
    classifier = load(run)
    images: list[int] = []
    predict = classifier.variant.predict

    def count(batch: torch.Tensor) -> torch.Tensor:
        images.append(len(batch))
        return predict(batch)

    classifier.variant = replace(classifier.variant, predict=count)
    waited = {"X-Request-Start": f"t={time.time() - 2:.3f}"}
    late = {**waited, "X-Envoy-Expected-Rq-Timeout-Ms": "500"}
    answers, statuses = ask(classifier, run, [digit] * 4, {0: late, 1: waited, 3: late})
    assert (statuses, images) == ([504, 200, 200, 504], [2])
    assert answers[0]["type"] == "RequestTooLate"
    ask(classifier, run, [digit] * 2, {0: late, 1: late})
    assert images == [2]
    ask(classifier, run, [digit] * 2, {0: waited, 1: waited})
    assert images == [2, 2]
