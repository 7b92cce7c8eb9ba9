"""What refusing the least sure answers gains: the error rate of those that are left, for every share that is left.

El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, 2010. A threshold on the score decides,
so answers of one score are accepted or refused together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

_MOST_POINTS = 60


class Point(NamedTuple):
    """What one threshold gives: answers that score at least `threshold` are accepted."""

    threshold: float
    accepted: int
    mistakes: int
    """Among the accepted."""

    @property
    def risk(self) -> float:
        """Error rate of the accepted."""
        return self.mistakes / self.accepted


def curve(scores: Sequence[float], right: Sequence[bool]) -> list[Point]:
    """A point for each distinct score, the highest first."""
    points, accepted, mistakes = [], 0, 0
    ranked = sorted(zip(scores, right, strict=True), key=lambda answer: -answer[0])
    for score, group in groupby(ranked, key=lambda answer: answer[0]):
        answers = [is_right for _, is_right in group]
        accepted, mistakes = accepted + len(answers), mistakes + answers.count(False)
        points.append(Point(score, accepted, mistakes))
    return points


def choose(points: Sequence[Point], error_rate: float) -> Point | None:
    """The point that accepts the most answers while at most this share of them is wrong; None where there is none."""
    within = [point for point in points if point.risk <= error_rate]
    return within[-1] if within else None


def area(points: Sequence[Point]) -> float:
    """AURC, the mean of the risk over all coverages: 0 is best, the error rate of all answers what chance gives."""
    before = [0, *(point.accepted for point in points)]
    return math.fsum(point.risk * (point.accepted - less) for point, less in zip(points, before, strict=False)) / (
        points[-1].accepted
    )


def measure(scores: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """`aurc`, and `risk_coverage`: some sixty points of the curve, the surest answers first."""
    points = curve(scores, right)
    step = max(1, len(scores) // _MOST_POINTS)
    shown = [point for point, after in pairwise(points) if point.accepted // step < after.accepted // step]
    return {
        "aurc": area(points),
        "risk_coverage": [
            {"coverage": point.accepted / len(scores), "error_rate": point.risk, "threshold": point.threshold}
            for point in (*shown, points[-1])
        ],
    }
