"""One server at a time: started, awaited until it answers right, weighed, and stopped with all that it started."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.errors import StartFailed
from benchmarks.serving.peers import Plan
from server import processes

_MARK = "BENCHMARK_SERVER"
"""`python -m server` passes it on to no server, which its working directory tells."""
_POLL_INTERVAL_S = 0.05
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 10


class Server:
    """A started server and everything that came of it, known by a variable that they inherit."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "console.log"
        self.mark = uuid.uuid4().hex
        # Short, for it holds Unix sockets, whose paths may have about 100 characters.
        self.temp = tempfile.mkdtemp(prefix="bench-")
        temp = {"TMPDIR": self.temp, "TEMP": self.temp, "RAY_TMPDIR": self.temp}
        environment = {**os.environ, "PYTHONPATH": "", **temp, **plan.environment, _MARK: self.mark}
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                plan.command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def family(self) -> list[psutil.Process]:
        """Its processes."""
        return family(self.directory, self.mark)

    def memory_mb(self) -> float:
        """Of all its processes; what they share is counted once (PSS)."""
        total = 0.0
        for process in self.family():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss / 1e6
        return total

    def await_answer(self, is_right: Callable[[], bool]) -> float:
        """Seconds from the start until `is_right` says so of an answer.

        Raises:
            StartFailed: it ended, or gave no right answer in time.
        """
        last = "no answer"
        while (waited := time.monotonic() - self.started) < _START_TIMEOUT_S:
            try:
                if is_right():
                    return time.monotonic() - self.started
                last = "a wrong answer"
            except (OSError, ValueError, LookupError, TypeError) as error:
                last = str(error).partition("\n")[0]
            if self.process.poll() not in (None, 0):
                raise StartFailed(
                    f"the server ended after {waited:.0f} s with {self.process.returncode}: see {self.log}"
                )
            time.sleep(_POLL_INTERVAL_S)
        raise StartFailed(f"no right answer in {_START_TIMEOUT_S} s, at last {last}: see {self.log}")

    def stop(self) -> None:
        """End its processes, by force where they take too long, and remove what they leave in temp folders."""
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in [*processes.wait(family, _STOP_TIMEOUT_S), *self.family()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(_STOP_TIMEOUT_S)
        processes.clear(self.directory)
        shutil.rmtree(self.temp, ignore_errors=True)


def family(directory: Path, mark: str) -> list[psutil.Process]:
    """The processes with the mark, a TorchServe that runs in `directory`, what forks its workers, and all their
    children."""
    roots = processes.family(directory)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                roots.append(process)
    found: dict[int, psutil.Process] = {}
    for process in roots:
        with suppress(psutil.Error):
            found.update({member.pid: member for member in (process, *process.children(recursive=True))})
    return [process for process in found.values() if processes.is_alive(process)]
