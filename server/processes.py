"""The processes of a run directory: the one that watches, TorchServe and its workers, found by their place."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from server.errors import ConfigError
from server.forkserver import WORKER_NAME, WORKER_SCRIPT

_MAIN_CLASS = "org.pytorch.serve.ModelServer"
_SCRIPTS = (WORKER_SCRIPT, "forkserver.py")
_TEMP_LINK = Path("logs", "temp")
_LONGEST_SOCKET_NAME = ".ts.sock.65535"
_LONGEST_SOCKET_PATH = 107
"""Of the 108 bytes in Linux's `sockaddr_un` the last one is NUL."""
_STOP_TIMEOUT_S = 30
_DRAIN_TIMEOUT_S = 600
_POLL_INTERVAL_S = 0.05


def find(run_dir: Path) -> psutil.Process | None:
    """The server whose working directory is `run_dir`, however it was started."""
    return next(_in(run_dir, {_MAIN_CLASS}), None)


def find_supervisor(run_dir: Path) -> psutil.Process | None:
    """The other process that keeps the server of `run_dir` up, if it was started with `--foreground`."""
    supervisors = _in(run_dir, {"-m", "server", "--foreground"})
    return next((process for process in supervisors if process.pid != os.getpid()), None)


def family(run_dir: Path) -> list[psutil.Process]:
    """The server of `run_dir`, its workers, who asked for them and whom they were forked from. All but the server may
    have outlived it: they know its temp folder."""
    server = find(run_dir)
    temp = f"{temp_dir(run_dir)}{os.sep}"
    found = [] if server is None else [server]
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if any(part.endswith(_SCRIPTS) for part in command) and any(part.startswith(temp) for part in command):
            found.append(process)
    return found


def workers(run_dir: Path) -> list[psutil.Process]:
    """The workers of this run directory's server, forked or not."""
    return [process for process in family(run_dir) if _is_worker(process)]


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a process that has ended and that nobody has asked about does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for them to end; returns those that have not. One that its parent does not ask about has ended all the same,
    and the children of this process are asked about."""
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL_S)
    psutil.wait_procs([process for process in processes if process not in alive], timeout=0)
    return alive


def stop(run_dir: Path) -> int | None:
    """Stop the server of `run_dir`, and first its supervisor, which lets it finish its requests.

    Returns:
        The server's pid, or None where none was running.
    """
    server, supervisor = find(run_dir), find_supervisor(run_dir)
    if supervisor is not None:
        with suppress(psutil.NoSuchProcess):
            supervisor.terminate()
        _end([supervisor], _DRAIN_TIMEOUT_S)
    clear(run_dir)
    return server.pid if server is not None else None


def clear(run_dir: Path) -> None:
    """End the server of `run_dir` and its workers, and remove its tokens and temp folder, whatever is left of them."""
    server = find(run_dir)
    if server is not None:
        with suppress(psutil.NoSuchProcess):
            started = [server, *server.children(recursive=True)]
            server.terminate()
            _end(started, _STOP_TIMEOUT_S)
    _end(family(run_dir), 0)
    (run_dir / "key_file.json").unlink(missing_ok=True)
    shutil.rmtree(temp_dir(run_dir), ignore_errors=True)
    (run_dir / _TEMP_LINK).unlink(missing_ok=True)


def temp_dir(run_dir: Path) -> Path:
    """The temp folder of this run directory's server.

    It lies under the system's temp folder because it holds Unix sockets, whose paths may have about 100 characters. Who
    stops the server may have another one (`TMPDIR`), so a link in `logs/` says where it is.
    """
    name = f"torchserve-{zlib.crc32(str(run_dir.resolve()).encode()):08x}"
    link = run_dir / _TEMP_LINK
    if link.is_symlink() and link.readlink().name == name:  # else a copy of another run directory's
        return link.readlink()
    return Path(tempfile.gettempdir(), name)


def check_temp_dir(run_dir: Path) -> None:
    """Raises:
    ConfigError: the paths of the workers' sockets there would be longer than the system allows.
    """
    temp = temp_dir(run_dir)
    longest = _LONGEST_SOCKET_PATH - len(os.fsencode(Path(os.sep, temp.name, _LONGEST_SOCKET_NAME)))
    if (length := len(os.fsencode(temp.parent))) > longest:
        raise ConfigError(
            f"TMPDIR is {temp.parent}, of {length} bytes, and the workers' sockets lie below: set it to a folder whose "
            f"path has {longest} bytes at most, such as /tmp"
        )


def others_who_write(run_dir: Path) -> list[str]:
    """A warning where other users may write into the folder that holds the tokens and logs; otherwise none."""
    if not run_dir.is_dir():
        return []
    status = run_dir.stat()
    foreign = status.st_uid not in (0, os.getuid())
    if foreign or status.st_mode & stat.S_IWOTH:
        others = "another user owns it" if foreign else "every user may write there"
        return [f"{run_dir}: {others}, and so can replace the server's tokens and logs: give another --run-dir"]
    return []


def make_temp_dir(run_dir: Path) -> Path:
    """Make it, and the link; `logs/` is there, and what an earlier server may have left is cleared away."""
    temp = temp_dir(run_dir)
    link = run_dir / _TEMP_LINK
    link.unlink(missing_ok=True)
    link.symlink_to(temp)
    temp.mkdir(mode=0o700)
    return temp


def _is_worker(process: psutil.Process) -> bool:
    """Whether it is one that was forked, or that TorchServe started itself."""
    try:
        return process.name() == WORKER_NAME or any(part.endswith(WORKER_SCRIPT) for part in process.cmdline()[1:2])
    except psutil.Error:
        return False


def _in(run_dir: Path, words: set[str]) -> Iterator[psutil.Process]:
    """The processes in that working directory with all of these words in their command."""
    place = str(run_dir.resolve())
    for process in psutil.process_iter():
        try:
            if words.issubset(process.cmdline()) and process.cwd() == place:
                yield process
        except psutil.Error:
            continue


def _end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Wait for them to end, and kill those that do not."""
    for process in wait(processes, timeout_s):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait(processes, _STOP_TIMEOUT_S)
