"""Why an archive was not made, or may not be trusted.

ArchiveError
├── IncompleteRun    the run folder lacks files, or one of them cannot be read
├── InvalidName      TorchServe could not serve or manage a model of that name or version
├── InvalidLabels    names that classes cannot have, or too many or few of them
├── BuildError       torch-model-archiver failed
├── ScoringRefused   images cannot be scored: no Ray, no image, or a folder with another archive's answers
├── CannotLoad       a worker could not load the archive, or answered the golden images otherwise than training
├── ThresholdNotMet  a threshold of its recipe's gate is not met
├── VersionTaken     the model store holds that version with other content, or a higher one
├── UnsafeFile       a model file of a run folder could run code or reach other files
├── InvalidArchive   the archive is not as it was built
└── SignatureError   the signature is missing or wrong, or a key cannot be used
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from system.errors import KnownError

if TYPE_CHECKING:
    from rich.table import Table


class ArchiveError(KnownError):
    """The base: `python -m archive` prints its message in one line and exits 1."""


class IncompleteRun(ArchiveError):
    pass


class InvalidName(ArchiveError):
    pass


class InvalidLabels(ArchiveError):
    pass


class BuildError(ArchiveError):
    pass


class ScoringRefused(ArchiveError):
    pass


class CannotLoad(ArchiveError):
    pass


class ThresholdNotMet(ArchiveError):
    """Carries the table of every check, passed or not, to be shown beside the message."""

    def __init__(self, message: str, table: Table) -> None:
        super().__init__(message)
        self.table = table


class VersionTaken(ArchiveError):
    pass


class UnsafeFile(ArchiveError):
    pass


class InvalidArchive(ArchiveError):
    @classmethod
    def of(cls, archive: Path, problem: str) -> InvalidArchive:
        """What is wrong in which archive, and what to do about it."""
        return cls(f"{archive}: {problem}. Do not serve it: build or fetch it again")

    @classmethod
    def unreadable(cls, archive: Path, error: Exception) -> InvalidArchive:
        """What zipfile raised."""
        damaged = str(error).startswith("Bad CRC-32")
        return cls.of(archive, f"it {'was changed or damaged' if damaged else 'cannot be read as a ZIP file'}: {error}")


class SignatureError(ArchiveError):
    pass
