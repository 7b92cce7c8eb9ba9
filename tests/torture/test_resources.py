"""No room on the disk, a store that cannot be written, too little memory: an error that says so, and a way back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client.torchserve import TorchServe
from server import processes
from tests.conftest import MODEL, free_ports, run_module, wait_for

pytestmark = [
    pytest.mark.torture,
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk and limiting memory need root"),
]

MB = 1 << 20
TOO_LITTLE_FOR_AN_ARCHIVE = 300_000
# A worker that has loaded takes 250 MB and Java 150 MB.
TOO_LITTLE_FOR_A_SERVER_MB, TOO_LITTLE_FOR_A_WORKER_MB, ENOUGH_MB = 330, 200, 2_000
CGROUPS = Path("/sys/fs/cgroup/memory")
"""Where those of version 1 are mounted. One of version 2 would need a parent without processes that hands memory on."""


@contextmanager
def disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """A file that takes all room that is left."""
    filler = place / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(bytes(256)):
            pass
    return filler


def start(
    run_dir: Path, model_store: Path, first_port: int, timeout_s: int = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    place = ("--run-dir", run_dir, "--model-store", model_store, "--port", first_port)
    return run_module("server", "start", *place, "--timeout-s", timeout_s, **options)


def client(run_dir: Path, first_port: int) -> TorchServe:
    return TorchServe(f"http://127.0.0.1:{first_port}", key_file=run_dir / "key_file.json", retry_s=0)


def is_one_line_error(finished: subprocess.CompletedProcess[str]) -> bool:
    lines = finished.stderr.strip().splitlines()
    return finished.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Of a server that is gone after the test."""
    place = tmp_path / "run"
    place.mkdir()
    yield place
    processes.stop(place)


def test_no_room_for_logs(tmp_path: Path, model_store: Path, digit: bytes) -> None:
    """A server whose logs and tokens have no room answers on, with a new token too; with room again it logs on."""
    port = free_ports()
    with disk(tmp_path / "disk", 8 * MB) as run_dir:
        try:
            started = start(run_dir, model_store, port)
            assert started.returncode == 0, started.stderr
            server = client(run_dir, port)
            filler = fill(run_dir)
            with pytest.raises(OSError, match="No space"):
                (run_dir / "more").write_bytes(bytes(5000))
            server.scale(MODEL, 2)
            token = server.token()
            assert server.token(refused=token) != token
            assert all(len(server.predict(MODEL, digit)) == 5 for _ in range(50))
            filler.unlink()
            log = run_dir / "logs" / "model_log.log"
            before = log.stat().st_size
            server.scale(MODEL, 1)
            server.scale(MODEL, 2)
            assert len(server.predict(MODEL, digit)) == 5
            assert log.stat().st_size > before
            assert set(json.loads((run_dir / "key_file.json").read_text())) == {"inference", "management", "API"}
        finally:
            processes.stop(run_dir)


def test_no_room_for_temporary_files(short: Path, model_store: Path, run_dir: Path, digit: bytes) -> None:
    """Where the archive does not fit, the start fails in one line and leaves nothing; with room it succeeds."""
    port = free_ports()
    with disk(short / "temp", 16 * MB) as temp:
        environment = {**os.environ, "TMPDIR": str(temp), "TEMP": str(temp)}
        filler = fill(temp)
        os.truncate(filler, filler.stat().st_size - TOO_LITTLE_FOR_AN_ARCHIVE)
        failed = start(run_dir, model_store, port, env=environment)
        assert is_one_line_error(failed), failed.stderr
        assert f"TorchServe cannot load {MODEL}.mar: java.io.IOException: No space left on device" in failed.stderr
        assert processes.find(run_dir) is None
        assert list(temp.iterdir()) == [filler]
        filler.unlink()
        try:
            assert start(run_dir, model_store, port, env=environment).returncode == 0
            assert len(client(run_dir, port).predict(MODEL, digit)) == 5
        finally:
            run_module("server", "stop", "--run-dir", run_dir, env=environment)


def test_a_store_that_cannot_be_written(
    tmp_path: Path, model_store: Path, run: Path, run_dir: Path, digit: bytes
) -> None:
    """Full or read-only: building says so in one line and leaves it as it was; serving needs no more than to read."""
    archive, port = model_store / f"{MODEL}.mar", free_ports()
    with disk(tmp_path / "store", archive.stat().st_size + 64 * 1024) as store:
        (store / archive.name).write_bytes(archive.read_bytes())
        before = {path.name: path.read_bytes() for path in store.iterdir()}
        for prepare in (lambda: None, lambda: subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)):
            prepare()
            failed = run_module("archive", "build", run, "--name", MODEL, "--version", "2.0", "--model-store", store)
            assert is_one_line_error(failed), failed.stderr
            assert {path.name: path.read_bytes() for path in store.iterdir()} == before
        assert start(run_dir, store, port).returncode == 0
        assert len(client(run_dir, port).predict(MODEL, digit)) == 5
        processes.stop(run_dir)


@contextmanager
def memory_limit(megabytes: int) -> Iterator[Path]:
    """A control group with so much memory."""
    group = CGROUPS / f"torture-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(megabytes * MB))
    except OSError as error:
        pytest.skip(f"no control group of version 1 for memory can be made here: {error}")
    try:
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "the end of every process there", 30)
        group.rmdir()


def enter(group: Path) -> None:
    """Put this process there, and what it starts."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def killed_in(group: Path) -> int:
    """Processes that the system has killed there for want of memory."""
    return int((group / "memory.oom_control").read_text().split()[-1])


def test_no_memory_for_a_worker(model_store: Path, run_dir: Path, digit: bytes) -> None:
    """The system kills the worker: the start ends with an error and leaves nothing, the doctor names the memory."""
    port = free_ports()
    with memory_limit(TOO_LITTLE_FOR_A_SERVER_MB) as group:
        failed = start(run_dir, model_store, port, preexec_fn=partial(enter, group))
        assert is_one_line_error(failed), failed.stderr
        assert "kills for want of memory: python -m archive doctor" in failed.stderr
        assert killed_in(group) > 0
        assert processes.family(run_dir) == []
    with memory_limit(TOO_LITTLE_FOR_A_WORKER_MB) as group:
        told = run_module("archive", "doctor", model_store / f"{MODEL}.mar", preexec_fn=partial(enter, group))
        assert told.returncode == 1
        assert "memory" in told.stdout + told.stderr
        assert killed_in(group) > 0
    with memory_limit(ENOUGH_MB) as group:
        assert start(run_dir, model_store, port, preexec_fn=partial(enter, group)).returncode == 0
        assert len(client(run_dir, port).predict(MODEL, digit)) == 5
        assert killed_in(group) == 0
        processes.stop(run_dir)
