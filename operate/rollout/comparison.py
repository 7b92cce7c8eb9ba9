"""The answers of two versions to the same requests: errors, latency, disagreement, and whether the new one may stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from client.torchserve import Prediction
from operate.quantiles import quantile

P99_SLACK_MS = 10.0
"""The new version's p99 may always be larger by this much, so that noise between two small figures does not decide."""


@dataclass(frozen=True)
class Limits:
    """What the new version must keep to; shares are in 0..1."""

    errors: float = 0.001
    """Most that its share of errors may be above the old version's."""
    p99_ratio: float = 1.5
    """Most that its p99 may be of the old version's."""
    disagreement: float = 0.05
    """Most requests to which it may give another best class."""
    compared: int = 100
    """Promote only after so many requests were compared."""


@dataclass(frozen=True)
class Answer:
    """What one version made of one request, or why there is nothing."""

    rows: Sequence[Prediction]
    """Of each image."""
    latency_ms: float
    error: str = ""

    @property
    def labels(self) -> list[str]:
        """The best class of each image."""
        return [next(iter(row), "") for row in self.rows]


@dataclass(frozen=True)
class Figures:
    """One version's answers; times in milliseconds are None where it gave none."""

    requests: int
    errors: int
    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Figures:
        latencies_ms = sorted(answer.latency_ms for answer in answers if not answer.error)
        errors = len(answers) - len(latencies_ms)
        return cls(len(answers), errors, quantile(latencies_ms, 0.5), quantile(latencies_ms, 0.99))


@dataclass
class Comparison:
    """The requests that both versions were asked, so far."""

    planned: int
    pairs: list[tuple[Answer, Answer]] = field(default_factory=list)
    excess: int = 0
    """Errors of the new version, less those of the old one."""
    disagreements: int = 0
    largest_difference: float = 0.0
    """Between two probabilities of one class, in 0..1."""

    def add(self, old: Answer, new: Answer) -> None:
        self.pairs.append((old, new))
        self.excess += bool(new.error) - bool(old.error)
        self.disagreements += not old.error and not new.error and old.labels != new.labels
        for old_row, new_row in zip(old.rows, new.rows, strict=False):
            differences = (abs(old_row[label] - new_row[label]) for label in old_row.keys() & new_row.keys())
            self.largest_difference = max(self.largest_difference, *differences, 0.0)

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
        if old.requests - old.errors < limits.compared:
            reasons.append(f"only {old.requests - old.errors} requests to compare, {limits.compared} are evidence")
        if self.excess > limits.errors * new.requests:
            first = next(answer.error for _, answer in self.pairs if answer.error)
            reasons.append(f"{new.errors} errors against {old.errors} in {new.requests} requests ({first})")
        if self.disagreements > limits.disagreement * answered:
            share, allowed = 100 * self.disagreements / answered, 100 * limits.disagreement
            reasons.append(f"another class for {share:.1f} % of the requests, {allowed:g} % are allowed")
        if old.p99_ms is not None and new.p99_ms is not None:
            allowed_ms = max(limits.p99_ratio * old.p99_ms, old.p99_ms + P99_SLACK_MS)
            if new.p99_ms > allowed_ms:
                reasons.append(f"p99 {new.p99_ms:.1f} ms against {old.p99_ms:.1f}, {allowed_ms:.1f} are allowed")
        return reasons

    def is_lost(self, limits: Limits) -> bool:
        """Whether errors or other classes are too many already, even if all requests to come are answered alike."""
        return self.excess > limits.errors * self.planned or self.disagreements > limits.disagreement * self.planned
