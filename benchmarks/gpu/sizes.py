"""How much is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of one run of the command."""

    batches: Sequence[int]
    precisions: Sequence[str]
    side: int
    """Of the square that the networks take, in pixels."""
    photographs: Mapping[str, tuple[int, int]]
    """What they are called → width and height."""
    images: int
    """Photographs that are decoded at a time."""
    handled: Sequence[int]
    """Requests of a batch through the handler."""
    rounds: int
    round_s: float
    """Of each side."""


FULL = Sizes(
    batches=(1, 8, 32, 128, 256),
    precisions=("fp32", "fp16", "bf16"),
    side=224,
    photographs={"500 px": (500, 375), "12 MP": (4000, 3000)},
    images=32,
    handled=(1, 8, 32),
    rounds=5,
    round_s=0.1,
)
DRY = Sizes((2,), ("fp32",), 64, {"tiny": (64, 48)}, 2, (1, 2), 1, 0.0)
