"""What a terminal may show: names that strangers chose (files, classes, models), and counts of things."""

from __future__ import annotations

import unicodedata

from rich.markup import escape

_JOINERS = "\u200c\u200d"
"""Scripts and emoji need them."""


def printable(text: object) -> str:
    """The text in one line: what steers a terminal, breaks a line or is no character stands as its escape, `\\x1b`."""
    return "".join(map(_shown, str(text)))


def escaped(text: object) -> str:
    """The same for Rich's console, which takes `[...]` for markup."""
    return escape(printable(text))


def counted(count: int, noun: str) -> str:
    """`1 image`, `1,440 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()
