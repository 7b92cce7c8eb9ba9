"""A lock that one process has at a time; the kernel releases it when the process ends, however that happens."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, refusal: Exception | None = None) -> Iterator[None]:
    """Have the lock of a folder, or of a file, which is made where it is missing and stays.

    Args:
        refusal: raised if another process has it; without one, wait until that process releases it.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if refusal is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert refusal is not None
            raise refusal from None
        yield
    finally:
        os.close(descriptor)


def is_held(file: Path) -> bool:
    """Whether a process has the lock of a file."""
    try:
        with held(file, BlockingIOError()):
            return False
    except BlockingIOError:
        return True
