"""The TorchServe process that runs in a directory, found by its working directory and stopped with its workers."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from pathlib import Path

import psutil

_MAIN_CLASS = "org.pytorch.serve.ModelServer"
_STOP_TIMEOUT_S = 30


def find(run_dir: Path) -> psutil.Process | None:
    """The server whose working directory is `run_dir`, however it was started."""
    place = str(run_dir.resolve())
    for process in psutil.process_iter():
        try:
            if _MAIN_CLASS in process.cmdline() and process.cwd() == place:
                return process
        except psutil.Error:
            continue
    return None


def stop(run_dir: Path) -> int | None:
    """Stop the server of `run_dir` and its workers, and remove its tokens and temp folder.

    Returns:
        Its pid, or None where none was running.
    """
    server = find(run_dir)
    if server is not None:
        family = [server, *server.children(recursive=True)]
        server.terminate()
        _, alive = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)
    (run_dir / "key_file.json").unlink(missing_ok=True)
    shutil.rmtree(temp_dir(run_dir), ignore_errors=True)
    return server.pid if server is not None else None


def temp_dir(run_dir: Path) -> Path:
    """The temp folder of this run directory's server.

    It lies under the system's temp folder because it holds Unix sockets, whose paths may have about 100 characters.
    """
    place = str(run_dir.resolve()).encode()
    return Path(tempfile.gettempdir(), f"torchserve-{zlib.crc32(place):08x}")
