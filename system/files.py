"""Files that are written under a temporary name and moved into place, so that no reader meets half of one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A hidden path beside `target` to write to; it becomes `target` if the block ends well, else it is removed."""
    arriving = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield arriving
        arriving.replace(target)
    finally:
        arriving.unlink(missing_ok=True)


def write(target: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a whole file; text is encoded as UTF-8.

    Args:
        mode: its permissions, less what the umask takes away.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(target) as arriving:
        arriving.unlink(missing_ok=True)
        with os.fdopen(os.open(arriving, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)


_NUMBER = r"(?:-?[\d.eE+-]+|null)"
# A string holds no newline of its own, so that this finds lists alone.
_NUMBERS = re.compile(rf"\[\n\s+({_NUMBER}(?:,\n\s+{_NUMBER})*)\n\s*\]")


def as_json(document: object) -> str:
    """Indented JSON with a final newline; numbers in a list share a line.

    The confusion matrix of 1,000 classes then has 3 MB instead of 7.
    """
    indented = json.dumps(document, indent=1)
    return _NUMBERS.sub(lambda found: f"[{', '.join(found[1].replace(',', ' ').split())}]", indented) + "\n"


def write_json(target: Path, document: object, mode: int = 0o666) -> None:
    """Write a document as `as_json` has it."""
    write(target, as_json(document), mode)
