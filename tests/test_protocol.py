"""What TorchServe's frontend sends, read by the worker in large pieces: the same requests, in fewer system calls."""

from __future__ import annotations

import importlib.util
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing
from types import ModuleType
from typing import Any

import pytest
from ts.protocol import otf_message_handler as mended

import handler.image_classifier  # noqa: F401  # it mends TorchServe when it is imported

HEADERS = {b"Host": b"127.0.0.1:8080", b"accept": b"*/*", b"content-length": b"3", b"Content-Type": b"image/png"}


class CountingSocket(socket.socket):
    """Counts how often the system is asked for bytes."""

    calls = 0

    def recv(self, *arguments: Any) -> bytes:
        self.calls += 1
        return super().recv(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self.calls += 1
        return super().recv_into(*arguments)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, CountingSocket]]:
    """The frontend's end of a connection, and the worker's."""
    frontend, plain = socket.socketpair()
    worker = CountingSocket(fileno=plain.detach())
    worker.settimeout(None)
    with closing(frontend), closing(worker):
        yield frontend, worker


@pytest.fixture
def stock() -> ModuleType:
    """TorchServe's module as it comes."""
    spec = importlib.util.find_spec(mended.__name__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def field(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def message(*bodies: bytes) -> bytes:
    """A batch as the frontend writes it: a command, and for each request its id, headers and inputs."""
    end = struct.pack("!i", -1)
    rows = []
    for index, body in enumerate(bodies):
        headers = b"".join(field(name) + field(value) for name, value in HEADERS.items())
        rows.append(field(b"id-%d" % index) + headers + end + field(b"body") + field(b"") + field(body) + end)
    return b"I" + b"".join(rows) + end


def received(connection: socket.socket, module: ModuleType, sent: bytes, worker: socket.socket, piece: int) -> Any:
    def send() -> None:
        for at in range(0, len(sent), piece):
            connection.sendall(sent[at : at + piece])

    sending = threading.Thread(target=send)
    sending.start()
    try:
        return module.retrieve_msg(worker)
    finally:
        sending.join()


@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_requests_are_those_that_torchserve_reads(
    ends: tuple[socket.socket, CountingSocket], stock: ModuleType, piece: int
) -> None:
    """Whatever the pieces in which they come: empty bodies, and such as are longer than the buffer."""
    sent = message(b"", b"PNG", bytes(range(256)) * 1000 if piece > 1 else b"x" * 300)
    theirs = received(ends[0], stock, sent, ends[1], piece)
    for _ in range(2):
        assert received(ends[0], mended, sent, ends[1], piece) == theirs
    assert [request["requestId"] for request in theirs[1]] == [b"id-0", b"id-1", b"id-2"]


def test_a_request_takes_few_system_calls(ends: tuple[socket.socket, CountingSocket], stock: ModuleType) -> None:
    """Some thirty for each request in TorchServe's way; one for several requests in ours."""
    frontend, worker = ends
    sent = message(*[b"PNG"] * 8)
    for module, fewest, most in ((stock, 200, 1000), (mended, 1, 8)):
        frontend.sendall(sent)
        before = worker.calls
        module.retrieve_msg(worker)
        assert fewest <= worker.calls - before <= most


def test_the_frontends_end_is_the_workers(ends: tuple[socket.socket, CountingSocket]) -> None:
    """In the middle of a message as between two."""
    frontend, worker = ends
    frontend.sendall(message(b"PNG")[:-6])
    frontend.shutdown(socket.SHUT_WR)
    with pytest.raises(SystemExit) as ended:
        mended.retrieve_msg(worker)
    assert ended.value.code == 0
