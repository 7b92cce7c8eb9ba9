"""Keep a server up in the foreground: start it again when it dies, and let it finish its requests when asked to stop.

    python -m server start cpu --foreground

ends on SIGTERM, SIGINT (Ctrl-C) or SIGHUP with 0, and on a second one at once; a signal that was ignored at the start,
as by nohup, stays ignored. The file `logs/ready` in the run directory exists while every model has a ready worker; this
is checked every two seconds.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from client.errors import ClientError, ModelNotFound
from client.torchserve import TorchServe
from server import launch, processes
from server.drain import Drain
from server.environment import LogFormat
from server.errors import ServerError, StartFailed
from server.launch import RunningServer
from system import signals
from system.printable import printable

MAX_FAILURES = 5
"""In a row, after which it is given up."""
_STEADY_S = 60.0
"""A server that was up for so long has not failed in a row."""
_LOOK_INTERVAL_S = 0.25
_READY_INTERVAL_S = 2.0
_ANSWER_TIMEOUT_S = 10.0
"""Longer than a description takes under load, which is no reason to send requests elsewhere."""
_LONGEST_PAUSE_S = 8.0


class _Stop(BaseException):
    """Raised by a signal, wherever the supervisor is."""


class Supervisor:
    """One server, watched from this process.

    Args:
        start: starts it and returns once every model is ready.
        drain_timeout_s: how long requests may go on coming after the first signal.
    """

    def __init__(
        self,
        start: Callable[[], RunningServer],
        run_dir: Path,
        drain_timeout_s: float,
        log_format: LogFormat = "text",
    ) -> None:
        self.start = start
        self.run_dir = run_dir.resolve()
        self.drain_timeout_s = drain_timeout_s
        self.log_format = log_format
        self.ready_file = self.run_dir / "logs" / "ready"
        self.server: RunningServer | None = None

    def run(self) -> None:
        """Serve until a signal comes.

        Raises:
            ServerError: it could not be started, or died too often; nothing of it is left running.
        """
        launch.refuse_a_second(self.run_dir)  # what is cleared at the end would be another's
        signals.catch(_raise_stop)
        self.ready_file.unlink(missing_ok=True)  # of a supervisor that was killed
        try:
            self._serve()
        except _Stop:
            self._finish()
        finally:
            for number in signals.INTERRUPTS:
                signal.signal(number, signal.SIG_IGN)
            self.ready_file.unlink(missing_ok=True)
            processes.clear(self.run_dir)

    def _serve(self) -> None:
        self.server = self.start()
        failures = 0
        while True:
            self._say_ready()
            since = time.monotonic()
            self._wait_for_end()
            self.ready_file.unlink(missing_ok=True)
            self.server = None
            failures = 1 if time.monotonic() - since > _STEADY_S else failures + 1
            failures = self._bring_back(failures)

    def _bring_back(self, failures: int) -> int:
        """Start the server again, at once and then after growing pauses; returns the failures in a row.

        Raises:
            StartFailed: there were too many.
        """
        reason = "TorchServe ended by itself"
        while True:
            if failures >= MAX_FAILURES:
                raise StartFailed(
                    f"gave up after {failures} failures in a row, the last: {reason}; see {self.run_dir / 'logs'}"
                )
            self.say(f"{reason}: starting it again ({failures} of {MAX_FAILURES} failures)")
            processes.clear(self.run_dir)
            time.sleep(min(2.0 ** (failures - 1) - 1, _LONGEST_PAUSE_S))
            try:
                self.server = self.start()
                return failures
            except ServerError as error:
                reason = str(error)
                failures += 1

    def _wait_for_end(self) -> None:
        assert self.server is not None
        client = self.server.client(_ANSWER_TIMEOUT_S)
        process = processes.find(self.run_dir)
        next_look = time.monotonic() + _READY_INTERVAL_S
        while process is not None and processes.wait([process], _LOOK_INTERVAL_S):
            if time.monotonic() >= next_look:
                self._look(client, self.server.models)
                next_look = time.monotonic() + _READY_INTERVAL_S

    def _look(self, client: TorchServe, models: Iterable[str]) -> None:
        """Create the file if every model that was started, and not removed since, has a ready worker."""
        try:
            for model in models:
                with suppress(ModelNotFound):
                    client.check_workers(model, at_least=1)
        except ClientError as error:
            if self.ready_file.exists():
                self.say(f"no longer ready: {model}: {error}")
                self.ready_file.unlink()
            return
        if not self.ready_file.exists():
            self.say("ready again")
            self.ready_file.touch()

    def _finish(self) -> None:
        """Let the server answer what it has taken; a second signal ends that."""
        self.ready_file.unlink(missing_ok=True)
        if self.server is None:
            return
        self.say(f"stopping: no longer ready, serving until no request comes, at most {self.drain_timeout_s:g} s")
        try:
            drain = Drain(self.run_dir, self.server.client(_ANSWER_TIMEOUT_S), self.server.metrics_url)
            finished = drain.finish(self.drain_timeout_s)
        except _Stop:
            finished = False
        self.say("every request is answered" if finished else "not every request could be answered in time")

    def _say_ready(self) -> None:
        assert self.server is not None
        models = ", ".join(f"{model} ({workers})" for model, workers in self.server.models.items())
        self.say(f"ready at {self.server.inference_url}: {models}")
        self.ready_file.touch()

    def say(self, message: str) -> None:
        """One line among those of the server, in its format."""
        now = datetime.now().astimezone()
        if self.log_format == "json":
            time_text = now.isoformat(timespec="milliseconds")
            fields = {"time": time_text, "level": "INFO", "thread": "main", "logger": "supervisor", "message": message}
            print(json.dumps(fields), flush=True)
        else:
            time_text = now.replace(tzinfo=None).isoformat(timespec="milliseconds").replace(".", ",")
            print(f"{time_text} [INFO ] main supervisor - {printable(message)}", flush=True)


def _raise_stop(number: int, frame: FrameType | None) -> None:
    raise _Stop
