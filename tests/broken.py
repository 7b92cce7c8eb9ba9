"""Archives that are broken on purpose: a good one unpacked, changed, and packed again so that its digests agree."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from archive.pack import pack


def repacked(good: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """An archive of the same name in `folder` with whatever `change` did to its unpacked content."""
    content = folder / "content"
    with zipfile.ZipFile(good) as archive:
        archive.extractall(content)
    change(content)
    pack(content, folder / good.name)
    return folder / good.name


def replaced(content: Path, name: str, old: str, new: str) -> None:
    """Replace text in one member; it must have been there."""
    text = (content / name).read_text(encoding="utf-8")
    assert old in text
    (content / name).write_text(text.replace(old, new), encoding="utf-8")
