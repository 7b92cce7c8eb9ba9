"""A real edge for tests: its folder, its process, and clients that ask it without end."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests
import yaml
from requests.adapters import HTTPAdapter

from operate.edge.nginx import Nginx
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT, signals_of_a_terminal, wait_for

TEMPLATE = ROOT / "deploy" / "nginx"
KEY = "0123456789abcdef" * 4
READ_TIMEOUT_S = 3.0
"""Where a test waits for it."""
HEADER_TIMEOUT_S = 2.0
TAKEN_BACK_WITHIN_S = 10.0
"""What docs/edge.md says of a share whose rollout was killed."""
SAID = ".said"
"""Hidden, since a change of what nginx may read is a reason for a new configuration."""
PAUSE_S = 0.02
"""Between two requests of one client: the servers are to be harmed, not measured."""


def plain_session(key: str | None = KEY, source: str = "127.0.0.1") -> requests.Session:
    """HTTP as any client speaks it, from an address of this machine."""
    session = requests.Session()
    session.trust_env = False
    adapter = HTTPAdapter()
    adapter.init_poolmanager(1, 1, source_address=(source, 0))
    session.mount("http://", adapter)
    if key is not None:
        session.headers["Authorization"] = f"Bearer {key}"
    return session


@dataclass
class RunningEdge:
    """An edge, its folder and what it has said so far."""

    folder: Path
    url: str
    https_url: str
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.folder / SAID).read_text()

    @property
    def address(self) -> tuple[str, int]:
        """Of plain HTTP."""
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def predict(self, image: bytes, key: str | None = KEY, model: str = MODEL) -> requests.Response:
        with plain_session(key) as session:
            return session.post(f"{self.url}/predictions/{model}", data=image, timeout=30)

    def ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/readyz", timeout=30).ok
        except requests.ConnectionError:
            return False

    def in_service(self) -> set[str]:
        return {mark.name for mark in (self.folder / "run" / "in-service").iterdir()}

    def configuration(self) -> str:
        """What nginx has of the servers."""
        return (self.folder / "run" / "servers.conf").read_text()

    def change_servers(self, key: str = "drained", otherwise: object = False, **values: object) -> None:
        """Give every server that `values` names this value of the key, and the others another one."""
        file = self.folder / "servers.yaml"
        document = yaml.safe_load(file.read_text())
        for entry in document["servers"]:
            entry[key] = values.get(entry["name"], otherwise)
        partial = file.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(document))
        partial.replace(file)


@dataclass
class Load:
    """Clients that ask one after another for as long as they are wanted: statuses and seconds of every request."""

    statuses: Counter[object] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def failed(self) -> dict[object, int]:
        return {status: count for status, count in self.statuses.items() if status != 200}

    @property
    def total(self) -> int:
        return self.statuses.total()


@contextmanager
def load(edge: RunningEdge, image: bytes, clients: int = 3) -> Iterator[Load]:
    """Predictions over connections that stay open, while the block runs and a little longer."""
    result, stop, lock = Load(), threading.Event(), threading.Lock()

    def ask() -> None:
        with plain_session() as session:
            while not stop.wait(PAUSE_S):
                started = time.monotonic()
                status: object
                try:
                    answer = session.post(f"{edge.url}/predictions/{MODEL}", data=image, timeout=60)
                    status = answer.status_code
                except requests.RequestException as error:
                    status = type(error).__name__
                with lock:
                    result.statuses[status] += 1
                    result.slowest_s = max(result.slowest_s, time.monotonic() - started)

    with ThreadPoolExecutor(clients) as pool:
        tasks = [pool.submit(ask) for _ in range(clients)]
        try:
            wait_for(lambda: result.total >= 2 * clients, "the load's first answers")
            yield result
            seen = result.total
            wait_for(lambda: result.total >= seen + 20 * clients, "the load's last answers")
        finally:
            stop.set()
        for task in tasks:
            task.result()


def make_folder(folder: Path, port: int, document: object, read_timeout_s: float = 30.0) -> Path:
    """A copy of deploy/nginx with a certificate and a key; a server is slow after a time that no busy machine needs."""
    shutil.copytree(TEMPLATE, folder)
    (folder / "listen.conf").write_text(
        f"listen 127.0.0.1:{port};\nlisten 127.0.0.1:{port + 1} ssl;\n"
        "ssl_certificate certificate.pem;\nssl_certificate_key certificate.key;\n"
    )
    subprocess.run(["bash", "-ec", certificate_command()], cwd=folder, check=True, capture_output=True)
    (folder / "keys.conf").write_text(f'map $http_authorization $client {{ default ""; "Bearer {KEY}" "tests"; }}\n')
    (folder / "servers.yaml").write_text(yaml.safe_dump(document))
    substitute(folder / "hop.conf", "proxy_read_timeout 10s", f"proxy_read_timeout {read_timeout_s:g}s")
    substitute(folder / "nginx.conf", "client_header_timeout 10s", f"client_header_timeout {HEADER_TIMEOUT_S:g}s")
    return folder


def certificate_command() -> str:
    """The documented line."""
    page = (ROOT / "docs" / "edge.md").read_text()
    [line] = re.findall(r"^(openssl req (?:.*\\\n)*.*)$", page, flags=re.MULTILINE)
    return str(line)


def without_retries(folder: Path) -> None:
    """Have no other server asked when one fails."""
    substitute(folder / "hop.conf", "error_page 502 503 = @failed;", "")
    substitute(folder / "hop.conf", "error_page 400 = @refused;", "error_page 400 = @gone;")


def ended(connection: socket.socket) -> bool:
    """Whether the other side ends it."""
    try:
        return not connection.recv(1) or True
    except ConnectionResetError:
        return True


def substitute(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@contextmanager
def running(
    folder: Path, port: int, *options: str, wait: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[RunningEdge]:
    """The command `edge` on a folder, until it is stopped in order."""
    with (folder / SAID).open("ab") as said:
        process = start(folder, said.fileno(), *options, environment=environment)
    edge = RunningEdge(folder, f"http://127.0.0.1:{port}", f"https://localhost:{port + 1}", process)
    try:
        if wait:
            wait_for(lambda: edge.ready() or process.poll() is not None, "the edge is ready")
            assert process.poll() is None, edge.said
        yield edge
    finally:
        edge.process.terminate()
        assert edge.process.wait(timeout=90) == 0, edge.said
        assert not Nginx(folder).is_running()


def start(
    folder: Path, output: int, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "operate", "edge", str(folder), *options]
    with signals_of_a_terminal():
        env = {**os.environ, **(environment or {})}
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)


def behind(servers: Mapping[str, RunningServer], golden: Path | None = None) -> dict[str, object]:
    """What servers.yaml says of them."""
    entries = [
        {
            "name": name,
            "url": server.inference_url,
            "management_url": server.management_url,
            "key_file": str(server.key_file),
        }
        for name, server in servers.items()
    ]
    return {"models": {MODEL: str(golden) if golden else None}, "servers": entries}


def before_nothing(port: int) -> dict[str, object]:
    """What servers.yaml says where nobody listens behind the edge on this port."""
    server = {"name": "a", "url": f"http://127.0.0.1:{port + 2}", "key_file": "none.json"}
    return {"models": {MODEL: None}, "servers": [server]}
