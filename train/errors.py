"""What can be wrong before or during training, each with a message that says where and what to do.

TrainingError
├── RecipeError        a recipe that does not exist, or a key or value in it that cannot be used
├── RunFolderError     a run folder that is in the way, unfinished or incomplete
├── OutOfTime          what would end after the time that it was given
└── QuantisationError  a run folder that cannot be quantised
    └── NotQuantisable a network that cannot be made int8
"""

from __future__ import annotations

from system.errors import KnownError


class TrainingError(KnownError):
    """The base: `python -m train` prints its message in one line and exits 1."""


class RecipeError(TrainingError):
    pass


class RunFolderError(TrainingError):
    pass


class OutOfTime(TrainingError):
    pass


class QuantisationError(TrainingError):
    pass


class NotQuantisable(QuantisationError):
    pass
