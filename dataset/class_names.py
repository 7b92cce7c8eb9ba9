"""Names of classes, as folders or a table have them: their order, and what is said of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from dataset.errors import DataError
from system.printable import printable


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key under which `class 10` comes after `class 9`."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name) if part]


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in natural order."""
    return sorted(set(names), key=natural)


def check(names: Iterable[str], where: str, fix: str) -> None:
    """Raises:
    DataError: a server could not answer with one of them; `where` names the folder or table, `fix` says what to do.
    """
    for name in names:
        if printable(name) != name:
            raise DataError(
                f"{where}: a class's name must be text in one line, as a server answers with it, and "
                f"'{printable(name)}' is not: {fix}"
            )


def alike(names: Sequence[str]) -> list[str]:
    """A line where names differ in case, spaces, hyphens or the form of their Unicode alone."""
    same: dict[str, list[str]] = {}
    for name in names:
        plain = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()
        same.setdefault(plain, []).append(name)
    groups = [" and ".join(map(repr, map(printable, group))) for group in same.values() if len(group) > 1]
    if not groups:
        return []
    return [
        f"read as classes of their own: {'; '.join(groups)}, which differ in case, spaces or Unicode form alone; if "
        "they are one class, give them one name"
    ]
