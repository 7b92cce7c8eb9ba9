"""Requests that two servers may read differently. Behind the edge TorchServe sees one for each that the edge let pass;
asked directly it answers a second one, which was hidden in the first."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest
import requests

from client.tokens import Tokens
from server.launch import RunningServer
from tests.conftest import MODEL, free_ports
from tests.edges import KEY, RunningEdge, behind, make_folder, plain_session, running

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx"),
]

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: edge\r\n\r\n"
CHUNKED = b"0\r\n\r\n" + HIDDEN
TO_END, TO_HIDDEN = len(CHUNKED), 5
"""Lengths of a body: all that is sent, and what ends where the hidden request begins."""
HEAD = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer {KEY}\r\n".encode()


def asked(*headers: str, body: bytes = CHUNKED) -> bytes:
    return HEAD + "".join(f"{header}\r\n" for header in headers).encode() + b"\r\n" + body


ATTACKS = {
    "CL.TE": asked(f"Content-Length: {TO_END}", "Transfer-Encoding: chunked"),
    "TE.CL": asked("Transfer-Encoding: chunked", f"Content-Length: {TO_HIDDEN}"),
    "TE.TE, unknown first": asked("Transfer-Encoding: x", "Transfer-Encoding: chunked", f"Content-Length: {TO_END}"),
    "TE.TE, not chunked at last": asked(
        "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", f"Content-Length: {TO_END}"
    ),
    "TE.TE, list": asked("Transfer-Encoding: chunked, identity", f"Content-Length: {TO_END}"),
    "TE, almost chunked at last": asked("Transfer-Encoding: chunked, xchunked", f"Content-Length: {TO_END}"),
    "TE with a tab": asked("Transfer-Encoding:\tchunked", f"Content-Length: {TO_END}"),
    "TE with a vertical tab": asked("Transfer-Encoding: \x0bchunked", f"Content-Length: {TO_END}"),
    "TE, space before the colon": asked("Transfer-Encoding : chunked", f"Content-Length: {TO_END}"),
    "TE, folded": asked("Transfer-Encoding:\r\n chunked", f"Content-Length: {TO_END}"),
    "TE of HTTP/1.0": asked("Transfer-Encoding: chunked", f"Content-Length: {TO_END}").replace(b"/1.1", b"/1.0", 1),
    "two lengths": asked(f"Content-Length: {TO_HIDDEN}", f"Content-Length: {TO_END}"),
    "two lengths in a line": asked(f"Content-Length: {TO_HIDDEN}, {TO_END}"),
    "the same length twice": asked(f"Content-Length: {TO_HIDDEN}", f"Content-Length: {TO_HIDDEN}"),
    "length, folded": asked(f"Content-Length:\r\n {TO_HIDDEN}"),
    "length with a sign": asked(f"Content-Length: +{TO_HIDDEN}"),
    "length below zero": asked("Content-Length: -1"),
    "length in hexadecimal": asked(f"Content-Length: 0x{TO_HIDDEN:x}"),
    "length with an underscore": asked(f"Content_Length: {TO_END}", f"Content-Length: {TO_HIDDEN}"),
    "length, space before the colon": asked(f"Content-Length : {TO_END}"),
    "chunk extension": asked("Transfer-Encoding: chunked", body=b"1;a=\n2\r\nx\r\n" + CHUNKED),
    "chunk extension in quotation marks": asked("Transfer-Encoding: chunked", body=b'1;a="\r\nx\r\n' + CHUNKED),
    "chunk ended by a bare LF": asked("Transfer-Encoding: chunked", body=b"1\nx\n0\n\n" + HIDDEN),
    "chunk size that overflows": asked("Transfer-Encoding: chunked", body=b"10000000000000005\r\nhello\r\n" + CHUNKED),
    "chunk size of 33 bits": asked("Transfer-Encoding: chunked", body=b"100000004\r\nhell\r\n" + CHUNKED),
    "chunk size, bare CR": asked("Transfer-Encoding: chunked", body=b"0\rx\r\n\r\n" + HIDDEN),
    "chunk size below zero": asked("Transfer-Encoding: chunked", body=b"-1\r\n" + CHUNKED),
    "chunk size with a prefix": asked("Transfer-Encoding: chunked", body=b"0x0\r\n\r\n" + HIDDEN),
    "chunk size with an underscore": asked("Transfer-Encoding: chunked", body=b"0_0\r\n\r\n" + HIDDEN),
    "chunk size, blank": asked("Transfer-Encoding: chunked", body=b"0 \r\n\r\n" + HIDDEN),
    "trailer": asked("Transfer-Encoding: chunked", body=b"0\r\nContent-Length: 90\r\n\r\n" + HIDDEN),
    "bare LF in the head": asked(f"X: 1\nTransfer-Encoding: chunked\nContent-Length: {TO_END}"),
    "bare CR in the head": asked(f"X: 1\rTransfer-Encoding: chunked\r\nContent-Length: {TO_END}"),
    "NUL in a name": asked("Transfer-Encoding\0: chunked", f"Content-Length: {TO_END}"),
    "NUL in a value": asked("Transfer-Encoding: chunked\0", f"Content-Length: {TO_END}"),
    "control characters first": b"\0\1" + asked(f"Content-Length: {TO_END}", "Transfer-Encoding: chunked"),
    "TE named by Connection": asked(
        "Connection: Transfer-Encoding", "Transfer-Encoding: chunked", f"Content-Length: {TO_END}"
    ),
    "length named by Connection": asked("Connection: Content-Length", f"Content-Length: {TO_HIDDEN}"),
    "upgrade to HTTP/2": asked(
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
        f"Content-Length: {TO_HIDDEN}",
    ),
    "expectation": asked("Expect: 100-continue", f"Content-Length: {TO_HIDDEN}"),
    "absolute address": asked(f"Content-Length: {TO_HIDDEN}").replace(b"POST /", b"POST http://other/", 1),
    "two hosts": asked("Host: other", f"Content-Length: {TO_HIDDEN}"),
    "body of a GET": asked(f"Content-Length: {TO_HIDDEN}").replace(b"POST", b"GET", 1),
}
REFUSED_BY_TORCHSERVE = {
    "TE with a vertical tab", "TE, space before the colon", "two lengths", "two lengths in a line",
    "the same length twice", "length, folded", "length below zero", "length in hexadecimal",
    "length, space before the colon", "chunk extension", "chunk size that overflows", "chunk size of 33 bits",
    "chunk size below zero", "chunk size with a prefix", "chunk size with an underscore", "bare CR in the head",
    "NUL in a name", "NUL in a value",
}  # fmt: skip
"""What TorchServe alone does not read as two requests."""


@dataclass
class Tap:
    """Between edge and TorchServe: passes all bytes on, and keeps them."""

    sent: list[bytearray] = field(default_factory=list)
    """Of each connection."""
    events: list[tuple[int, bytes]] = field(default_factory=list)
    """Connection and bytes, either way, in their order."""


@contextmanager
def tapped(target: tuple[str, int], port: int) -> Iterator[Tap]:
    tap, stop = Tap(), threading.Event()
    sockets: list[socket.socket] = []

    def pass_on(source: socket.socket, sink: socket.socket, number: int, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                kept.extend(data)
                tap.events.append((number, data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        while not stop.is_set():
            with suppress(OSError):
                client, _ = listener.accept()
                server = socket.create_connection(target)
                tap.sent.append(up := bytearray())
                for way in ((client, server, len(tap.sent), up), (server, client, len(tap.sent), bytearray())):
                    threading.Thread(target=pass_on, args=way, daemon=True).start()
                sockets.extend((client, server))

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield tap
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    for each in sockets:
        each.close()


def requests_in(stream: bytes) -> list[bytes]:
    """The first line of each request that the edge sent; each must have one length and nothing that contradicts it."""
    lines = []
    while stream:
        head, end, stream = stream.partition(b"\r\n\r\n")
        assert end, head
        lengths = re.findall(rb"(?im)^content-length: (\d+)$", head.replace(b"\r\n", b"\n"))
        assert (
            len(re.findall(rb"(?im)^content-length|^transfer-encoding", head.replace(b"\r\n", b"\n")))
            == len(lengths)
            < 2
        )
        length = int(lengths[0]) if lengths else 0
        assert len(stream) >= length
        stream = stream[length:]
        lines.append(head.partition(b"\r\n")[0])
    return lines


def answers_to(address: tuple[str, int], request: bytes) -> bytes:
    """All that comes back for these bytes, until the connection ends or nothing more comes; something must."""
    answered = b""
    with closing(socket.create_connection(address, timeout=20)) as connection, suppress(ConnectionResetError):
        connection.sendall(request)
        try:
            while data := connection.recv(65536):
                answered += data
                connection.settimeout(1)
        except TimeoutError:
            assert answered, "neither an answer nor an end"
    return answered


def statuses(answered: bytes) -> list[int]:
    return list(map(int, re.findall(rb"HTTP/1\.[01] ([2-5]\d\d)", answered)))


@pytest.fixture(scope="module")
def edge_and_tap(
    torchserve: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningEdge, Tap]]:
    """An edge, with a door on its fourth port, whose one server is the real TorchServe, heard in between."""
    port = free_ports()
    host, _, own = torchserve.inference_url.removeprefix("http://").partition(":")
    heard = replace(torchserve, inference_url=f"http://127.0.0.1:{port + 2}")
    folder = make_folder(tmp_path_factory.mktemp("smuggling") / "edge", port, behind({"a": heard}))
    door = {"SAGEMAKER_BIND_TO_PORT": str(port + 3)}
    with (
        tapped((host, int(own)), port + 2) as tap,
        running(folder, port, "--door", "sagemaker", environment=door) as edge,
    ):
        yield edge, tap


def at_the_door(edge: RunningEdge, request: bytes) -> tuple[tuple[str, int], bytes]:
    """Where the edge's door listens, and the request with its path."""
    host, port = edge.address
    return (host, port + 3), request.replace(f"/predictions/{MODEL}".encode(), b"/invocations")


@pytest.mark.parametrize("door", [False, True], ids=["edge", "door"])
@pytest.mark.parametrize("name", ATTACKS)
def test_torchserve_sees_one_request_for_each_that_the_edge_let_pass(
    edge_and_tap: tuple[RunningEdge, Tap], name: str, door: bool
) -> None:
    """Written anew by the edge, with one length; and the hidden request arrives as none."""
    edge, tap = edge_and_tap
    before = [len(stream) for stream in tap.sent]
    answered = statuses(answers_to(*(at_the_door(edge, ATTACKS[name]) if door else (edge.address, ATTACKS[name]))))
    assert 1 <= len(answered) <= (1 if door else 2)  # the door ends each connection
    assert 200 not in answered
    sent = [bytes(stream[start:]) for stream, start in zip(tap.sent, [*before, *[0] * len(tap.sent)], strict=False)]
    lines = [line for stream in sent for line in requests_in(stream)]
    assert not [line for line in lines if b"hidden" in line]
    # The edge asks once more for what the handler refused, since nginx cannot hand on an answer that it looked into.
    assert len(set(lines) - {line for line in lines if b"/predictions" not in line}) <= 1


def test_honest_requests_pass_by_the_same_way(edge_and_tap: tuple[RunningEdge, Tap], digit: bytes) -> None:
    """What the checks above could not see: chunked, with a length, and two in one connection are answered and heard."""
    edge, tap = edge_and_tap
    whole = HEAD + f"Content-Length: {len(digit)}\r\n\r\n".encode() + digit
    chunked = HEAD + f"Transfer-Encoding: chunked\r\n\r\n{len(digit):x};x=1\r\n".encode() + digit + b"\r\n0\r\n\r\n"
    before = len([line for stream in tap.sent for line in requests_in(bytes(stream))])
    assert statuses(answers_to(edge.address, whole + chunked)) == [200, 200]
    for request in (whole, chunked):
        assert statuses(answers_to(*at_the_door(edge, request))) == [200]
    assert len([line for stream in tap.sent for line in requests_in(bytes(stream))]) >= before + 4


def test_the_edge_asks_one_request_after_another(edge_and_tap: tuple[RunningEdge, Tap]) -> None:
    """However many a client sends at once: TorchServe queues those of one connection without limit."""
    edge, tap = edge_and_tap
    before = len(tap.events)
    answered = answers_to(edge.address, 40 * asked("Content-Length: 1", body=b"x"))
    assert len(statuses(answered)) == 40
    waiting: Counter[int] = Counter()
    for connection, data in tap.events[before:]:
        waiting[connection] += len(re.findall(rb"(?m)^POST /predictions", data)) - len(statuses(data))
        assert waiting[connection] <= 1


def test_a_form_of_a_browser_is_refused(edge_and_tap: tuple[RunningEdge, Tap], torchserve: RunningServer) -> None:
    """TorchServe would make an object of each of its fields, three million in the largest body, and fail all the same.

    The control: asked directly it takes every field for an image.
    """
    edge, tap = edge_and_tap
    before = len(tap.events)
    form = {"Content-Type": "Application/X-WWW-Form-Urlencoded; charset=utf-8"}
    with plain_session() as session:
        refused = session.post(f"{edge.url}/predictions/{MODEL}", data="a&b&c", headers=form, timeout=30)
    assert (refused.status_code, refused.json()["type"]) == (415, "UnsupportedMediaTypeException")
    assert "application/octet-stream" in refused.json()["message"]
    assert len(tap.events) == before
    direct = requests.post(
        f"{torchserve.inference_url}/predictions/{MODEL}",
        data="&".join(f"{number}=" for number in range(1000)),
        headers={
            "Content-Type": "application/x-www-form-urlencoded",
            "Authorization": f"Bearer {Tokens(torchserve.key_file, {}).token('inference').value}",
        },
        timeout=30,
    )
    assert "1000 images" in direct.text


@pytest.mark.parametrize("name", ATTACKS)
def test_torchserve_alone_answers_the_hidden_request(torchserve: RunningServer, name: str) -> None:
    """The control: it answers 404 for what another reader would have taken for a body, or for a request of its own."""
    host, _, port = torchserve.inference_url.removeprefix("http://").partition(":")
    token = Tokens(torchserve.key_file, {}).token("inference").value.encode()
    hidden = HIDDEN.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer " + token + b"\r\n\r\n")
    attack = ATTACKS[name].replace(HIDDEN, hidden).replace(KEY.encode(), token)
    answered = statuses(answers_to((host, int(port)), attack))
    assert (404 in answered) is (name not in REFUSED_BY_TORCHSERVE)
