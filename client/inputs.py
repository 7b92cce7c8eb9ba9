"""Which images a command is to send: files, folders, patterns, and `-` for the one on standard input."""

from __future__ import annotations

import errno
import glob
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.errors import NoImages
from system import image_files

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Source:
    """One image that is still to be read."""

    name: str
    """The path as it was given or found, or `-`."""

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: it cannot be read.
        """
        if self.name == STANDARD_INPUT:
            return sys.stdin.buffer.read()
        # Neither opening nor reading a pipe waits for who writes to it.
        descriptor = os.open(self.name, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a file that can be read as a whole; - takes an image from a pipe")
            return file.read()


def expand(paths: Sequence[str]) -> list[Source]:
    """Every image that `paths` name, each once, in their order; a folder's and a pattern's in the order of names.

    Folders are searched to any depth for images (`system.image_files`), and a line on stderr says what is left out. A
    single file is taken whatever its name, and one that does not exist is an error when it is read.

    Raises:
        NoImages: a folder or a pattern holds none.
    """
    return [Source(name) for name in dict.fromkeys(name for path in paths for name in _expand(path))]


def _expand(path: str) -> Iterator[str]:
    if path != STANDARD_INPUT and Path(path).is_dir():
        yield from _images_below(path)
    elif path == STANDARD_INPUT or not glob.has_magic(path) or Path(path).exists():
        yield path
    else:
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
        if not found:
            raise NoImages(f"{path}: no file matches")
        for name in found:
            yield from _images_below(name) if Path(name).is_dir() else [name]


def _images_below(folder: str) -> list[str]:
    return [str(file) for file in image_files.images_below(Path(folder), NoImages)]
