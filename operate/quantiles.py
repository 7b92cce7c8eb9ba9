"""Quantiles that are one of the values, and no mean of two."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of them do not exceed; None where there are no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
