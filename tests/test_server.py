"""Starting and stopping: ports, configuration, broken archives, and one server beside another."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import psutil
import pytest

from server import launch, processes
from server.config import ServerConfig
from server.errors import AlreadyRunning, ConfigError, PortTaken, StartFailed
from server.launch import RunningServer
from tests.broken import repacked, replaced
from tests.conftest import CONFIG, MODEL, free_ports


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


def test_stop_without_a_server_is_no_error(tmp_path: Path) -> None:
    """Stopping twice is harmless."""
    assert processes.stop(tmp_path) is None


def test_an_archive_that_cannot_load_fails_the_start_with_its_reason(
    torchserve: RunningServer, model_store: Path, tmp_path: Path
) -> None:
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
    with pytest.raises(StartFailed, match=r"GoldenMismatch: digit-\d+\.png, class"):
        launch.start(run_dir, store, CONFIG, first_port=free_ports())
    assert processes.find(run_dir) is None


def test_a_server_that_ends_at_once_says_why(model_store: Path, tmp_path: Path) -> None:
    """A configuration that TorchServe cannot read ends it; its own last words are passed on."""
    config = tmp_path / "broken.properties"
    config.write_text(CONFIG.read_text() + "job_queue_size=many\n")
    with pytest.raises(StartFailed, match=r"TorchServe ended: .*console\.log"):
        launch.start(tmp_path, model_store, config, first_port=free_ports())
    assert processes.find(tmp_path) is None


def test_two_servers_side_by_side(torchserve: RunningServer, model_store: Path, tmp_path: Path, digit: bytes) -> None:
    """A second server on other ports answers like the first; stopping it leaves the first alone and nothing behind."""
    run_dir = tmp_path / "second"
    run_dir.mkdir()
    second = launch.start(run_dir, model_store, CONFIG, first_port=free_ports())
    try:
        assert second.client().predict(MODEL, digit) == torchserve.client().predict(MODEL, digit)
        with pytest.raises(AlreadyRunning):
            launch.start(run_dir, model_store, CONFIG, first_port=free_ports())
        process = processes.find(run_dir)
        assert process is not None
        family = [process, *process.children(recursive=True)]
        assert len(family) >= 2
    finally:
        processes.stop(run_dir)
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert not processes.temp_dir(run_dir).exists()
    assert not (run_dir / "key_file.json").exists()
    assert torchserve.client().ready_workers(MODEL) == 1
    shutil.rmtree(run_dir)
