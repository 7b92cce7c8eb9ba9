"""Programs that run to their end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

from benchmarks.errors import BenchmarkError


def output(command: Sequence[str], failure: type[BenchmarkError] = BenchmarkError, **options: Any) -> str:
    """What a program prints.

    Args:
        options: as `subprocess.run` takes them.

    Raises:
        BenchmarkError: of the kind `failure`, with what the program said last.
    """
    finished: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if finished.returncode:
        said = (finished.stderr or finished.stdout).strip().splitlines() or ["nothing was said"]
        raise failure(f"{' '.join(command)}: {said[-1]}")
    return finished.stdout
