"""How far long work is, on stderr.

On a terminal it is a bar, which goes when the work has ended; elsewhere a line now and then.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 30.0
"""Between two lines of what goes into a pipe or a file."""


class _Lines(Progress):
    """Rich's bar, which prints lines where that is off."""

    def __init__(self, state: str, **options: Any) -> None:
        super().__init__(
            TextColumn("{task.description}"), BarColumn(), TextColumn(state), TimeRemainingColumn(), **options
        )
        self._state, self._told = state, time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(self._tasks[task_id])

    def _tell(self, task: Task) -> None:
        now = time.monotonic()
        if self.disable and now - self._told >= LINE_INTERVAL_S:
            self._told = now
            line = f"{task.description} {self._state.format(task=task)}".strip()
            self.console.print(f"{line}, {left(task.time_remaining)}", highlight=False, markup=False)


def left(seconds: float | None) -> str:
    """A time that is left, for people."""
    return "time left unknown" if seconds is None else f"{timedelta(seconds=round(seconds))} left"


def bar(state: str = "{task.completed:.0f}/{task.total:.0f}") -> Progress:
    """The work's description, the bar, its state, and the time that is left.

    Args:
        state: a format of Rich's `task`, whose `fields` are what `add_task` and `update` are given.
    """
    console = Console(stderr=True)
    # Rows that go into a pipe must not take the way over the terminal.
    return _Lines(
        state, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    )
