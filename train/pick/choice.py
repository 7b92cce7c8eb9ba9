"""What was measured of each model that was tried, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from rich.table import Table
from scipy.stats import binomtest

from system.figures import shown_interval, wilson
from system.printable import printable

_CHANCE = 0.05
"""A difference that chance alone makes more often does not replace the simpler model."""


@dataclass(frozen=True)
class Unseen:
    """Answers for images that the model was not trained on."""

    right: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    @property
    def interval(self) -> dict[str, float]:
        """Wilson's of 95 %."""
        return wilson(self.right, self.images)

    def __str__(self) -> str:
        interval = shown_interval(self.interval)
        return f"{self.accuracy:.1%} of {self.images} images ({interval})"


@dataclass(frozen=True)
class Speed:
    """A network in the form that a worker on this machine serves."""

    p99_ms: float
    """Of one image: decoding and the network."""
    images_per_s: float
    """Of one worker, in batches of four: the best of some rounds, so that it tells networks apart on a busy machine."""
    variant: str
    """The form, such as `bf16`."""
    size_mb: float


@dataclass(frozen=True)
class Tried:
    """A model that was trained and measured; the held-out images had no part in it."""

    network: str
    trained: str
    """`probe` or `fine-tuned`."""
    speed: Speed
    """A property of the network, whatever its weights."""
    marks: tuple[bool, ...]
    """Of each validation image, whether it got its class."""
    out_of_fold: Unseen | None
    """Of a probe, validation and training images alike, those by heads that were fitted without them."""
    seconds: float

    @property
    def validation(self) -> Unseen:
        return Unseen(sum(self.marks), len(self.marks))

    @property
    def unseen(self) -> Unseen:
        """The more images of the two."""
        return self.out_of_fold or self.validation

    def as_dict(self) -> dict[str, Any]:
        accuracy = {"accuracy": self.unseen.accuracy, "interval": self.unseen.interval}
        fields = {name: value for name, value in asdict(self).items() if name != "marks"}
        return {**fields, "validation": asdict(self.validation), **accuracy}

    def __str__(self) -> str:
        speed = self.speed
        return (
            f"{self.network}, {self.trained}: {self.unseen}, p99 {speed.p99_ms:.1f} ms, {speed.images_per_s:.0f} "
            f"images/s as {speed.variant}, {speed.size_mb:.1f} MB; took {self.seconds:.0f} s"
        )


def within(tried: Sequence[Tried], of: Callable[[Tried], Unseen]) -> list[Tried]:
    """Those whose accuracy lies within the interval of the most accurate one: chance alone may part them."""
    least = max((of(model) for model in tried), key=lambda unseen: unseen.accuracy).interval["lower"]
    return [model for model in tried if of(model).accuracy >= least]


def fastest(tried: Sequence[Tried], of: Callable[[Tried], Unseen]) -> Tried:
    """The fastest of those within the interval; of one network, the more accurate, and the simpler where both are."""
    found = within(tried, of)
    return min(found, key=lambda model: (-model.speed.images_per_s, -of(model).right, model.trained != "probe"))


@dataclass(frozen=True)
class Paired:
    """A fine-tuned model beside the probe of its network, on the same validation images."""

    gained: int
    """Images that it alone has right."""
    lost: int
    """Images that the probe alone has right."""
    images: int

    @classmethod
    def of(cls, tuned: Tried, probe: Tried) -> Self:
        pairs = list(zip(tuned.marks, probe.marks, strict=True))
        return cls(pairs.count((True, False)), pairs.count((False, True)), len(pairs))

    @property
    def by_chance(self) -> float:
        """How often equally good models would differ so far in favour of one: McNemar's exact test, one-sided."""
        differing = self.gained + self.lost
        return float(binomtest(self.gained, differing, alternative="greater").pvalue) if differing else 1.0

    @property
    def is_better(self) -> bool:
        return self.by_chance < _CHANCE

    def __str__(self) -> str:
        verdict = "more than chance" if self.is_better else "which may be chance"
        return (
            f"fine-tuning corrected {self.gained} of the probe's mistakes and made {self.lost} new ones on "
            f"{self.images} validation images, {verdict} (p = {self.by_chance:.2g})"
        )


def table(tried: Sequence[Tried], bound_ms: float | None, chosen: Tried | None) -> Table:
    """Every model that was tried, the most accurate first, for people.

    `no better`: fine-tuned, and not better than its probe by more than chance.
    """
    shown = Table(
        "network", "how", "accuracy", "95%", "of", "p99 ms", "img/s", "MB", "",
        box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0),
    )  # fmt: skip
    shown.columns[0].overflow = "fold"
    probes = {model.network: model for model in tried if model.trained == "probe"}
    for column in shown.columns[2:-1]:
        column.justify = "right"
    for model in sorted(tried, key=lambda model: -model.unseen.accuracy):
        unseen, speed = model.unseen, model.speed
        verdict = ""
        if model is chosen:
            verdict = "chosen"
        elif bound_ms is not None and speed.p99_ms > bound_ms:
            verdict = "too slow"
        elif model.trained != "probe" and not Paired.of(model, probes[model.network]).is_better:
            verdict = "no better"
        shown.add_row(
            printable(model.network.removeprefix("timm/")),
            "probe" if model.trained == "probe" else "tuned",
            f"{unseen.accuracy:.1%}",
            shown_interval(unseen.interval).removeprefix("95% interval "),
            str(unseen.images),
            f"{speed.p99_ms:.1f}",
            f"{speed.images_per_s:.0f}",
            f"{speed.size_mb:.0f}",
            verdict,
        )
    return shown
