"""Why an archive was not made.

ArchiveError
├── IncompleteRun   the run folder lacks files
├── InvalidName     TorchServe could not serve or manage a model of that name or version
└── BuildError      torch-model-archiver failed
"""


class ArchiveError(Exception):
    """The base: `python -m archive` prints its message in one line and exits 1."""


class IncompleteRun(ArchiveError):
    pass


class InvalidName(ArchiveError):
    pass


class BuildError(ArchiveError):
    pass
