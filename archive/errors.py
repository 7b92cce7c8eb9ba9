"""Why an archive was not made, or may not be trusted.

ArchiveError
├── IncompleteRun    the run folder lacks files, or one of them cannot be read
├── InvalidName      TorchServe could not serve or manage a model of that name or version
├── BuildError       torch-model-archiver failed
├── ExportRefused    a form for another runtime cannot be had, answers otherwise, or would replace what no export wrote
├── ScoringRefused   images cannot be scored: no Ray, no image, or a folder with another archive's answers
├── CannotLoad       a worker could not load the archive, or answered the golden images otherwise than training
├── BelowFloor       it was measured to be worse than its recipe allows
├── VersionTaken     the model store holds that version with other content, or a higher one
├── InvalidArchive   the archive is not as it was built
└── SignatureError   the signature is missing or wrong, or a key cannot be used
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archive.gate import Check


class ArchiveError(Exception):
    """The base: `python -m archive` prints its message in one line and exits 1."""


class IncompleteRun(ArchiveError):
    pass


class InvalidName(ArchiveError):
    pass


class BuildError(ArchiveError):
    pass


class ExportRefused(ArchiveError):
    pass


class ScoringRefused(ArchiveError):
    pass


class CannotLoad(ArchiveError):
    pass


class BelowFloor(ArchiveError):
    """Carries every check, passed or not, to be shown beside the message."""

    def __init__(self, message: str, checks: Sequence[Check]) -> None:
        super().__init__(message)
        self.checks = checks


class VersionTaken(ArchiveError):
    pass


class InvalidArchive(ArchiveError):
    pass


class SignatureError(ArchiveError):
    pass


def reason(error: Exception) -> str:
    """What another library raised, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
