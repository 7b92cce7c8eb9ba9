"""Archives that are broken on purpose: a good one unpacked, changed, and packed again so that its digests agree."""

from __future__ import annotations

import json
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


def appended(content: Path, name: str, code: str) -> None:
    """Code at the end of one module: it replaces what is defined above it, however that is written."""
    with (content / name).open("a", encoding="utf-8") as module:
        module.write(f"\n{code}\n")


def spoil_golden_answers(content: Path) -> None:
    """Give every golden image the probabilities of other classes: no worker answers so."""
    file = content / "golden" / "golden.json"
    document = json.loads(file.read_text())
    document["probabilities"] = {name: row[::-1] for name, row in document["probabilities"].items()}
    file.write_text(json.dumps(document))
