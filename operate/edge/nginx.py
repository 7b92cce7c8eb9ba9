"""An nginx that runs in a folder of its own: started, given a new configuration without a failed request, and stopped.

The folder holds `nginx.conf` and what it includes; `run/` and `logs/` in it are nginx's. Its paths are seen from the
folder, so that two of them never meet.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from client.errors import ClientError
from system import locks
from system.cores import cores

MOST_LOG_BYTES = 20_000_000
"""Of the access log, and of the older one that is kept."""
_CLOSING_S = 1.0
"""For so long before a change every answer ends its connection; one that is idle by then is not about to be used."""
_CHANGE_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 60.0
_POLL_INTERVAL_S = 0.02


class Nginx:
    """The nginx of one folder, found there by a later process; it outlives the process that started it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.run = self.folder / "run"
        self.watch_lock = self.run / "watch.lock"
        """Held by the command `edge` that watches over this nginx."""
        self._change_lock = self.run / "lock"
        for place in (self.run, self.folder / "logs"):
            place.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:  # nginx's workers run as the folder's owner, and its sockets are in run/
            os.chown(self.run, self.folder.stat().st_uid, self.folder.stat().st_gid)

    def is_running(self) -> bool:
        return self._master() is not None

    def start(self) -> None:
        """Raises:
        ClientError: nginx is not there or refuses its configuration, in its own words.
        """
        for left in (*self.run.glob("*.sock"), self.run / "closing"):
            left.unlink(missing_ok=True)
        self._call()

    @contextmanager
    def change(self) -> Iterator[None]:
        """What is written within is what nginx runs afterwards; connections that stay open are ended in order first.

        Others that change it meanwhile, in this process or another, wait.

        Raises:
            ClientError: it refuses that, and goes on with what it had.
        """
        closing = self.run / "closing"
        with locks.held(self._change_lock):
            self._call("-t")  # a file that was spoilt meanwhile costs nobody a connection
            closing.touch()
            try:
                time.sleep(_CLOSING_S)
                yield
                self._call("-t")
                self._reload()
            finally:
                closing.unlink(missing_ok=True)

    def bound_log(self) -> None:
        """Put an access log that is full aside, in the place of the one before, and have nginx begin another."""
        log, master = self.folder / "logs" / "access.log", self._master()
        if master and log.exists() and log.stat().st_size > MOST_LOG_BYTES:
            log.replace(log.with_name("access.1.log"))
            master.send_signal(signal.SIGUSR1)

    def was_left_changing(self) -> bool:
        """Whether who began a change was killed, so that every answer ends its connection until the next one."""
        return (self.run / "closing").exists() and not locks.is_held(self._change_lock)

    def stop(self) -> None:
        """Let it answer what it has taken, for a minute at most, and end."""
        master = self._master()
        if master is None:
            return
        with suppress(psutil.NoSuchProcess):
            master.send_signal(signal.SIGQUIT)
            _, alive = psutil.wait_procs([master], timeout=_STOP_TIMEOUT_S)
            for process in alive:
                process.terminate()

    def _reload(self) -> None:
        master = self._master()
        if master is None:
            raise ClientError(f"the nginx of {self.folder} has ended")
        try:
            old = set(_serving(master))
            master.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + _CHANGE_TIMEOUT_S
            while not (new := set(_serving(master))) or new & old:
                if time.monotonic() > deadline:
                    log = self.folder / "logs" / "error.log"
                    raise ClientError(f"nginx did not take its new configuration; see {log}")
                time.sleep(_POLL_INTERVAL_S)
        except psutil.NoSuchProcess:
            raise ClientError(f"the nginx of {self.folder} has ended") from None

    def _master(self) -> psutil.Process | None:
        try:
            process = psutil.Process(int((self.run / "nginx.pid").read_text()))
            # The file may be older than the machine's last start, and the number another process's by now.
            is_ours = process.name() == "nginx" and process.cwd() == str(self.folder)
            return process if is_ours and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, psutil.Error):
            return None

    def _call(self, *arguments: str) -> None:
        """Run the program nginx.

        Raises:
            ClientError: it is not there, or what it complains of.
        """
        directives = f"worker_processes {cores()};"  # `auto` would count cores beyond a container's quota
        if os.geteuid() == 0:
            directives += f" user {self.folder.owner()} {self.folder.group()};"
        command = ["nginx", "-p", ".", "-c", "nginx.conf", "-e", "stderr", "-g", directives, *arguments]
        try:
            finished = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ClientError("there is no program nginx: install your system's package nginx") from None
        if finished.returncode:
            said = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*)", finished.stderr)
            raise ClientError(f"nginx in {self.folder}: {said[1] if said else finished.stderr.strip()}")


def _serving(master: psutil.Process) -> Iterator[int]:
    """The pids of its workers that take requests."""
    for process in master.children():
        with suppress(psutil.Error):
            if "shutting down" not in " ".join(process.cmdline()):
                yield process.pid
