"""What can be wrong with images and labels, in a message that says where and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from system.errors import KnownError

_SHOWN = 5


class DataError(KnownError):
    """They cannot be trained on."""


def first_few(lines: Sequence[str]) -> str:
    """The first of them in one line."""
    return "; ".join(lines[:_SHOWN]) + ("; ..." if len(lines) > _SHOWN else "")
