"""Workers that are forked: the same as those that Java would have started, and ended with what Java knows of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from server import environment, launch, processes
from server.config import ServerConfig
from tests.conftest import ROOT

REPORTS = """
import json, os, sys
imported = "torch" in sys.modules
import torch
print(json.dumps({
    "arguments": sys.argv, "directory": os.getcwd(), "variables": dict(os.environ), "path": sys.path,
    "imported": imported, "is_cut_off_from_gpus": torch.cuda._is_in_bad_fork(),
    "pid": os.getpid(), "parent": os.getppid(),
}))
"""
HANGS = """
import ctypes, os
print(os.getpid(), flush=True)
ctypes.PyDLL(None).pause()
"""
END_TIMEOUT_S = 20
pytestmark = pytest.mark.server


class Java:
    """A fork server whose Java does nothing: the tests start workers in its place."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        subprocess.run(launch.forkserver_command(folder, pid), check=True)
        [self.server] = [process for process in psutil.process_iter() if _is_of(process, folder)]

    def start_worker(
        self, script: str, *arguments: str, temp: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """As Java does, with the variables that it gives and nothing else."""
        path = self.folder / "ts" / "model_service_worker.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        environment = {"TEMP": str(temp or self.folder), "WORKER_PYTHON": sys.executable, **variables}
        return subprocess.Popen(
            [launch.WORKER_PROGRAM, str(path), *arguments], env=environment, cwd="/", stdout=subprocess.PIPE, text=True
        )


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(part.startswith(str(folder)) for part in process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def running(folder: Path) -> Iterator[Java]:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield Java(folder, process.pid)
        finally:
            process.kill()
    left = [process for process in psutil.process_iter() if _is_of(process, folder)]
    assert not processes.wait(left, END_TIMEOUT_S)


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Java]:
    with running(tmp_path_factory.mktemp("java")) as java:
        yield java


def test_a_worker_is_as_java_would_have_started_it(java: Java) -> None:
    """Arguments, directory, variables, output and path are Java's; PyTorch is there and no thread of another."""
    folder = str(java.folder / "archive")
    with java.start_worker(REPORTS, "--sock-name", "x y", PYTHONPATH=f"{folder}:/else", NAME="value") as asker:
        said = json.loads(asker.communicate()[0])
    assert asker.returncode == 0
    script = java.folder / "ts" / "model_service_worker.py"
    assert said["arguments"] == [str(script), "--sock-name", "x y"]
    assert said["directory"] == "/"
    assert said["variables"].keys() - {"PWD", "SHLVL", "_", "LC_CTYPE"} == {
        "TEMP",
        "WORKER_PYTHON",
        "PYTHONPATH",
        "NAME",
    }
    assert said["path"][:3] == [str(script.parent), folder, "/else"]
    assert not [place for place in said["path"] if place in ("", str(ROOT), str(ROOT / "server"))]
    assert said["imported"]
    assert not said["is_cut_off_from_gpus"]
    assert java.server.num_threads() == 1  # a fork has but the one that forked
    assert said["pid"] != asker.pid
    assert said["parent"] == java.server.pid


def test_who_counts_gpus_before_the_fork_cuts_workers_off() -> None:
    """The negative control: CUDA must be left alone until then, which shows also where there is no GPU."""
    script = "import os, torch; torch.cuda.device_count(); os.fork() or print(torch.cuda._is_in_bad_fork())"
    said = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True).stdout
    assert said == b"True\n"


def test_what_java_kills_ends_the_worker(java: Java) -> None:
    """Also a worker that hangs in a library and lets no other thread of Python run."""
    with java.start_worker(HANGS) as asker:
        assert asker.stdout
        worker = psutil.Process(int(asker.stdout.readline()))
        asker.kill()
    assert not processes.wait([worker], END_TIMEOUT_S)


def test_a_worker_that_ends_ends_what_java_waits_for(java: Java) -> None:
    """However it ends."""
    with java.start_worker(HANGS) as asker:
        assert asker.stdout
        os.kill(int(asker.stdout.readline()), signal.SIGTERM)
        try:
            asker.wait(END_TIMEOUT_S)
        finally:
            asker.kill()


def test_the_server_leaves_signals_to_java(java: Java) -> None:
    """A service manager that asks all processes to end does not keep Java from finishing its requests."""
    java.server.terminate()
    with java.start_worker(REPORTS) as asker:
        assert json.loads(asker.communicate()[0])["parent"] == java.server.pid


def test_other_commands_and_workers_without_a_server_are_plain_pythons(java: Java, tmp_path: Path) -> None:
    """As Java collects metrics, and as it starts a worker after the server was killed."""
    said = subprocess.run(
        [launch.WORKER_PROGRAM, "-c", "import sys; print(sys.path)"],
        env={"TEMP": str(java.folder), "WORKER_PYTHON": sys.executable}, stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    assert b"site-packages" in said
    with java.start_worker(REPORTS, temp=tmp_path) as asker:
        said = json.loads(asker.communicate()[0])
    assert said["pid"] == asker.pid
    assert not said["imported"]


def test_the_server_ends_with_java(tmp_path: Path) -> None:
    """It does not outlive what asks for its workers; for a Java that has ended already it says nothing."""
    with running(tmp_path) as java:
        assert processes.is_alive(java.server)
    assert not processes.is_alive(java.server)
    with subprocess.Popen(["true"]) as ended:
        pass
    late = subprocess.run(launch.forkserver_command(tmp_path, ended.pid), capture_output=True, check=True)
    assert late.stdout + late.stderr == b""


def test_a_request_that_is_none_forks_nothing(java: Java) -> None:
    """One that was killed before it could ask; the next is served."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asker:
        asker.connect(str(java.folder / "fork.sock"))
    with java.start_worker(REPORTS) as asker:
        assert json.loads(asker.communicate()[0])["parent"] == java.server.pid


@pytest.mark.parametrize(
    ("line", "forked"),
    [
        ("", {"TEMP", "WORKER_PYTHON", "OTEL_HEADERS"}),
        ("blacklist_env_vars=OTEL_.*", {"TEMP", "WORKER_PYTHON"}),
        ("blacklist_env_vars=.*PYTHON.*", None),
        ("blacklist_env_vars=(?<secret>OTEL).*", None),
        ("install_py_dep_per_model=true", None),
    ],
)
def test_torchserve_starts_workers_itself_where_forks_would_differ(line: str, forked: set[str] | None) -> None:
    """Forks get the variables that Java leaves its workers; no package of an archive's own is passed over."""
    variables = dict.fromkeys(("TEMP", "WORKER_PYTHON", "OTEL_HEADERS"), "x")
    found = environment.for_forks(variables, ServerConfig(f"{line}\n").properties)
    assert (None if found is None else found.keys()) == forked
