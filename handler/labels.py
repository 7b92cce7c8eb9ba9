"""`index_to_name.json`, TorchServe's convention for class names: `{"0": NAME, "1": NAME, ...}`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from handler.files import LABELS_FILE


def mapping(class_names: Sequence[str]) -> dict[str, str]:
    """What the file holds, from the names in the order of the model's outputs."""
    return {str(index): name for index, name in enumerate(class_names)}


def read(file: Path) -> list[str]:
    """The names that `file` holds, in the order of the model's outputs.

    Raises:
        OSError, ValueError: it cannot be read, or as `class_names`.
    """
    return class_names(json.loads(file.read_text(encoding="utf-8")) if file.exists() else None)


def class_names(mapping: Mapping[str, str] | None) -> list[str]:
    """The names in the order of the model's outputs.

    Raises:
        ValueError: there are none, an index is missing, or two classes share a name.
    """
    if not mapping:
        raise ValueError(f"{LABELS_FILE} is missing or empty: the archive has no labels")
    if set(mapping) != {str(index) for index in range(len(mapping))}:
        raise ValueError(f"{LABELS_FILE} must number its classes 0..{len(mapping) - 1}, found {sorted(mapping)}")
    names = [mapping[str(index)] for index in range(len(mapping))]
    if alike := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{LABELS_FILE} names two classes alike: {alike}: give each a name of its own")
    return names
