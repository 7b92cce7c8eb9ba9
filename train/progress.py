"""What a person sees of a training: a bar with images/s and the time left, and one line for each epoch."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from train.loop import EpochResult

_REFRESH_INTERVAL_S = 0.2


class Progress:
    """Shows the progress of a training over `epochs` epochs of `images` images each; silent on a quiet console."""

    def __init__(self, console: Console, images: int, epochs: int, done_epochs: int = 0) -> None:
        self._console = console
        self._images, self._epochs = images, epochs
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=images * epochs, completed=images * done_epochs, speed=0.0)
        self._pending = 0
        self._shown = time.perf_counter()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, images: int) -> None:
        """`images` more have been trained on."""
        self._pending += images
        elapsed = time.perf_counter() - self._shown
        if elapsed > _REFRESH_INTERVAL_S:
            self._bar.update(self._task, advance=self._pending, speed=self._pending / elapsed, refresh=True)
            self._pending, self._shown = 0, time.perf_counter()

    def loss(self, epoch: int, step: int, loss: float) -> None:
        """The mean loss of the steps since the last one shown."""
        self._console.print(f"epoch {epoch:3d}  step {step:6d}  loss {loss:7.4f}")

    def epoch(self, result: EpochResult, *, kept: bool) -> None:
        """One line for a finished epoch."""
        line = f"epoch {result.epoch:3d}/{self._epochs}  loss {result.loss:7.4f}  acc1 {result.acc1:7.2%}"
        if result.val_acc1 is not None:
            line += f"  val loss {result.val_loss:7.4f}  val acc1 {result.val_acc1:7.2%}"
        self._console.print(f"{line}  {result.images_per_s:8,.0f} images/s{'  best' if kept else ''}")
