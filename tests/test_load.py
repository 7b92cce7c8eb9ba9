"""The load generator: every request counts as what became of it, within bounds, on real servers and on broken ones."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from typer.testing import CliRunner

from client.torchserve import TorchServe
from operate.__main__ import app
from operate.errors import LoadRefused
from operate.tuning.load import SUCCESS, Answer, LoadResult, load
from operate.tuning.wire import Wire
from server.launch import RunningServer
from tests.conftest import MODEL, PATIENCE_S, free_ports
from tests.observed import requests_counted

IMAGE = b"x" * 300
ACCEPTED_FOR = 20


class Control(ThreadingHTTPServer):
    """A server whose models are named for what they do."""

    daemon_threads, block_on_close = True, False

    def __init__(self, key_file: Path) -> None:
        super().__init__(("127.0.0.1", 0), ControlHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.key_file, self.token, self.accepted = key_file, "", 0
        self.connections = 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self.pause_at = math.inf
        self.renew()

    def renew(self) -> None:
        self.token, self.accepted = f"token-{time.perf_counter_ns()}", 0
        entry = {"key": self.token, "expiration time": "2100-01-01T00:00:00"}
        self.key_file.write_text(json.dumps({"inference": entry, "management": entry, "API": {"key": "api"}}))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what is tested."""

    @property
    def client(self) -> TorchServe:
        return TorchServe(self.url, self.url, self.key_file)


class ControlHandler(BaseHTTPRequestHandler):
    server: Control
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        self.server.renew()
        self.answer(200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert body == IMAGE
        getattr(self, self.path.rpartition("/")[2])()

    def ok(self) -> None:
        self.answer(200)

    def busy(self) -> None:
        self.answer(503)

    def closing(self) -> None:
        self.answer(200, "Connection: close")
        self.close_connection = True

    def hang(self) -> None:
        self.server.released.wait()

    def trickle(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not self.server.released.wait(0.02):
            self.wfile.write(b"x")
            self.wfile.flush()

    def reset(self) -> None:
        self.close_connection = True

    def torn(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhalf")
        self.close_connection = True

    def nonsense(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")

    def pausing(self) -> None:
        """Half a second in which nobody is answered, once."""
        with self.server.lock:
            if time.perf_counter() >= self.server.pause_at:
                self.server.pause_at = math.inf
                self.server.released.wait(0.5)
        self.answer(200)

    def guarded(self) -> None:
        """A token is good for some requests."""
        with self.server.lock:
            self.server.accepted += 1
            is_good = self.headers["Authorization"] == f"Bearer {self.server.token}"
            is_good = is_good and self.server.accepted <= ACCEPTED_FOR
        self.answer(*(200,) if is_good else (400, "X-Refused: yes", b'{"type": "InvalidKeyException"}'))

    def answer(self, status: int, header: str = "X-None: none", body: bytes = b"{}") -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\n{header}\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with Control(tmp_path / "key_file.json") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def test_every_request_is_one_for_the_server_too(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """A second of load on TorchServe: all 200, exactly as many as its own counter says, none after the end."""
    before = requests_counted(torchserve)
    started = time.perf_counter()
    result = load(client, MODEL, [digit], concurrency=4, duration_s=1)
    assert result.counts == {SUCCESS: result.requests}
    assert result.requests > 4
    assert requests_counted(torchserve) - before == result.requests
    assert 0.5 < result.seconds <= time.perf_counter() - started
    assert result.requests_per_s == pytest.approx(result.requests / result.seconds)
    assert 0 < result.latency_ms(0.5) <= result.latency_ms(0.99) <= result.latency_ms(1)


def test_what_torchserve_refuses_is_counted(client: TorchServe, digit: bytes) -> None:
    """A damaged image among good ones and a model that is not there: 415 and 404, and the rest is unharmed."""
    mixed = load(client, MODEL, [digit, b"no image"], concurrency=2, duration_s=0.5)
    assert set(mixed.counts) == {SUCCESS, "415"}
    assert abs(mixed.counts[SUCCESS] - mixed.counts["415"]) <= 2
    assert set(load(client, "nobody", [digit], concurrency=2, duration_s=0.2).counts) == {"404"}


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ("ok", SUCCESS), ("closing", SUCCESS), ("busy", "503"), ("hang", "timeout"), ("trickle", "timeout"),
        ("reset", "reset"), ("torn", "reset"), ("nonsense", "malformed"),
    ],
)  # fmt: skip
def test_each_failure_counts_as_what_it_is(control: Control, model: str, outcome: str) -> None:
    """Statuses, silence, trickling, a cut connection, half an answer, another protocol: one kind each, in time."""
    started = time.perf_counter()
    result = load(control.client, model, [IMAGE], concurrency=2, duration_s=0.2, deadline_s=0.3)
    assert time.perf_counter() - started < PATIENCE_S
    assert set(result.counts) == {outcome}
    assert result.failed == (0 if outcome == SUCCESS else result.requests)
    assert all(answer.latency_ms < 1000 * PATIENCE_S for answer in result.answers)
    assert bool(result.latencies_ms) == (outcome == SUCCESS) != math.isnan(result.latency_ms(0.5))


def test_a_server_that_is_not_there(control: Control) -> None:
    """Refused connections are counted and, in a closed loop, not asked for as fast as the processor can."""
    nobody = TorchServe(f"http://127.0.0.1:{free_ports()}", key_file=control.key_file)
    result = load(nobody, MODEL, [IMAGE], concurrency=2, duration_s=0.3)
    assert set(result.counts) == {"refused"}
    assert 2 <= result.requests <= 14


def test_connections_are_kept(control: Control) -> None:
    """One connection for each client, however many requests; a server that closes each gets one for each."""
    result = load(control.client, "ok", [IMAGE], concurrency=3, duration_s=0.2)
    assert result.requests > control.connections == 3
    closed = load(control.client, "closing", [IMAGE], concurrency=3, duration_s=0.2)
    assert control.connections == 3 + closed.requests


@pytest.mark.parametrize(("rate", "shows"), [(None, False), (100, True)])
def test_an_open_loop_counts_the_waiting(control: Control, rate: float | None, shows: bool) -> None:
    """The server pauses for half a second of two: a closed loop shows it to one request, an open one to dozens."""
    control.pause_at = time.perf_counter() + 0.7
    result = load(control.client, "pausing", [IMAGE], concurrency=1, duration_s=2, rate=rate)
    slow = [answer for answer in result.answers if answer.latency_ms > 100]
    assert result.failed == 0
    assert (len(slow) > 20) == shows
    assert len(slow) >= 1
    assert (result.latency_ms(0.9) > 100) == shows


def test_an_open_loop_keeps_its_rate(control: Control) -> None:
    """Requests are due at even times and sent then, whatever the number of connections."""
    result = load(control.client, "ok", [IMAGE], concurrency=8, duration_s=1, rate=50)
    assert sorted(round(answer.due_s * 50) for answer in result.answers) == list(range(50))
    assert result.counts == {SUCCESS: 50}


def test_the_queue_of_an_open_loop_is_bounded(control: Control) -> None:
    """On a server that hangs, what cannot be sent within the deadline is given up and counted as that."""
    started = time.perf_counter()
    result = load(control.client, "hang", [IMAGE], concurrency=1, duration_s=1, rate=200, deadline_s=0.2)
    assert time.perf_counter() - started < PATIENCE_S
    assert result.requests == 200
    assert set(result.counts) == {"timeout", "unsent"}
    assert result.counts["unsent"] > result.counts["timeout"]


def test_tokens_that_end_in_the_middle_cost_nothing(control: Control) -> None:
    """A token is refused after a few requests, over and over: each is renewed, and every request is answered."""
    result = load(control.client, "guarded", [IMAGE], concurrency=1, duration_s=0.5)
    assert result.requests > 2 * ACCEPTED_FOR
    assert result.counts == {SUCCESS: result.requests}


def test_tokens_that_cannot_be_renewed_are_failures(control: Control) -> None:
    """Without a management address to renew it at, the refusals count."""
    lost = TorchServe(control.url, f"http://127.0.0.1:{free_ports()}", control.key_file)
    result = load(lost, "guarded", [IMAGE], concurrency=1, duration_s=0.5)
    assert result.counts[SUCCESS] == ACCEPTED_FOR
    assert result.counts["400"] == result.failed > 0


def test_a_server_that_goes_and_comes_back(control: Control) -> None:
    """While the key file is away, as it is between two lives of a server, the load goes on under the old token."""
    client = control.client
    absent = threading.Timer(0.2, control.key_file.unlink)
    absent.start()
    result = load(client, "ok", [IMAGE], concurrency=1, duration_s=1.5)
    absent.join()
    assert result.counts == {SUCCESS: result.requests}


@pytest.mark.parametrize(
    "beyond",
    [
        {"concurrency": 0}, {"concurrency": 257}, {"duration_s": 0}, {"duration_s": 601}, {"rate": 0}, {"rate": 1e6},
        {"deadline_s": 0}, {"deadline_s": 601}, {"duration_s": math.nan},
    ],
)  # fmt: skip
def test_a_load_has_bounds(control: Control, beyond: dict[str, float]) -> None:
    """Nothing is sent beyond them; the message names the bound and what was found."""
    with pytest.raises(LoadRefused, match="expected more than 0 and at most"):
        load(control.client, "ok", [IMAGE], **beyond)
    with pytest.raises(LoadRefused, match="at least one image"):
        load(control.client, "ok", [])
    assert control.connections == 0


def test_another_machine_is_loaded_with_consent_alone(control: Control) -> None:
    """An address that is not loopback is refused before anything is sent, and taken once that is wanted."""
    other = TorchServe(control.url.replace("127.0.0.1", "0.0.0.0"), key_file=control.key_file)
    with pytest.raises(LoadRefused, match=r"0\.0\.0\.0 is not this machine: --yes-remote"):
        load(other, "ok", [IMAGE], duration_s=0.1)
    assert control.connections == 0
    assert load(other, "ok", [IMAGE], duration_s=0.1, remote=True).failed == 0


def test_an_interrupted_load_ends_at_once(control: Control) -> None:
    """Interrupted while every connection hangs with a minute to go, it is over at once, threads and all."""

    def interrupt(seconds: float, done: int) -> None:
        raise KeyboardInterrupt

    started, threads = time.perf_counter(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        load(control.client, "hang", [IMAGE], duration_s=60, deadline_s=60, watch=interrupt)
    assert time.perf_counter() - started < PATIENCE_S
    assert threading.active_count() - threads <= 8, "the server's own"
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_quantiles_are_measured_latencies() -> None:
    """The nearest rank: of a hundred the 50th, 99th and last, of one that one; failures are not among them."""
    answers = [Answer(0, float(number), SUCCESS) for number in range(100, 0, -1)]
    result = LoadResult([*answers, Answer(0, 1e6, "timeout")], 2.0)
    assert [result.latency_ms(share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert (result.requests, result.failed, result.requests_per_s) == (101, 1, 50)
    assert LoadResult(answers[:1], 1.0).latency_ms(0.5) == 100


def test_the_generator_is_light(control: Control) -> None:
    """Its connection takes less than a third of the processor time that `requests` takes for the same request."""
    wire, session, rounds = Wire(control.url), requests.Session(), 100
    session.trust_env = False
    head = f"POST /predictions/ok HTTP/1.1\r\nHost: x\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode()

    def by_wire() -> None:
        assert wire.ask(head + IMAGE, time.perf_counter() + 10) == (200, b"{}")

    def by_requests() -> None:
        assert session.post(f"{control.url}/predictions/ok", data=IMAGE, timeout=10).content == b"{}"

    assert processor_time(by_wire, rounds) < processor_time(by_requests, rounds) / 3
    wire.close()
    session.close()


def processor_time(call: Callable[[], None], rounds: int) -> float:
    """Of this thread; the server's are others."""
    call()
    started = time.thread_time()
    for _ in range(rounds):
        call()
    return time.thread_time() - started


def test_load_is_a_command(torchserve: RunningServer, digit: bytes, tmp_path: Path) -> None:
    """A table, or JSON; exit 1 and the outcomes in one line where anything failed, or the bound that was passed."""
    (tmp_path / "digit.png").write_bytes(digit)
    place = ["--url", torchserve.inference_url, "--key-file", str(torchserve.key_file)]

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [*place, "load", *arguments, "--images", str(tmp_path / "digit.png")])
        return result.exit_code, result.stdout, result.stderr

    status, table, complaints = run(MODEL, "--duration", "0.3")
    assert (status, complaints) == (0, "")
    assert table.split()[:3] == ["requests", "failed", "seconds"]
    status, answer, _ = run(MODEL, "--duration", "0.3", "--rate", "30", "--json")
    document = json.loads(answer)
    assert (status, document["requests"], document["counts"]) == (0, 9, {SUCCESS: 9})
    status, _, complaints = run("nobody", "--duration", "0.2")
    assert status == 1
    assert "requests failed (404 " in complaints
    status, _, complaints = run(MODEL, "--duration", "601")
    assert (status, complaints) == (1, "error: duration: expected more than 0 and at most 600, found 601\n")


def test_a_name_can_be_this_machine(control: Control) -> None:
    """`localhost` needs no consent."""
    named = TorchServe(control.url.replace("127.0.0.1", "localhost"), key_file=control.key_file)
    assert load(named, "ok", [IMAGE], duration_s=0.1).failed == 0
