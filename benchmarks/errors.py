"""Why something could not be measured.

BenchmarkError
├── SetupError     an environment, a model or an archive could not be made
├── StartFailed    a server gave no right answer in time
└── ReportError    there is nothing to report, or no place to write it to
"""

from __future__ import annotations

from system.errors import KnownError


class BenchmarkError(KnownError):
    """The base: `python -m benchmarks.serving` prints its message in one line and exits 1."""


class SetupError(BenchmarkError):
    pass


class StartFailed(BenchmarkError):
    pass


class ReportError(BenchmarkError):
    pass
