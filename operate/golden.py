"""Golden images: held-out images with the probabilities that training measured, which a good server still answers.

The folder is `runs/NAME/golden`, or `golden/` in an archive: image files, and `golden.json` with tolerance, class names
and probabilities.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from archive.content import ArchiveContent
from archive.errors import InvalidArchive
from client.torchserve import Prediction
from handler import golden
from operate.errors import NotAsMeasured

_PROMOTION_S = 0.5
"""A promotion makes the new version the default a moment before its archive takes the old one's place."""


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
            measured = golden.read(folder)
            allowed = measured.tolerance if tolerance is None else tolerance
            return [
                GoldenImage(
                    name, golden.image(folder, name), dict(zip(measured.class_names, row, strict=True)), allowed
                )
                for name, row in measured.probabilities.items()
            ]
    except (InvalidArchive, OSError, KeyError, zipfile.BadZipFile, golden.GoldenMismatch) as error:
        raise NotAsMeasured(
            f"{golden.GOLDEN_FILE} in {place} cannot be read as golden answers ({error}): name the folder golden/ of "
            "the run, or an archive"
        ) from None


class GoldenFile:
    """The golden images of a folder or an archive, read anew when their file changes, as a promotion makes it.

    Args:
        place, tolerance: as `read` takes them.

    Raises:
        NotAsMeasured: there are none.
    """

    def __init__(self, place: Path, tolerance: float | None = None) -> None:
        self.place = place
        self.images: Sequence[GoldenImage] = ()
        self._tolerance = tolerance
        self._stamp: tuple[int, ...] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read them where the file has changed.

        Raises:
            NotAsMeasured: it cannot be read; the images from before stay.
        """
        stamp = self._look()
        if stamp is None or stamp != self._stamp:
            self.images = read(self.place, self._tolerance)
            self._stamp = stamp

    def after(self, images: Sequence[GoldenImage]) -> Sequence[GoldenImage]:
        """The images that the file has by now, to be asked for when a server is wrong about `images`."""
        if self.images is images:
            time.sleep(_PROMOTION_S)
            with suppress(NotAsMeasured):
                self.refresh()
        return self.images

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = (self.place / golden.GOLDEN_FILE if self.place.is_dir() else self.place).stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _folder(place: Path) -> Iterator[Path | zipfile.Path]:
    if not place.is_file():
        yield place
        return
    with ArchiveContent(place).golden() as folder:
        yield folder
