"""The root of every room's tree of errors."""

from __future__ import annotations


class KnownError(Exception):
    """Something that is expected to go wrong; its message says what, where and what to do.

    A command prints it in one line and exits 1 (`system.command_line`).
    """


def reason(error: Exception) -> str:
    """What another library raised, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
