"""Whatever bytes are sent to the inference port: TorchServe and its worker live, and nobody else is harmed."""

from __future__ import annotations

import random
import re
import select
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from operate.tuning.load import SUCCESS, load
from server.launch import RunningServer
from tests.conftest import MODEL, free_ports, wait_for
from tests.edges import KEY, Load, RunningEdge, make_folder, running
from tests.edges import load as load_by_edge
from tests.listening import Quiet, listening
from tests.torture.conftest import DEADLY, IS_LONG, Record, hasty, processes_of

pytestmark = [pytest.mark.torture, pytest.mark.server, pytest.mark.slow]

REQUESTS = 10_000 if IS_LONG else 1_000
SENDERS = 8
SLOW_CONNECTIONS = 500
SLOW_LORIS_S = 60 if IS_LONG else 5
DEADLINE_S = 30.0
"""For the others: explanations, which are among what is sent, may take the worker seconds each."""
MOST_HARMED = 0.001
_SILENCE_S = 0.5
_RESET = struct.pack("ii", 1, 0)

METHODS = [b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"HEAD", b"TRACE", b"CONNECT", b"post", b"", b"\0"]
PATHS = [b"/predictions/", b"/explanations/", b"/v1/models/", b"/v2/models/", b"/ping/", b"//", b"/%2e%2e/", b"/\xff"]
VERSIONS = [b"HTTP/1.1"] * 60 + [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9999999999.1", b"SPDY/3", b""]
CONTENT_TYPES = [
    b"application/octet-stream", b"application/json", b"image/png", b"text/plain; charset=utf-99", b"*/*", b"\xff",
    b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=b",
    b"application/x-www-form-urlencoded",
]  # fmt: skip
LENGTHS = [b"0", b"1", b"-1", b"+5", b"1e3", b"0x10", b" ", b"99999999999999999999", b"2147483648", b"6553501", b"5, 6"]
CHUNKS = [b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n", b"-1\r\n", b"5;a=b\r\nhel", b"zz\r\n", b"0\r\n\r\nmore"]
HEADERS = [
    b"Expect: 100-continue", b"Expect: 200-ok", b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c",
    b"explain: True", b"describe: True", b"X-Top-K: 99999999999999999999", b"X-Top-K: \xff", b"Host: a\r\nHost: b",
    b"Range: bytes=0-", b"Content-Encoding: gzip", b"Accept: \0", b"no colon", b": no name", b"folded:\r\n value",
    b"ts_request_sequence_id: 1", b"long: " + b"x" * 9_000, b"\r\n".join(b"h%d: v" % number for number in range(300)),
]  # fmt: skip


def fuzzed(draw: random.Random, token: bytes, image: bytes) -> bytes:
    """One request that is wrong in some ways and right in the others, so that it gets far."""
    model, base = MODEL.encode(), draw.choice(PATHS)
    path = draw.choice([*[b"/predictions/" + model] * 12, base + model, base + b"a" * 5_000, b"*", b""])
    body = draw.choice([image, image, image[: draw.randrange(len(image))], draw.randbytes(200), b"", b"[" * 2_000])
    headers = draw.sample(HEADERS, draw.choice([0, 0, 0, 0, 1, 2]))
    headers.append(b"Authorization: " + draw.choice([*[b"Bearer " + token] * 12, b"Bearer", b"Basic eDp5", b"\xff"]))
    headers.append(b"Content-Type: " + draw.choice(CONTENT_TYPES))
    framing = draw.choice(["honest", "honest", "honest", "honest", "lying", "chunked", "both", "none"])
    if framing in ("honest", "both"):
        headers.append(b"Content-Length: %d" % len(body))
    if framing == "lying":
        off = b"%d" % max(0, len(body) + draw.choice([-30, -1, 1, 3000]))
        headers.append(b"Content-Length: " + draw.choice([off, draw.choice(LENGTHS)]))
    if framing in ("chunked", "both"):
        headers.append(b"Transfer-Encoding: " + draw.choice([b"chunked", b"chunked", b"gzip, chunked", b"chunked, x"]))
        body = draw.choice([*CHUNKS, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)])
    headers.append(b"Host: a")
    draw.shuffle(headers)
    line = b" ".join([draw.choice([*[b"POST"] * 40, *METHODS]), path, draw.choice(VERSIONS)])
    request = b"\r\n".join([line, *headers, b"", body])
    return request[: draw.randrange(len(request))] if draw.random() < 0.05 else request


def send(port: int, request: bytes, ends_by_reset: bool) -> str:
    """Send it on a connection of its own; returns the status of the answer, or what there was instead."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        if ends_by_reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        answer = b""
        connection.settimeout(_SILENCE_S)
        end = "closed"
        try:
            connection.sendall(request)
            while part := connection.recv(4096):
                answer += part
        except TimeoutError:
            end = "silence"
        except OSError:
            end = "reset"
    status = re.search(rb"HTTP/1\.1 ([2-5]\d\d) ", answer)
    return status[1].decode() if status else end


def fuzz(url: str, requests: Sequence[bytes], seed: int = 0) -> Counter[str]:
    """What became of each of the requests, sent by a few clients at a time."""
    port, draw = urlsplit(url).port or 80, random.Random(seed)
    resets = [draw.random() < 0.1 for _ in requests]
    with ThreadPoolExecutor(SENDERS) as pool:
        return Counter(pool.map(lambda request, reset: send(port, request, reset), requests, resets))


def others(
    server: RunningServer, image: bytes, are_done: Callable[[], bool], deadline_s: float = DEADLINE_S
) -> Counter[str]:
    """What well-behaved clients get, each request asked once."""
    counts: Counter[str] = Counter()
    while not (counts and are_done()):
        counts.update(load(server.client(), MODEL, [image], concurrency=2, duration_s=1, deadline_s=deadline_s).counts)
    return counts


def attack(server: RunningServer, requests: Sequence[bytes], image: bytes) -> tuple[Counter[str], Counter[str]]:
    """What the attackers got, and what the others got meanwhile.

    Raises:
        AssertionError: a process has ended or one of the others was harmed.
    """
    before = processes_of(server)
    with ThreadPoolExecutor(1) as pool:
        attacking = pool.submit(fuzz, server.inference_url, requests)
        unharmed = others(server, image, attacking.done)
    assert processes_of(server) == before, "TorchServe or a worker has ended"
    assert set(unharmed) == {SUCCESS}, unharmed
    return attacking.result(), unharmed


def test_http_fuzz(tortured: RunningServer, digit: bytes, record: Record) -> None:
    """Methods, versions, headers, chunks and lengths that lie: nothing ends, and others are answered meanwhile."""
    draw, token = random.Random(0), tortured.client().token().encode()
    answers, unharmed = attack(tortured, [fuzzed(draw, token, digit) for _ in range(REQUESTS)], digit)
    record("requests", answers.total())
    record("answers", dict(answers.most_common()))
    record("others", dict(unharmed))
    assert answers[SUCCESS] > REQUESTS / 50, "some must get as far as the worker"
    assert len(answers) > 5, "and some not so far, for several reasons"
    assert len(hasty(tortured).predict(MODEL, digit)) == 5


def fatal(token: str) -> bytes:
    """The request that ends a worker of the broken archive."""
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Length: {len(DEADLY)}\r\n\r\n".encode() + DEADLY


def test_a_crash_shows(broken: RunningServer, digit: bytes) -> None:
    """The control: a worker that ends of one request is missed."""
    with pytest.raises(AssertionError, match="has ended"):
        attack(broken, [fatal(broken.client().token())] * 3, digit)
    broken.client().wait_until_ready(MODEL)


@contextmanager
def edge_of(server: RunningServer, folder: Path) -> Iterator[RunningEdge]:
    """An nginx in front of this one server."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx: install your system's package nginx")
    place = {"url": server.inference_url, "management_url": server.management_url, "key_file": str(server.key_file)}
    port = free_ports()
    make_folder(folder, port, {"models": {MODEL: None}, "servers": [{"name": "a", **place}]})
    with running(folder, port) as edge:
        yield edge


def check_unharmed(result: Load) -> None:
    assert sum(result.failed.values()) <= MOST_HARMED * result.total, result.statuses


def test_http_fuzz_behind_the_edge(tortured: RunningServer, digit: bytes, tmp_path: Path, record: Record) -> None:
    """The same from a client that the edge knows: at least 99.9 % of the others' requests are answered."""
    draw, before = random.Random(1), processes_of(tortured)
    requests = [fuzzed(draw, KEY.encode(), digit) for _ in range(REQUESTS)]
    with edge_of(tortured, tmp_path / "edge") as edge, load_by_edge(edge, digit) as others:
        answers = fuzz(edge.url, requests)
    record("requests behind the edge", answers.total())
    record("answers of the edge", dict(answers.most_common()))
    record("others behind the edge", {str(status): count for status, count in others.statuses.items()})
    assert answers[SUCCESS] > REQUESTS / 50, "some must get as far as the worker"
    assert processes_of(tortured) == before
    check_unharmed(others)


def test_harm_behind_the_edge_shows(broken: RunningServer, digit: bytes, tmp_path: Path) -> None:
    """The control: where a request ends the only worker, others miss it."""
    with edge_of(broken, tmp_path / "edge") as edge, load_by_edge(edge, digit) as others:
        fuzz(edge.url, [fatal(KEY)])
        wait_for(lambda: others.failed, "a failed request")
        broken.client().wait_until_ready(MODEL)
        wait_for(edge.ready, "the edge is ready")
    with pytest.raises(AssertionError):
        check_unharmed(others)


def slow_loris(
    server: RunningServer, connections: int, seconds: float, image: bytes, deadline_s: float = DEADLINE_S
) -> tuple[Counter[str], int]:
    """What others get while so many connections send a byte a second of requests that do not end, and how many of these
    are still open and unanswered afterwards."""
    parts = urlsplit(server.inference_url)
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nContent-Length: 9999\r\n".encode()
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection((parts.hostname, parts.port or 80), timeout=10))
            for _ in range(connections)
        ]
        for number, connection in enumerate(slow):
            connection.sendall(head + b"\r\n" * (number % 2) + b"x")
        ends = time.monotonic() + seconds

        def is_over() -> bool:
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"x")
            return time.monotonic() > ends

        unharmed = others(server, image, is_over, deadline_s)
        watched = select.poll()
        for connection in slow:
            watched.register(connection, select.POLLIN | select.POLLRDHUP)
        return unharmed, connections - len(watched.poll(0))


def test_slow_loris(tortured: RunningServer, digit: bytes, record: Record) -> None:
    """Five hundred connections that never end their requests keep nobody else from being answered."""
    before = processes_of(tortured)
    unharmed, still_open = slow_loris(tortured, SLOW_CONNECTIONS, SLOW_LORIS_S, digit)
    record("connections", still_open)
    record("others", dict(unharmed))
    assert set(unharmed) == {SUCCESS}, unharmed
    assert still_open == SLOW_CONNECTIONS
    assert processes_of(tortured) == before


class OneAtATime(Quiet):
    """A server that has time for one connection."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})


def test_a_server_of_one_connection_shows(tortured: RunningServer, digit: bytes) -> None:
    """The control: where connections wait for each other, the slow ones keep the others out."""
    with HTTPServer(("127.0.0.1", 0), OneAtATime) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        alone = RunningServer(url, url, url, tortured.key_file, {})
        assert SUCCESS in others(alone, digit, lambda: True)
        assert SUCCESS not in slow_loris(alone, 3, 0, digit, deadline_s=1)[0]
        server.shutdown()


class Impatient(OneAtATime):
    """A server that ends connections of which nothing comes."""

    timeout = 0.5


def test_a_server_that_cuts_slow_connections_shows(tortured: RunningServer, digit: bytes) -> None:
    """The control: where others are answered because the slow ones are gone."""
    with listening(Impatient) as url:
        unharmed, still_open = slow_loris(RunningServer(url, url, url, tortured.key_file, {}), 3, 0, digit)
    assert SUCCESS in unharmed
    assert still_open == 0
