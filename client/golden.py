"""Golden images: held-out images with the probabilities that training measured, which a good server still answers.

The folder is `runs/NAME/golden`, or `golden/` in an archive: image files, and `golden.json` with tolerance, class names
and probabilities.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.errors import NotAsMeasured
from client.torchserve import Prediction

_FILE = "golden.json"


@dataclass(frozen=True)
class GoldenImage:
    """One encoded image and what it must be answered with."""

    name: str
    data: bytes
    expected: Prediction
    """The probability of every class."""
    tolerance: float
    """Largest difference of a probability that passes."""

    def check(self, answer: Prediction) -> None:
        """Compare an answer, which may hold the best classes alone.

        Raises:
            NotAsMeasured: naming image, class and both probabilities.
        """
        for label, probability in answer.items():
            measured = self.expected.get(label)
            if measured is None:
                raise NotAsMeasured(f"{self.name} is answered with the class {label!r}, which training did not know")
            if not abs(probability - measured) <= self.tolerance:  # also true for NaN
                raise NotAsMeasured(self._difference(label, probability))
        best = max(self.expected, key=self.expected.__getitem__)
        answered = max((self.expected[label] for label in answer), default=0.0)
        if self.expected[best] - answered > 2 * self.tolerance:
            raise NotAsMeasured(f"{self.name}: the answer lacks {best!r}, which has {self.expected[best]:.4f}")

    def _difference(self, label: str, probability: float) -> str:
        return (
            f"{self.name}, class {label!r}: {probability:.6f} instead of {self.expected[label]:.6f}, tolerance "
            f"{self.tolerance:g} (workers that serve in lower precision need a larger one: --tolerance)"
        )


def read(place: Path, tolerance: float | None = None) -> list[GoldenImage]:
    """The golden images of a folder, or of an archive.

    Args:
        place: `golden/` of the run, or FILE.mar.
        tolerance: instead of the one that training wrote down.

    Raises:
        NotAsMeasured: it cannot be read or holds none.
    """
    try:
        with _folder(place) as folder:
            document = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            names = document["class_names"]
            allowed = float(document["tolerance"]) if tolerance is None else tolerance
            images = [
                GoldenImage(name, (folder / name).read_bytes(), dict(zip(names, row, strict=True)), allowed)
                for name, row in document["probabilities"].items()
            ]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotAsMeasured(
            f"{_FILE} in {place} cannot be read as golden answers ({error}): name the folder golden/ of the run, or an "
            "archive"
        ) from None
    if not images:
        raise NotAsMeasured(f"{_FILE} in {place} lists no image")
    return images


@contextmanager
def _folder(place: Path) -> Iterator[Path | zipfile.Path]:
    if not place.is_file():
        yield place
        return
    with zipfile.ZipFile(place) as archive:
        yield zipfile.Path(archive, "golden/")
