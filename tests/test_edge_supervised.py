"""An edge in front of two servers with --foreground, of which one dies or is stopped: no request fails."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server import processes
from tests.conftest import MODEL, free_ports, wait_for
from tests.edges import RunningEdge, load, make_folder, running, without_retries
from tests.supervised import STARTED_AGAIN_WITHIN_S, Supervised

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx"),
]

DRAIN_S = 90.0
"""Longer than a server takes to see that no requests come."""
Pair = dict[str, Supervised]


@pytest.fixture
def pair(model_store: Path, tmp_path: Path) -> Iterator[Pair]:
    """Two servers, each with its supervisor."""
    servers: Pair = {}
    try:
        for name in ("a", "b"):
            servers[name] = Supervised(tmp_path / name, model_store, "--drain-timeout-s", f"{DRAIN_S:g}")
        for server in servers.values():
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()
            processes.stop(server.run_dir)


@contextmanager
def edge_before(pair: Pair, folder: Path, *, retries: bool, ready_files: bool) -> Iterator[RunningEdge]:
    """An edge, with or without another try and the files `logs/ready`."""
    port = free_ports()
    servers: list[dict[str, str]] = [
        {
            "name": name,
            "url": server.url.partition("/predictions")[0],
            "key_file": str(server.run_dir / "key_file.json"),
            **({"ready_file": str(server.ready)} if ready_files else {}),
        }
        for name, server in pair.items()
    ]
    make_folder(folder, port, {"models": {MODEL: None}, "servers": servers})
    if not retries:
        without_retries(folder)
    with running(folder, port) as edge:
        wait_for(lambda: edge.in_service() == set(pair), "both servers are in service")
        yield edge


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_java_that_dies_fails_no_request(pair: Pair, digit: bytes, tmp_path: Path, number: signal.Signals) -> None:
    """Until its supervisor has brought it back into service: none; without retries there are some."""
    first = pair["a"]
    with (
        edge_before(pair, tmp_path / "edge", retries=True, ready_files=True) as edge,
        edge_before(pair, tmp_path / "careless", retries=False, ready_files=False) as careless,
        load(edge, digit) as result,
    ):
        java = first.java()
        with load(careless, digit) as without:
            java.send_signal(number)
            wait_for(lambda: without.failed, "a failed request of the edge without retries")
            wait_for(lambda: "a" not in edge.in_service(), "a is out of service")
        first.wait(lambda: first.is_started_again(java), STARTED_AGAIN_WITHIN_S)
        first.wait_until_ready()
        wait_for(lambda: "a" in edge.in_service(), "a is in service again")
        seen = result.total
        wait_for(lambda: result.total > seen + 100, "a hundred further answers")
    assert result.failed == {}


def test_a_server_that_is_stopped_is_drained_first(pair: Pair, digit: bytes, tmp_path: Path) -> None:
    """SIGTERM takes its ready file: an edge that looks at it sends no more, one that does not goes on asking."""
    first, second = pair["a"], pair["b"]
    with (
        edge_before(pair, tmp_path / "looking", retries=True, ready_files=True) as looking,
        load(looking, digit) as result,
    ):
        first.process.send_signal(signal.SIGTERM)
        wait_for(lambda: f"a: out of service: {first.ready} is not there" in looking.said, "the edge says so")
        assert first.process.wait(DRAIN_S / 2) == 0, first.output.read_text()
        assert "every request is answered" in first.output.read_text()
    assert result.failed == {}
    assert first.leaves_nothing()
    with (
        edge_before({"b": second}, tmp_path / "blind", retries=True, ready_files=False) as blind,
        load(blind, digit) as result,
    ):
        second.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not second.ready.exists(), "b is about to stop")
        seen = result.total
        wait_for(lambda: result.total > seen + 100, "a hundred further answers")
        assert blind.in_service() == {"b"}
    assert result.failed == {}
