"""What a person sees of a training: a bar with images/s and the time left and lines above it; in a pipe lines alone."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from system.progress import LINE_INTERVAL_S, left
from train.errors import OutOfTime

_REFRESH_INTERVAL_S = 0.2
_MEASURED_S = 5.0
"""Until a speed is believed."""


class Progress:
    """Shows the progress of a training over `epochs` epochs of `images` images each; silent on a quiet console.

    Args:
        until: the `time.monotonic()` at which the training must have ended.
    """

    def __init__(
        self, console: Console, images: int, epochs: int, done_epochs: int = 0, until: float | None = None
    ) -> None:
        self._console = console
        self._until, self._left = until, images * (epochs - done_epochs)
        self._first: tuple[float, int] | None = None
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
        """`images` more have been trained on.

        Raises:
            OutOfTime: the speed so far says that the training would end after its time.
        """
        self._check_time(images)
        self._pending += images
        elapsed = time.perf_counter() - self._shown
        on_terminal = self._console.is_terminal
        if elapsed > (_REFRESH_INTERVAL_S if on_terminal else LINE_INTERVAL_S):
            speed = self._pending / elapsed
            self._bar.update(self._task, advance=self._pending, speed=speed, refresh=True)
            self._pending, self._shown = 0, time.perf_counter()
            if not on_terminal:
                [task] = self._bar.tasks
                self.say(
                    f"training {task.percentage:.0f}%, {speed:,.0f} images/s, {left((task.remaining or 0) / speed)}"
                )

    def _check_time(self, images: int) -> None:
        if self._until is None:
            return
        now = time.monotonic()
        self._left -= images
        self._first = self._first or (now, self._left)  # before the first step, processes start and memory is filled
        started, left = self._first
        ends = now + (now - started) * self._left / max(1, left - self._left)
        if ends > self._until and (now > self._until or now - started > _MEASURED_S):
            raise OutOfTime(f"it would take {ends - now:.0f} s more, and {max(0, self._until - now):.0f} s are left")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line)
