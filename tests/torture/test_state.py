"""What a server remembers and what time it is: neither may decide how it serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from client.tokens import Tokens
from client.torchserve import TorchServe
from operate.tuning.load import SUCCESS
from server import launch, processes
from server.config import ServerConfig
from server.launch import RunningServer
from tests.conftest import CONFIG, MODEL, ROOT, free_ports, wait_for
from tests.torture.conftest import Record, start_bare

pytestmark = [pytest.mark.torture, pytest.mark.server, pytest.mark.slow]

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
DURATION_S = 6.0


def stop_keeping_temp(run_dir: Path) -> None:
    """End TorchServe in order, so that it writes what it remembers."""
    java = processes.find(run_dir)
    assert java is not None
    java.terminate()
    assert processes.wait([java], 30) == []


def test_the_declared_state_wins_over_a_snapshot(model_store: Path, tmp_path: Path) -> None:
    """The control: TorchServe alone restores the two workers it remembers. Started by us it has the declared one."""
    port = free_ports()
    client = TorchServe(f"http://127.0.0.1:{port}", key_file=tmp_path / "key_file.json")
    config = tmp_path / "config.properties"
    config.write_text(ServerConfig.read(CONFIG).with_absolute_paths().on_ports(port).text)
    processes.temp_dir(tmp_path).mkdir()
    (tmp_path / "logs").mkdir()
    try:
        start_bare(tmp_path, model_store, "--models", f"{MODEL}={MODEL}.mar", "--ts-config", config)
        client.wait_until_ready(MODEL)
        client.scale(MODEL, 2)
        stop_keeping_temp(tmp_path)
        assert list((tmp_path / "logs" / "config").glob("*.cfg"))

        start_bare(tmp_path, model_store)
        client.wait_until_ready(MODEL)
        wait_for(lambda: client.ready_workers(MODEL) == 2, "what TorchServe remembers", 60)
        stop_keeping_temp(tmp_path)

        assert launch.start(tmp_path, model_store, CONFIG, port).models == {MODEL: 1}
        assert client.describe(MODEL)["minWorkers"] == 1
    finally:
        processes.stop(tmp_path)
        shutil.rmtree(processes.temp_dir(tmp_path), ignore_errors=True)


class JumpingClient:
    """`python -m operate load` in a process whose clock can be set."""

    def __init__(self, server: RunningServer, image: bytes, folder: Path) -> None:
        self.clock, picture = folder / "clock", folder / "digit.png"
        self.set("+0")
        picture.write_bytes(image)
        place = ("--url", server.inference_url, "--key-file", str(server.key_file))
        command = (*place, "load", MODEL, "--images", str(picture), "--duration", f"{DURATION_S:g}", "--json")
        environment = {
            **os.environ,
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "operate", *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> JumpingClient:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()

    def set(self, ahead: str) -> None:
        self.clock.write_text(ahead)

    def counts(self) -> dict[str, int]:
        """What became of its requests, once it has ended."""
        output, _ = self.process.communicate(timeout=120)
        counts: dict[str, int] = json.loads(output)["counts"]
        return counts


@pytest.mark.skipif(FAKETIME is None, reason="no libfaketime: install your system's package faketime")
def test_a_clock_that_jumps(tortured: RunningServer, digit: bytes, tmp_path: Path, record: Record) -> None:
    """A client's clock jumps past the end of its token and back under load: a new token, and no request fails."""

    keys = Tokens(tortured.key_file, environment={})
    old = keys.token("inference")
    with JumpingClient(tortured, digit, tmp_path) as steady:
        assert set(steady.counts()) == {SUCCESS}
    assert keys.token("inference") == old, "the control: a clock that does not jump costs no token"

    with JumpingClient(tortured, digit, tmp_path) as jumping:
        wait_for(lambda: has_connection(jumping.process.pid), "its first request", 60)
        jumping.set("+2h")
        wait_for(lambda: keys.token("inference") != old, "a new token", 60)
        jumping.set("-2h")
        counts = jumping.counts()
    record("answers", counts)
    assert set(counts) == {SUCCESS}


def has_connection(pid: int) -> bool:
    return any(connection.status == psutil.CONN_ESTABLISHED for connection in psutil.Process(pid).net_connections())
