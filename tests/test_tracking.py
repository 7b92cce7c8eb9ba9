"""Loggers of a training: what they are told, and that none of them can end it."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric.loggers.logger import Logger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from archive.run_folder import RunFolder
from train import tracking
from train.errors import TrainingError
from train.tracking import Tracker

QUIET = Console(quiet=True)
needs_mlflow = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("mlflow", "pytorch_lightning")),
    reason="the packages mlflow-skinny and pytorch-lightning are not installed",
)


class Kept(Logger):
    """Keeps what it is told; one that fails raises at its second step."""

    name = version = root_dir = None

    def __init__(self, fails: bool = False) -> None:
        self.told: list[tuple[Mapping[str, float], int | None]] = []
        self.fails, self.status = fails, ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.fails and self.told:
            raise ConnectionError("the server is gone")
        self.told.append((metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.status = status


def test_a_logger_that_fails_is_left_out_with_a_line() -> None:
    """The other one is told everything that is known, and both begin with the epochs of a resumed run."""
    well, badly, printed = Kept(), Kept(fails=True), io.StringIO()
    tracker = Tracker({"mlflow": badly, "wandb2": well}, Console(file=printed, width=200))
    for epoch in (1, 2, 3):
        tracker.log({"loss": 1 / epoch, "val_loss": None}, epoch, is_new=epoch > 1)
    assert [step for _, step in well.told] == [1, 2, 3]
    assert well.told[0][0] == {"loss": 1.0}
    assert len(badly.told) == 1
    assert printed.getvalue().count("\n") == 1
    assert "mlflow is left out from epoch 2 on (ConnectionError: the server is gone)" in printed.getvalue()


def test_tensorboard_is_not_told_twice_and_lies_in_the_run_folder(tmp_path: Path) -> None:
    """Earlier epochs of a resumed run are in its files already."""
    with tracking.opened(["tensorboard"], RunFolder(tmp_path), "run", "recipe", {}, QUIET) as tracker:
        tracker.log({"loss": 0.5}, 1, is_new=False)
        tracker.log({"loss": 0.25}, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 0.25)]


def test_a_failed_training_is_logged_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a finished one as a success."""
    kept: list[Kept] = []
    monkeypatch.setattr(tracking, "_logger", lambda *_: kept.append(Kept()) or kept[-1])
    with (
        pytest.raises(ZeroDivisionError),
        tracking.opened(["mlflow"], RunFolder(tmp_path), "run", "recipe", {}, QUIET),
    ):
        raise ZeroDivisionError
    with tracking.opened(["mlflow", "mlflow"], RunFolder(tmp_path), "run", "recipe", {}, QUIET):
        pass
    assert [logger.status for logger in kept] == ["failed", "success"]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_logger_without_its_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the training begins, with what to install."""
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(TrainingError, match=rf"{name} takes other packages: pip install {name}.* pytorch-lightning"),
        tracking.opened([name], RunFolder(tmp_path), "run", "recipe", {}, QUIET),
    ):
        pass


@pytest.mark.process
@needs_mlflow
def test_mlflow_has_the_curves_and_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own files; a server that cannot be reached is one line before the training begins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    parameters = {"training": {"epochs": 2}}
    with tracking.opened(["mlflow"], RunFolder(tmp_path), "my-run", "recipe", parameters, QUIET) as tracker:
        tracker.log({"loss": 0.5}, 1)
    [metric] = tmp_path.glob("mlruns/*/*/metrics/loss")
    assert metric.read_text().split()[1:] == ["0.5", "1"]
    [value] = tmp_path.glob("mlruns/*/*/params/training/epochs")
    assert value.read_text() == "2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(TrainingError, match=r"mlflow cannot be written to .*refused"),
        tracking.opened(["mlflow"], RunFolder(tmp_path), "my-run", "recipe", parameters, QUIET),
    ):
        pass
