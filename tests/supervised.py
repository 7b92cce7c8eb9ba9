"""A server in the foreground, to be stopped and killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import requests

from server import processes
from tests.conftest import MODEL, ROOT, free_ports, signals_of_a_terminal

STARTED_AGAIN_WITHIN_S = 10.0
START_TIMEOUT_S = 60.0


class Supervised:
    """`python -m server start --foreground` in a directory and on ports of its own."""

    def __init__(self, run_dir: Path, model_store: Path, *options: str) -> None:
        self.run_dir = run_dir
        run_dir.mkdir()
        first = free_ports()
        self.url = f"http://127.0.0.1:{first}/predictions/{MODEL}"
        self.output = run_dir / "output.txt"
        command = [
            sys.executable, "-m", "server", "start", "cpu", "--foreground", "--port", str(first),
            "--run-dir", str(run_dir), "--model-store", str(model_store), *options,
        ]  # fmt: skip
        with self.output.open("wb") as output, signals_of_a_terminal():
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        self.ready = run_dir / "logs" / "ready"

    def wait(self, condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.output.read_text()
            threading.Event().wait(0.05)

    def wait_until_ready(self) -> None:
        self.wait(lambda: self.ready.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.output.read_text()

    def java(self) -> psutil.Process:
        found = processes.find(self.run_dir)
        assert found is not None, self.output.read_text()
        return found

    def is_started_again(self, earlier: psutil.Process) -> bool:
        found = processes.find(self.run_dir)
        return found is not None and found.pid != earlier.pid

    def header(self) -> dict[str, str]:
        keys = json.loads((self.run_dir / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys['inference']['key']}"}

    def load(self, image: bytes, requests_each: int | None, answered: threading.Event) -> list[int]:
        """One client's statuses, up to the first that is not 200; 0 is a connection that was cut."""
        statuses: list[int] = []
        header = self.header()
        with requests.Session() as session:
            session.trust_env = False
            while len(statuses) != requests_each:
                try:
                    statuses.append(session.post(self.url, data=image, headers=header, timeout=60).status_code)
                except requests.ConnectionError:
                    statuses.append(0)
                if statuses[-1] != 200:
                    break
                if len(statuses) == 5:
                    answered.set()
        return statuses

    def leaves_nothing(self) -> bool:
        left = [processes.find(self.run_dir), processes.find_supervisor(self.run_dir), *processes.family(self.run_dir)]
        files = [processes.temp_dir(self.run_dir), self.run_dir / "key_file.json", self.ready]
        return not any(left) and not any(file.exists() for file in files)
