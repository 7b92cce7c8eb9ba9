"""Starting and stopping: ports, configuration, broken archives, and one server beside another."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import ts

from archive.build import build
from archive.content import ArchiveContent
from archive.sign import keygen
from server import effective, environment, launch, processes, properties, store
from server.config import ServerConfig
from server.errors import AlreadyRunning, ConfigError, PortTaken, StartFailed
from server.launch import RunningServer
from tests.broken import repacked, replaced
from tests.conftest import CONFIG, MODEL, ROOT, free_ports, started


def test_both_configurations_listen_on_loopback_with_tokens() -> None:
    """Nothing that we ship opens a port to the network or switches tokens off."""
    for file in CONFIG.parent.glob("config.*.properties"):
        config = ServerConfig.read(file)
        assert {host for host, _ in config.ports.values()} == {"127.0.0.1"}
        assert "disable_token_authorization" not in config.text
        assert not [line for line in config.text.splitlines() if line != line.rstrip()]


def test_cpu_and_gpu_differ_in_the_gpu_alone() -> None:
    """The two files say the same but for the GPU."""
    cpu, gpu = (
        {line for line in (CONFIG.parent / f"config.{device}.properties").read_text().splitlines() if "=" in line}
        for device in ("cpu", "gpu")
    )
    assert cpu - gpu == {"number_of_gpu=0"}
    assert gpu - cpu == set()


def test_port_moves_every_port() -> None:
    """--port N gives five consecutive ports and keeps the hosts."""
    moved = ServerConfig.read(CONFIG).on_ports(9080)
    assert [port for _, port in moved.ports.values()] == [9080, 9081, 9082, 9083, 9084]
    assert moved.value("inference_address") == "http://127.0.0.1:9080"
    assert [port for _, port in ServerConfig("").on_ports(9080).ports.values()] == [9080, 9081, 9082, 9083, 9084]


def test_the_ports_are_those_that_torchserve_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's where the file lets it speak; an address without a port has one; a Unix socket is refused."""
    monkeypatch.setenv("TS_METRICS_ADDRESS", "http://127.0.0.1:9999")
    assert ServerConfig("enable_envvars_config=true\n").ports["metrics_address"] == ("127.0.0.1", 9999)
    assert ServerConfig("").ports["metrics_address"] == ("127.0.0.1", 8082)
    assert ServerConfig("inference_address=http://127.0.0.1\n").ports["inference_address"] == ("127.0.0.1", 8080)
    assert ServerConfig("grpc_inference_address=127.0.0.2\n").ports["grpc_inference_port"] == ("127.0.0.2", 7070)
    with pytest.raises(ConfigError, match=r"inference_address=unix:/tmp/socket: expected an address with a port"):
        assert ServerConfig("inference_address=unix:/tmp/socket\n").ports


@pytest.mark.parametrize("offset", range(5))
def test_a_taken_port_is_named(model_store: Path, tmp_path: Path, offset: int) -> None:
    """Whichever of the five is taken, the message names it and how to choose others; nothing is started."""
    first = free_ports()
    with socket.socket() as other:
        other.bind(("127.0.0.1", first + offset))
        other.listen()
        with pytest.raises(PortTaken, match=rf"port {first + offset} .*--port"):
            launch.start(tmp_path, model_store, CONFIG, first_port=first)
    assert processes.find(tmp_path) is None


def test_nothing_to_serve_is_an_error(tmp_path: Path) -> None:
    """An empty model store says how to fill it."""
    with pytest.raises(ConfigError, match=r"archive\.sh"):
        launch.start(tmp_path, tmp_path, CONFIG)


def test_archives_beside_the_one_of_a_model_are_left_out(model_store: Path, tmp_path: Path) -> None:
    """The next version and a tuning's copy cost a line each, a hidden file none; none of them is served or shown."""
    served = Path(shutil.copy(model_store / f"{MODEL}.mar", tmp_path))
    for other in (f"{MODEL}-2.0.mar", f"{MODEL}.tune-1-1-1.mar"):
        shutil.copy(served, tmp_path / other)
    (tmp_path / ".arriving.mar").touch()
    archives, left_out = store.archives(tmp_path)
    assert [archive.path for archive in archives] == [served]
    assert [line.split(" is left out: ")[0] for line in left_out] == [
        str(tmp_path / f"{MODEL}-2.0.mar"), str(tmp_path / f"{MODEL}.tune-1-1-1.mar")
    ]  # fmt: skip
    assert effective.settings(properties.read(CONFIG), *archives).name == MODEL
    served.unlink()
    with pytest.raises(ConfigError, match=rf"{MODEL}-2\.0\.mar is the model {MODEL}: name it {MODEL}\.mar"):
        store.archives(tmp_path)


def test_a_manifest_is_read_once(model_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which archives are served and what with comes from one reading of each file."""
    seen: list[str] = []
    read = ArchiveContent.read
    monkeypatch.setattr(ArchiveContent, "read", lambda self, name: seen.append(name) or read(self, name))
    effective.settings(properties.read(CONFIG), *store.archives(model_store)[0])
    assert sorted(seen) == ["MAR-INF/MANIFEST.json", "model-config.yaml"]


def test_an_archive_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Alone in its store it stops the start, with its name and the reason."""
    broken = tmp_path / "broken.mar"
    broken.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"broken\.mar"):
        launch.start(tmp_path, tmp_path, CONFIG)


def test_stop_without_a_server_is_no_error(tmp_path: Path) -> None:
    """Stopping twice is harmless."""
    assert processes.stop(tmp_path) is None


@pytest.mark.slow
@pytest.mark.server
def test_an_archive_that_cannot_load_fails_the_start_with_its_reason(model_store: Path, tmp_path: Path) -> None:
    """The worker's own exception reaches the user, and no process stays behind."""
    store = tmp_path / "store"
    store.mkdir()
    repacked(
        model_store / f"{MODEL}.mar",
        store,
        lambda content: replaced(content, "model-config.yaml", "resize_size: 32", "resize_size: 40"),
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(StartFailed, match=r"GoldenMismatch: \d+\.png, class"):
        launch.start(run_dir, store, CONFIG, first_port=free_ports())
    assert processes.find(run_dir) is None


@pytest.mark.server
def test_a_server_that_ends_at_once_says_why(model_store: Path, tmp_path: Path) -> None:
    """A Java that does not come up ends it; its own last words are passed on."""
    config = tmp_path / "broken.properties"
    config.write_text(CONFIG.read_text().replace("vmargs=", "vmargs=-Xmx1k "))
    with pytest.raises(StartFailed, match=r"TorchServe ended: .*console\.log"):
        launch.start(tmp_path, model_store, config, first_port=free_ports())
    assert processes.find(tmp_path) is None


def test_a_configuration_that_torchserve_would_swallow_is_refused(model_store: Path, tmp_path: Path) -> None:
    """A start checks as `python -m server config` does, before anything is made."""
    config = tmp_path / "swallowed.properties"
    config.write_text(CONFIG.read_text() + "disable_token_authorisation=false\nasync_loging=true\n")
    with pytest.raises(ConfigError, match=r"disable_token_authorisation: .* \(and 1 more: python -m server config"):
        launch.start(tmp_path / "run", model_store, config, first_port=free_ports())
    assert not (tmp_path / "run").exists()


def bytes_a_request(server: RunningServer, digit: bytes) -> float:
    """By how much the logs grow with each of a hundred requests."""
    logs = server.key_file.parent / "logs"

    def size() -> int:
        return sum(file.stat().st_size for file in logs.iterdir())

    client = server.client()
    client.predict(MODEL, digit)
    before = size()
    for _ in range(100):
        client.predict(MODEL, digit)
    return (size() - before) / 100


def test_requests_leave_no_lines(torchserve: RunningServer, digit: bytes) -> None:
    """The logs grow by a few bytes a request at most, and still say what a worker does when it loads."""
    assert bytes_a_request(torchserve, digit) < 20
    assert "Serving with variant" in (torchserve.key_file.parent / "logs" / "model_log.log").read_text()


@pytest.mark.slow
@pytest.mark.server
def test_torchserves_own_settings_leave_lines(
    model_store: Path, tmp_path: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with the settings in its jar the logs grow by kilobytes a request."""
    [jar] = Path(ts.__file__).parent.glob("frontend/model-server.jar")
    with zipfile.ZipFile(jar) as archive:
        monkeypatch.setattr(launch, "LOG_CONFIG", Path(archive.extract("log4j2.xml", tmp_path)))
    with started(tmp_path / "own", model_store) as server:
        assert bytes_a_request(server, digit) > 1000


@pytest.mark.slow
@pytest.mark.server
def test_logs_are_bounded(model_store: Path, tmp_path: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is full moves to one of five compressed files, and what was in the oldest is gone."""
    small = tmp_path / "log4j2.xml"
    settings = launch.LOG_CONFIG.read_text()
    assert settings.count(">20 MB<") == 1
    small.write_text(settings.replace(">20 MB<", ">2 KB<"))
    monkeypatch.setattr(launch, "LOG_CONFIG", small)
    monkeypatch.setenv("LOG_LEVEL", "debug")
    with started(tmp_path / "run", model_store) as server:
        bytes_a_request(server, digit)
    logs = tmp_path / "run" / "logs"
    assert {file.name for file in logs.glob("ts_log.*.gz")} == {f"ts_log.{number}.log.gz" for number in range(1, 6)}
    assert "Loading initial models" not in "".join(
        gzip.decompress(file.read_bytes()).decode() for file in logs.glob("ts_log.*.gz")
    )
    assert (logs / "ts_log.log").stat().st_size < 4096


@pytest.mark.slow
@pytest.mark.server
def test_workers_that_outlive_their_server_are_ended(model_store: Path, tmp_path: Path) -> None:
    """A killed TorchServe leaves a worker that hangs, and its temp folder; stopping its directory ends both."""
    launch.start(tmp_path, model_store, CONFIG, free_ports())
    java, workers = processes.find(tmp_path), processes.workers(tmp_path)
    assert java is not None
    assert workers
    for worker in workers:
        worker.suspend()
    java.kill()
    assert processes.wait([java], 10) == []
    assert processes.temp_dir(tmp_path).exists()
    assert all(processes.is_alive(worker) for worker in workers)
    assert processes.stop(tmp_path) is None
    assert not any(processes.is_alive(worker) for worker in workers)
    assert not processes.temp_dir(tmp_path).exists()


def test_a_server_is_found_under_another_temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is cleared away, wherever that of who clears is; a link of another run directory is not followed."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine / "logs", other, tmp_path / "copy" / "logs"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = processes.make_temp_dir(mine)
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    assert processes.temp_dir(mine) == made
    shutil.copy(mine / "logs" / "temp", tmp_path / "copy" / "logs", follow_symlinks=False)
    processes.clear(tmp_path / "copy")
    assert made.exists()
    processes.clear(mine)
    assert not made.exists()
    assert processes.temp_dir(mine).parent == other


@pytest.mark.slow
@pytest.mark.server
def test_the_scripts_see_paths_from_where_they_are_called(run: Path, tmp_path: Path, short: Path) -> None:
    """A run directory, a model store and a key named from another folder; stopped under another TMPDIR, all is gone."""
    if not (Path(sys.prefix) / "installed.lock").is_file():
        pytest.skip("the environment was not made by scripts/setup.sh")
    (tmp_path / "store").mkdir()
    keygen(tmp_path / "key")
    build(run, MODEL, "1.0", tmp_path / "store", private_key=tmp_path / "key")

    def script(name: str, *options: str, temp: str, key: str = "key.pub") -> subprocess.CompletedProcess[str]:
        (short / temp).mkdir(exist_ok=True)
        place = {"TMPDIR": str(short / temp), "TEMP": str(short / temp), environment.PUBLIC_KEY_VARIABLE: key}
        return subprocess.run(
            [ROOT / "scripts" / name, *options], cwd=tmp_path, env={**os.environ, **place},
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    place = ("--run-dir", "here")
    options = ("cpu", *place, "--model-store", "store", "--port", str(free_ports()))
    assert "absent" in script("serve.sh", *options, temp="a", key="absent").stderr
    started = script("serve.sh", *options, temp="a")
    try:
        assert started.returncode == 0, started.stderr
        assert f"tokens      {tmp_path / 'here' / 'key_file.json'}" in started.stdout
        assert started.stderr == ""
        assert list((short / "a").glob("torchserve-*"))
    finally:
        stopped = script("stop.sh", *place, temp="b")
    assert stopped.stdout == f"stopped the server in {tmp_path / 'here'}\n"
    assert not list((short / "a").glob("torchserve-*"))
    assert not processes.family(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.server
def test_two_servers_side_by_side(torchserve: RunningServer, model_store: Path, tmp_path: Path, digit: bytes) -> None:
    """A second server on other ports answers like the first; stopping it leaves the first alone and nothing behind."""
    run_dir = tmp_path / "second"
    run_dir.mkdir()
    with started(run_dir, model_store) as second:
        assert second.client().predict(MODEL, digit) == torchserve.client().predict(MODEL, digit)
        with pytest.raises(AlreadyRunning):
            launch.start(run_dir, model_store, CONFIG, first_port=free_ports())
        process = processes.find(run_dir)
        assert process is not None
        family = [process, *process.children(recursive=True)]
        assert len(family) >= 2
    assert not [member for member in family if processes.is_alive(member)]
    assert not processes.temp_dir(run_dir).exists()
    assert not (run_dir / "key_file.json").exists()
    assert torchserve.client().ready_workers(MODEL) == 1
    shutil.rmtree(run_dir)
