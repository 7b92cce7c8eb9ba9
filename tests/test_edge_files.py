"""What an edge makes of its folder, with no server behind it: files, tokens, golden images, and a share on a lease."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from client.errors import ClientError
from client.torchserve import TorchServe
from operate.edge import nginx
from operate.edge import servers as edge_servers
from operate.edge.backends import Look, Server, State
from operate.edge.edge import Edge
from operate.edge.nginx import Nginx
from operate.edge.share import LEASE_S, EdgeShare
from operate.errors import EdgeUnusable, NotAsMeasured
from operate.golden import GoldenFile
from tests.conftest import MODEL, ROOT, free_ports, wait_for
from tests.edges import (
    KEY,
    SAID,
    TAKEN_BACK_WITHIN_S,
    TEMPLATE,
    RunningEdge,
    before_nothing,
    make_folder,
    plain_session,
    running,
    start,
    substitute,
)

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx")


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """Before a server that is not there."""
    port = free_ports()
    folder = make_folder(tmp_path_factory.mktemp("edge") / "edge", port, before_nothing(port))
    with running(folder, port, wait=False) as edge:
        wait_for(lambda: "edge: serves" in edge.said, "the edge serves")
        yield edge


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if not line.startswith("#")]


RENEWING = """
import sys, threading
from pathlib import Path
from operate.edge.share import EdgeShare
share = EdgeShare(Path(sys.argv[1]))
share.withdraw()
share.give("digits", "2.0", 0.25)
print("given", flush=True)
threading.Event().wait()
"""


@pytest.mark.slow
def test_a_share_is_taken_back_once_nobody_renews_it(edge: RunningEdge) -> None:
    """As a rollout uses it: kept for twice the lease while that lives; after SIGKILL gone in time, which is said."""
    canary = edge.folder / "canary.conf"
    none = lines(canary)
    with subprocess.Popen(
        [sys.executable, "-c", RENEWING, str(canary)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "given\n"
        given, shared = time.monotonic(), lines(canary)
        assert shared != none
        wait_for(lambda: lines(canary) != shared or time.monotonic() > given + 2 * LEASE_S, "the lease's end")
        assert lines(canary) == shared
        process.kill()
    assert wait_for(lambda: lines(canary) == none, "the share is taken back") < TAKEN_BACK_WITHIN_S
    wait_for(lambda: "error: the share in canary.conf was not renewed for 5 s" in edge.said, "the edge says so")
    wait_for(lambda: not (edge.folder / "run" / "share-lease").exists(), "the lease is gone")
    canary.write_text("\n".join(shared))
    written = time.monotonic()
    wait_for(lambda: lines(canary) != shared or time.monotonic() > written + 2 * LEASE_S, "a lease's end")
    assert lines(canary) == shared, "what was written by hand has no lease"
    canary.write_text((TEMPLATE / "canary.conf").read_text())


def test_a_change_that_was_killed_is_ended(edge: RunningEdge) -> None:
    """Its mark would end every connection after one answer; while who makes the change lives, it stays."""
    closing, lock = edge.folder / "run" / "closing", edge.folder / "run" / "lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        closing.touch()
        assert not Nginx(edge.folder).was_left_changing()
    wait_for(lambda: not closing.exists(), "the mark is gone")


def test_one_edge_watches_over_a_folder(edge: RunningEdge, tmp_path: Path) -> None:
    """A second one is refused, as is a share at an nginx over which nobody watches, or in another file."""
    assert command(edge.folder).stderr == f"error: an edge runs in {edge.folder} already\n"
    assert edge.process.poll() is None
    with pytest.raises(EdgeUnusable, match="name that one in a copy of"):
        EdgeShare(edge.folder / "keys.conf")
    port = free_ports()
    folder = make_folder(tmp_path / "edge", port, before_nothing(port))
    with running(folder, port, wait=False) as watched:
        wait_for(lambda: "edge: serves" in watched.said, "the edge serves")
        EdgeShare(folder / "canary.conf")
        watched.process.kill()
        watched.process.wait()
        assert Nginx(folder).is_running()
        with pytest.raises(EdgeUnusable, match="no edge runs in"):
            EdgeShare(folder / "canary.conf")
        with (folder / SAID).open("wb") as said:
            watched.process = start(folder, said.fileno())
        wait_for(lambda: "edge: serves" in watched.said, "the edge serves")


@pytest.mark.server
def test_a_closed_terminal_ends_an_edge_in_order(tmp_path: Path) -> None:
    """As SIGTERM does: nginx goes with it."""
    port = free_ports()
    folder = make_folder(tmp_path / "edge", port, before_nothing(port))
    with running(folder, port, wait=False) as edge:
        wait_for(lambda: "edge: serves" in edge.said, "the edge serves")
        edge.process.send_signal(signal.SIGHUP)
        assert edge.process.wait(timeout=90) == 0
        assert not Nginx(folder).is_running()


def test_golden_images_are_read_when_they_change(run: Path, tmp_path: Path) -> None:
    """Once for each change; a file that is spoilt is said, and leaves what was there."""
    place = Path(shutil.copytree(run / "golden", tmp_path / "golden"))
    golden = GoldenFile(place)
    first = golden.images
    golden.refresh()
    assert golden.images is first
    document = json.loads((place / "golden.json").read_text())
    document["tolerance"] = 0.5
    (place / "golden.json").write_text(json.dumps(document))
    golden.refresh()
    assert {image.tolerance for image in golden.images} == {0.5}
    (place / "golden.json").write_text("{")
    for _ in range(2):
        with pytest.raises(NotAsMeasured):
            golden.refresh()
    assert {image.tolerance for image in golden.images} == {0.5}


def test_the_shipped_keys_let_nobody_in() -> None:
    """As long as keys.conf is as it was copied."""
    entries = [line for line in (TEMPLATE / "keys.conf").read_text().splitlines() if not line.startswith("#")]
    assert "".join(entries).replace(" ", "") == 'map$http_authorization$client{default"";}'


class Unrenewable:
    """A backend whose token cannot be renewed, or can."""

    def __init__(self, name: str, renewed: str | None) -> None:
        self.entry = edge_servers.ServerEntry(name=name, url="http://127.0.0.1:9", key_file=Path("none.json"))
        self.credential, self.renewed = "old", renewed

    def renew(self) -> None:
        if self.renewed is None:
            raise ClientError("no API key")
        self.credential = self.renewed


@pytest.mark.server
def test_a_token_that_cannot_be_renewed_keeps_no_other_from_nginx(tmp_path: Path) -> None:
    """The problem is told, and what the other server exchanged at the same time is what nginx sends."""
    edge = Edge(make_folder(tmp_path / "edge", free_ports(), {"models": {}, "servers": []}))
    backends = [Unrenewable("a", None), Unrenewable("b", "exchanged")]
    edge.backends = list(backends)
    edge._follow([])
    try:
        with pytest.raises(ClientError, match="no API key"):
            edge._follow(backends)
        written = (edge.nginx.run / "servers.conf").read_text()
        assert re.findall(r"Bearer (\w+)", written) == ["old", "exchanged"]
    finally:
        edge.nginx.stop()


@pytest.mark.server
def test_nginx_has_a_worker_for_each_core_of_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each core of the machine; also after a new configuration."""
    edge = Edge(make_folder(tmp_path / "edge", free_ports(), {"models": {}, "servers": []}))
    cores = (os.cpu_count() or 1) + 1
    monkeypatch.setattr(nginx, "cores", lambda: cores)
    edge.backends = [Unrenewable("a", None)]
    edge._follow([])
    try:
        master = psutil.Process(int((edge.nginx.run / "nginx.pid").read_text()))
        wait_for(lambda: len(master.children()) == cores, "the workers")
        first = set(master.children())
        with edge.nginx.change():
            pass
        wait_for(lambda: len(set(master.children()) - first) == cores, "as many new ones")
    finally:
        edge.nginx.stop()


def asked(port: int, key: str) -> int:
    """The status of a prediction."""
    with plain_session(key) as session:
        return session.post(f"http://127.0.0.1:{port}/predictions/{MODEL}", timeout=30).status_code


@pytest.mark.server
def test_the_documented_lines_let_a_key_in_and_write_down_who_asks(tmp_path: Path) -> None:
    """The sed of "Starting it" and the change of "Who may ask": the key's name and the status."""
    page = (ROOT / "docs" / "edge.md").read_text()
    [sed] = re.findall(r"^sed -i .*$", page, flags=re.MULTILINE)
    assert 'remove the line `"~^0\\.[0-4]" 0;`' in page
    port = free_ports()
    folder = make_folder(tmp_path / "edge", port, before_nothing(port))
    shutil.copy(TEMPLATE / "keys.conf", folder / "keys.conf")
    subprocess.run(["bash", "-ec", sed], cwd=folder, check=True, env={**os.environ, "KEY": KEY})
    substitute(folder / "nginx.conf", '"~^0\\.[0-4]" 0;', "")
    with running(folder, port, wait=False) as edge:
        wait_for(lambda: "edge: serves" in edge.said, "the edge serves")
        assert [asked(port, KEY), asked(port, "another")] == [503, 401]
        log = folder / "logs" / "access.log"
        wait_for(lambda: len(log.read_text().splitlines()) == 2, "both are written down")
        written = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["client"], line["status"]) for line in written} == {("me", 503), ("", 401)}


@pytest.mark.parametrize(
    ("ready", "state", "reason"),
    [(2, "ready", ""), (1, "slow", f"{MODEL}: 1 of 2 workers ready"), (0, "out", f"{MODEL}: 0 of 2 workers ready")],
)
def test_a_server_with_some_of_its_workers_is_a_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: int, state: State, reason: str
) -> None:
    """One of two will do where nobody else is ready; none will not."""
    (tmp_path / "key_file.json").write_text('{"inference": {"key": "token"}}')
    entry = edge_servers.ServerEntry(name="a", url="http://127.0.0.1:9", key_file=Path("key_file.json"))
    states = ["READY"] * ready + ["UNLOADING"] * (2 - ready)
    description = {"minWorkers": 2, "workers": [{"status": status} for status in states]}
    monkeypatch.setattr(TorchServe, "describe", lambda self, model, **_: description)
    assert Server(entry, tmp_path, {MODEL: None}).look() == Look(state, reason)


def command(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "operate", "edge", str(folder)],
        cwd=ROOT, env=environment or None, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.server
def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    """No folder, no certificate, no nginx: one line, exit 1, nothing left running."""
    assert re.fullmatch(r"error: \S+ has no nginx.conf: copy deploy/nginx there first.*\n", command(tmp_path).stderr)
    folder = make_folder(tmp_path / "edge", free_ports(), yaml.safe_load((TEMPLATE / "servers.yaml").read_text()))
    (folder / "certificate.pem").unlink()
    missing = command(folder)
    assert missing.returncode == 1
    assert re.fullmatch(r"error: nginx in \S+: cannot load certificate .*\n", missing.stderr)
    without = command(folder, PATH="/nowhere")
    assert without.stderr == "error: there is no program nginx: install your system's package nginx\n"
    given = command(folder, TORCHSERVE_INFERENCE_TOKEN="x")
    assert given.stderr.startswith("error: unset TORCHSERVE_INFERENCE_TOKEN: each server behind an edge")
    assert not Nginx(folder).is_running()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models: {m: }\nservers: []", "list at least one server or edge"),
        ("servers: [{name: a, url: 'http://h:1', key_file: k}]", "list the models"),
        ("models: {m: }\nservers: [{name: a, url: 'http://h:1', keyfile: k}]", "servers.0.key_file: field required"),
        ("models: {m: }\nservers: [{name: 'a;', url: 'http://h:1', key_file: k}]", "servers.0.name: string should"),
        ("models: {m: }\nservers: [{name: a, url: 'https://h:1', key_file: k}]", "servers.0.url: string should"),
        ("edges: [{name: a, url: 'http://h:1', key_file: k, certificate_authority: c}]", "edges.0.url: string should"),
        ("models: {m: }\nservers:\n" + "  - {name: a, url: 'http://h:1', key_file: k}\n" * 2, "names of servers and"),
        ("models: {m: }\nservers: [{name: a, url: 'http://h:1', key_file: k, weight: 0}]", "servers.0.weight: input"),
        ("servers: [", "not valid YAML"),
    ],
)
def test_servers_yaml_is_read_strictly(tmp_path: Path, text: str, complaint: str) -> None:
    """Every mistake is named with its key, and no value can become a directive of nginx."""
    file = tmp_path / "servers.yaml"
    file.write_text(text)
    with pytest.raises(ClientError, match=re.escape(complaint)):
        edge_servers.read(file)


def test_what_is_shipped_can_be_read() -> None:
    """The list that deploy/nginx brings."""
    [server] = edge_servers.read(TEMPLATE / "servers.yaml").servers
    assert server.url == TorchServe().url
