"""A lock that one process has at a time; the kernel releases it when the process ends, however that happens."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(file: Path, refusal: Exception) -> Iterator[None]:
    """Have the lock of a file, which is made where it is missing and stays.

    Raises:
        Exception: `refusal`, if another process has it.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
