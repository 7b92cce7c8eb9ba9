"""A model's golden images as an edge has them: read anew when their file changes, as a promotion makes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from client import golden
from client.golden import GoldenImage


class GoldenFile:
    """The golden images of a folder or an archive.

    Args:
        place: as `client.golden.read` takes it.
        tolerance: instead of the one that training wrote down.

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
            self.images = golden.read(self.place, self._tolerance)
            self._stamp = stamp

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = (self.place / "golden.json" if self.place.is_dir() else self.place).stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns
