"""Which files of a folder are images: one rule for training, the client and scoring.

The suffix decides, in any case; of a file without one, its first bytes. Hidden files are not looked at, nor are folders
that are hidden or that a system made (`@eaDir`, `__MACOSX`). Links to folders are followed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from system.errors import KnownError
from system.printable import printable

SUFFIXES = frozenset(
    (
        ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg",
        ".png", ".tif", ".tiff", ".webp",
    )
)  # fmt: skip
LOOKED_FOR = ", ".join(sorted(SUFFIXES))
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_MOST_SUFFIXES = 5
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "#recycle", "$recycle.bin", "__macosx", "__pycache__", "lost+found", "system volume information")
)
_BESIDE = {"golden.json"}
"""The answers to golden images, which nobody takes for one."""


@dataclass(frozen=True)
class Found:
    """The files below a folder, in the order of their paths."""

    images: list[Path]
    left_out: list[Path]

    @property
    def note(self) -> str:
        """`left out 3 files that are no images: .txt (2), .pdf (1)`, or nothing."""
        if not self.left_out:
            return ""
        counts = Counter(map(_kind, self.left_out)).most_common()
        shown = [f"{suffix} ({count})" for suffix, count in counts[:_MOST_SUFFIXES]]
        files = "file that is no image" if len(self.left_out) == 1 else "files that are no images"
        return f"left out {len(self.left_out)} {files}: {', '.join(shown + ['...'] * (len(counts) > _MOST_SUFFIXES))}"


def _kind(file: Path) -> str:
    if file.is_symlink() and not file.exists():
        return "links to nowhere"
    return file.suffix.lower() or "without a suffix"


def _stop(error: OSError) -> None:
    raise error


def below(folder: Path) -> Found:
    """Every file below `folder`, to any depth.

    Raises:
        OSError: a folder cannot be looked into.
    """
    files: list[Path] = []
    entered = {_identity(folder)}
    for parent, folders, names in os.walk(folder, onerror=_stop, followlinks=True):
        folders[:] = [name for name in folders if _is_looked_into(name) and _enter(Path(parent, name), entered)]
        files += [Path(parent, name) for name in names if not name.startswith(".") and name not in _BESIDE]
    images = sorted(file for file in files if is_image(file))
    return Found(images, sorted(set(files) - set(images)))


def images_below(folder: Path, refusal: type[KnownError]) -> list[Path]:
    """Every image below `folder`, to any depth; a line on stderr says what else is there.

    Raises:
        KnownError: of the kind `refusal`, there is no folder, or no image in it.
    """
    if not folder.is_dir():
        raise refusal(f"no folder {printable(folder)}")
    found = below(folder)
    if not found.images:
        raise refusal(f"{folder}: no image in this folder; looked for {LOOKED_FOR}")
    if found.note:
        print(printable(f"{folder}: {found.note}"), file=sys.stderr)
    return found.images


def folders(folder: Path) -> list[Path]:
    """The folders right in `folder` that `below` looks into, in the order of their names; a link up is none."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir()
        and _is_looked_into(path.name)
        and not (path.is_symlink() and folder.resolve().is_relative_to(path.resolve()))
    )


def _is_looked_into(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _SYSTEM_FOLDERS


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _enter(folder: Path, entered: set[tuple[int, int]]) -> bool:
    """Whether `folder` is new: a link may lead back to where the walk has been."""
    try:
        identity = _identity(folder)
    except OSError:
        return False
    new = identity not in entered
    entered.add(identity)
    return new


def is_image(file: Path) -> bool:
    """Whether a file of a folder is taken; a pipe or another thing that is no file is not."""
    if not file.is_file():
        return False
    return file.suffix.lower() in SUFFIXES or (not file.suffix and _begins_as_one(file))


def _begins_as_one(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
    except OSError:
        return False
    return start.startswith(_SIGNATURES) or (start[:4], start[8:]) == (b"RIFF", b"WEBP") or start[4:8] == b"ftyp"
