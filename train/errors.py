"""What can be wrong before or during training, each with a message that says where and what to do.

TrainingError
├── RecipeError        a recipe that does not exist, or a key or value in it that cannot be used
├── DataError          images or labels that cannot be trained on
├── ModelError         a network or weights that cannot be had
├── RunFolderError     a run folder that is in the way, unfinished or incomplete
├── ExportError        the exported model does not answer as the trained one
└── QuantisationError  a run folder that cannot be quantised
    └── NotQuantisable a network that cannot be made int8
"""


class TrainingError(Exception):
    """The base: `python -m train` prints its message in one line and exits 1."""


class RecipeError(TrainingError):
    pass


class DataError(TrainingError):
    pass


class ModelError(TrainingError):
    pass


class RunFolderError(TrainingError):
    pass


class ExportError(TrainingError):
    pass


class QuantisationError(TrainingError):
    pass


class NotQuantisable(QuantisationError):
    pass


def reason(error: Exception) -> str:
    """What another library raised, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
