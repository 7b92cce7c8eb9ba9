"""What a person sees of a training: a bar with images/s and the time left, and lines above it."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_REFRESH_INTERVAL_S = 0.2


class Progress:
    """Shows the progress of a training over `epochs` epochs of `images` images each; silent on a quiet console."""

    def __init__(self, console: Console, images: int, epochs: int, done_epochs: int = 0) -> None:
        self._console = console
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

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line)
