"""What an edge refuses for being too much or too slow, each beside an edge without that limit, which lets it pass."""

from __future__ import annotations

import re
import select
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import MODEL, ROOT, free_ports, wait_for
from tests.edges import KEY, RunningEdge, before_nothing, ended, make_folder, running, substitute

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx")

GATEWAY = ROOT / "deploy" / "kubernetes" / "kserve" / "listen.conf"
BODY_TIMEOUT_S = 2.0
BURST = 500
"""Requests above the rate that the shipped nginx.conf lets pass."""
EACH = 900
"""Requests of one connection, which nginx ends after a thousand."""
EACH_FORWARDED = 450
"""Of one client behind a gateway: fewer than the burst, and several times that are more."""
HEADER = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer {KEY}\r\n"


def edge_in(place: Path, *changes: tuple[str, str]) -> Iterator[RunningEdge]:
    """With no server: what it lets pass gets 503."""
    port = free_ports()
    folder = make_folder(place / "edge", port, before_nothing(port))
    for old, new in changes:
        substitute(folder / "nginx.conf", old, new)
    with running(folder, port, wait=False) as edge:
        wait_for(lambda: "edge: serves" in edge.said, "the edge serves")
        yield edge


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """As it is shipped, but for a timeout that a test can wait for."""
    short = ("client_body_timeout 10s", f"client_body_timeout {BODY_TIMEOUT_S:g}s")
    yield from edge_in(tmp_path_factory.mktemp("limited"), short)


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """Without the rate, and with longer patience."""
    rate = ("limit_req zone=requests burst=500 nodelay;", "")
    patience = ("client_body_timeout 10s", "client_body_timeout 60s")
    yield from edge_in(tmp_path_factory.mktemp("unlimited"), rate, patience)


@pytest.fixture(scope="module")
def behind_a_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """With what KServe's edge knows of gateways; this machine is one."""
    lines = "".join(re.findall(r"^(?:set_)?real_ip_.*\n", GATEWAY.read_text(), flags=re.MULTILINE))
    change = ("        include listen.conf;\n", f"include listen.conf;\n{lines}set_real_ip_from 127.0.0.0/8;\n")
    yield from edge_in(tmp_path_factory.mktemp("gateway"), change)


def connect(edge: RunningEdge, source: str) -> socket.socket:
    connection = socket.create_connection(edge.address, source_address=(source, 0))
    connection.settimeout(60)
    return connection


def statuses(edge: RunningEdge, source: str, count: int, header: str = HEADER) -> Counter[int]:
    """Of so many requests from one address, sent one after another without waiting for the answers."""
    with connect(edge, source) as connection, ThreadPoolExecutor(1) as pool:
        request = f"{header}Content-Length: 0\r\n"
        sent = pool.submit(
            connection.sendall, (f"{request}\r\n" * (count - 1) + f"{request}Connection: close\r\n\r\n").encode()
        )
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
        sent.result()
    return Counter(map(int, re.findall(rb"^HTTP/1\.1 (\d+)", answers, flags=re.MULTILINE)))


def test_a_burst_is_refused_beyond_its_share(edge: RunningEdge, unlimited: RunningEdge) -> None:
    """From one address some of a burst pass and the rest get 429; neither another address nor a refusal counts."""
    with ThreadPoolExecutor(2) as pool:
        limited = sum(pool.map(lambda _: statuses(edge, "127.0.0.4", EACH), range(2)), Counter[int]())
        assert statuses(edge, "127.0.0.5", EACH, HEADER.replace(KEY, "wrong")) == {401: EACH}
        assert statuses(edge, "127.0.0.5", 10) == {503: 10}
        without = sum(pool.map(lambda _: statuses(unlimited, "127.0.0.4", EACH), range(2)), Counter[int]())
    assert set(limited) == {429, 503}
    assert limited.total() == 2 * EACH
    assert limited[503] >= BURST
    assert without == {503: 2 * EACH}


def test_clients_of_a_gateway_are_told_apart(edge: RunningEdge, behind_a_gateway: RunningEdge) -> None:
    """By the address that it saw, whatever they say before that; without that they share one address's limits."""

    def statuses_of(edge: RunningEdge, forwarded: list[str]) -> Counter[int]:
        """Of one client for each forwarded address, all by way of one gateway."""
        headers = [f"{HEADER}X-Forwarded-For: {each}\r\n" for each in forwarded]
        return sum((statuses(edge, "127.0.0.7", EACH_FORWARDED, header) for header in headers), Counter[int]())

    clients = [f"203.0.113.{number}" for number in range(4)]
    liars = [f"{other}, 198.51.100.1, 10.0.0.1" for other in clients]
    assert statuses_of(behind_a_gateway, clients) == {503: 4 * EACH_FORWARDED}
    assert set(statuses_of(behind_a_gateway, liars)) == {429, 503}
    assert set(statuses_of(edge, clients)) == {429, 503}


def test_a_body_that_pauses_is_cut(edge: RunningEdge, unlimited: RunningEdge) -> None:
    """After the time for a pause; a body that takes longer in all but goes on coming is answered."""
    length = 16
    header = f"{HEADER}Content-Length: {length}\r\n\r\n".encode()
    with connect(edge, "127.0.0.6") as pausing, connect(unlimited, "127.0.0.6") as borne:
        for connection in (pausing, borne):
            connection.sendall(header + b"x")
        started = time.monotonic()
        assert ended(pausing)
        assert BODY_TIMEOUT_S * 0.9 < time.monotonic() - started < BODY_TIMEOUT_S + 10
        assert select.select([borne], [], [], 0)[0] == []
    with connect(edge, "127.0.0.6") as slow:
        slow.sendall(header)
        started = time.monotonic()
        for _ in range(length):
            assert select.select([slow], [], [], BODY_TIMEOUT_S / 8)[0] == []
            slow.sendall(b"x")
        assert slow.recv(12) == b"HTTP/1.1 503"
        assert time.monotonic() - started > 1.5 * BODY_TIMEOUT_S
