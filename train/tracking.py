"""Where the curves of a training go: TensorBoard in the run folder, and MLflow or Weights & Biases beside it.

Each is a logger of Fabric's interface. Fabric itself has TensorBoard's; those of MLflow and Weights & Biases are of
pytorch-lightning. Where they write follows from their own variables: `MLFLOW_TRACKING_URI`, `WANDB_MODE` and the like.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from rich.console import Console

from archive.run_folder import RunFolder
from system.errors import reason
from train.errors import TrainingError

_PACKAGES = {"mlflow": ("mlflow-skinny", "pytorch-lightning"), "wandb": ("wandb", "pytorch-lightning")}


class Tracker:
    """What a training tells its loggers; one that fails on the way is left out with a line, and training goes on."""

    def __init__(self, loggers: Mapping[str, Logger] | None = None, console: Console | None = None) -> None:
        self._loggers = dict(loggers or {})
        self._console = console or Console(quiet=True)

    def log(self, figures: Mapping[str, float | None], step: int, *, is_new: bool = True) -> None:
        """Log the figures that there are at an epoch; of a resumed run TensorBoard's files have the earlier ones."""
        known = {name: value for name, value in figures.items() if value is not None}
        for name, logger in list(self._loggers.items()):
            if name == "tensorboard" and not is_new:
                continue
            try:
                logger.log_metrics(known, step)
            except Exception as error:  # a server's client raises what it likes
                del self._loggers[name]
                self._console.print(f"training.loggers: {name} is left out from epoch {step} on ({reason(error)})")

    def close(self, status: str) -> None:
        """End what was begun, as a `success` or `failed`."""
        for name, logger in self._loggers.items():
            try:
                logger.finalize(status)
                if name == "wandb":
                    getattr(logger, "experiment").finish(exit_code=0 if status == "success" else 1)  # noqa: B009
            except Exception as error:
                self._console.print(f"training.loggers: {name} was not closed ({reason(error)})")


@contextmanager
def opened(
    names: Sequence[str], folder: RunFolder, run: str, recipe: str, parameters: Mapping[str, Any], console: Console
) -> Iterator[Tracker]:
    """The loggers of a training while the block runs.

    Args:
        names: as `training.loggers` has them.
        run, recipe: the names of both, which are those of MLflow's run and experiment, of W&B's run and project.
        parameters: what is logged of the recipe.

    Raises:
        TrainingError: a package is not installed, or what it writes to cannot be reached.
    """
    loggers: dict[str, Logger] = {}
    for name in dict.fromkeys(names):
        try:
            loggers[name] = _logger(name, folder, run, recipe)
            if name != "tensorboard":
                loggers[name].log_hyperparams(dict(parameters))  # reaches the server now rather than after an epoch
        except ModuleNotFoundError:
            packages = " ".join(_PACKAGES[name])
            raise TrainingError(f"training.loggers: {name} takes other packages: pip install {packages}") from None
        except Exception as error:
            raise TrainingError(f"training.loggers: {name} cannot be written to ({reason(error)})") from None
    tracker, status = Tracker(loggers, console), "failed"
    try:
        yield tracker
        status = "success"
    finally:
        tracker.close(status)


def _logger(name: str, folder: RunFolder, run: str, recipe: str) -> Logger:
    if name == "tensorboard":
        return TensorBoardLogger(folder.path, name="", version=folder.tensorboard.name)
    if name == "mlflow":
        import mlflow  # noqa: F401 - pytorch-lightning's own error for want of it is no ModuleNotFoundError
        from pytorch_lightning.loggers import MLFlowLogger

        experiment, place = os.environ.get("MLFLOW_EXPERIMENT_NAME", recipe), os.environ.get("MLFLOW_TRACKING_URI")
        of_mlflow: Logger = MLFlowLogger(experiment, run_name=run, tracking_uri=place)
        return of_mlflow
    import wandb  # noqa: F401
    from pytorch_lightning.loggers import WandbLogger

    project, folder_of_wandb = os.environ.get("WANDB_PROJECT", recipe), os.environ.get("WANDB_DIR", ".")
    of_wandb: Logger = WandbLogger(run, project=project, save_dir=folder_of_wandb)
    return of_wandb
