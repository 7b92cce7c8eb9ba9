"""A real nginx in front of three TorchServe of its own, one of which is killed, drained, slow, or given another token.

A second edge beside it asks no other server when one fails: what it lets through shows that the checks can fail.
"""

from __future__ import annotations

import http.client
import json
import re
import select
import shutil
import signal
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil
import pytest
import requests
import yaml

from archive.content import ArchiveContent
from archive.members import MANIFEST_FILE
from client.tokens import TokenKind, Tokens
from operate.edge.nginx import Nginx
from server import launch, processes
from server.launch import RunningServer
from tests.conftest import CONFIG, MODEL, ROOT, free_ports, wait_for
from tests.edges import (
    HEADER_TIMEOUT_S,
    KEY,
    READ_TIMEOUT_S,
    SAID,
    TEMPLATE,
    RunningEdge,
    behind,
    ended,
    load,
    make_folder,
    plain_session,
    running,
    start,
    substitute,
    without_retries,
)

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx")

SERVERS = ("a", "b", "c")
SHORT_LIFE_S = 12.0
"""Of the tokens of server c, so that the edge renews them before anyone asks for it."""
DEADLINE_S = 60.0
CLIENTS = 3
"""Of a load, each of which waits for one answer at a time."""


@dataclass
class Machine:
    """One TorchServe, which can be killed and started again at its place."""

    run_dir: Path
    store: Path
    config: Path
    first_port: int
    server: RunningServer | None = None

    def start(self) -> RunningServer:
        processes.clear(self.run_dir)
        self.server = launch.start(self.run_dir, self.store, self.config, self.first_port)
        return self.server

    @property
    def running(self) -> RunningServer:
        assert self.server is not None
        return self.server

    @property
    def java(self) -> psutil.Process:
        process = processes.find(self.run_dir)
        assert process is not None
        return process

    @property
    def worker(self) -> psutil.Process:
        [process] = processes.workers(self.run_dir)
        return process

    def keys(self) -> dict[str, str]:
        tokens = Tokens(self.running.key_file, {})
        return {kind: tokens.token(kind).value for kind in get_args(TokenKind)}

    def exchange_token(self) -> None:
        """As anyone does who has the API key."""
        headers = {"Authorization": f"Bearer {self.keys()['API']}"}
        requests.get(f"{self.running.management_url}/token?type=inference", headers=headers, timeout=30)

    def requests(self) -> float:
        """How many predictions it has been asked for."""
        metrics = requests.get(f"{self.running.metrics_url}/metrics", timeout=30).text
        return sum(map(float, re.findall(r"^ts_inference_requests_total\{.*\} (\S+)$", metrics, flags=re.MULTILINE)))


@pytest.fixture(scope="module")
def machines(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Machine]]:
    """Three servers, started at a time; the tokens of c live for seconds."""
    place = tmp_path_factory.mktemp("machines")
    found: dict[str, Machine] = {}
    for name in SERVERS:
        config = place / f"{name}.properties"
        extra = f"token_expiration_min={SHORT_LIFE_S / 60}\n" if name == "c" else ""
        config.write_text(CONFIG.read_text() + "enable_model_api=true\n" + extra)
        store = Path(shutil.copytree(model_store, place / f"store-{name}"))
        taken = {machine.first_port for machine in found.values()}
        first_port = next(port for port in iter(free_ports, 0) if all(abs(port - other) > 5 for other in taken))
        found[name] = Machine(place / name, store, config, first_port)
    for machine in found.values():
        machine.run_dir.mkdir()
    try:
        with ThreadPoolExecutor(len(found)) as pool:
            list(pool.map(Machine.start, found.values()))
        yield found
    finally:
        for machine in found.values():
            processes.stop(machine.run_dir)


def servers_of(machines: Mapping[str, Machine]) -> dict[str, RunningServer]:
    return {name: machine.running for name, machine in machines.items()}


@pytest.fixture(scope="module")
def edge(machines: dict[str, Machine], run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """In front of the three."""
    port = free_ports()
    folder = make_folder(
        tmp_path_factory.mktemp("edge") / "edge", port, behind(servers_of(machines), run / "golden"), READ_TIMEOUT_S
    )
    with running(folder, port) as edge:
        yield edge


@pytest.fixture(scope="module")
def careless(machines: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """The same without retries, without an orderly end of connections, and without requests of its own."""
    port = free_ports()
    folder = make_folder(
        tmp_path_factory.mktemp("careless") / "edge", port, behind(servers_of(machines)), READ_TIMEOUT_S
    )
    without_retries(folder)
    substitute(folder / "nginx.conf", "if (-f run/closing) { return 418; }", "")
    with running(folder, port) as edge:
        yield edge


@pytest.fixture(autouse=True)
def all_in_service(request: pytest.FixtureRequest) -> None:
    """Each test finds the three in service, at each edge that it takes."""
    edges: list[RunningEdge] = [
        request.getfixturevalue(name) for name in ("edge", "careless") if name in request.fixturenames
    ]
    wait_for(lambda: all(edge.in_service() == set(SERVERS) for edge in edges), "all three servers are in service")


def test_every_server_gets_requests(edge: RunningEdge, machines: dict[str, Machine], digit: bytes) -> None:
    """One address, three servers, the answer of any of them."""
    before = {name: machine.requests() for name, machine in machines.items()}
    with load(edge, digit) as result:
        wait_for(
            lambda: all(machine.requests() > before[name] for name, machine in machines.items()),
            "each is asked",
        )
    assert result.failed == {}
    direct = machines["a"].running.client().predict(MODEL, digit)
    assert edge.predict(digit).json() == pytest.approx(direct, abs=1e-5)


def test_a_weight_is_a_share_of_the_requests(edge: RunningEdge, machines: dict[str, Machine], digit: bytes) -> None:
    """Eight in ten where the others have one each, also while several are asked at a time; alike again without it."""

    def share(weight: int) -> float:
        edge.change_servers("weight", 1, a=weight)
        wait_for(lambda: f"a.sock max_fails=0 weight={weight};" in edge.configuration(), "nginx has the weight")
        wait_for(lambda: not (edge.folder / "run" / "closing").exists(), "nginx has taken it")
        before = {name: machine.requests() for name, machine in machines.items()}
        with load(edge, digit, clients=4) as result:
            wait_for(lambda: result.total >= 100, "a hundred answers")
        assert result.failed == {}
        asked = {name: machine.requests() - before[name] for name, machine in machines.items()}
        return asked["a"] / sum(asked.values())

    assert share(8) > 0.6
    assert share(1) < 0.5


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/models", 404),
        ("PUT", f"/models/{MODEL}?min_worker=2", 404),
        ("GET", "/token?type=inference", 404),
        ("GET", "/metrics", 404),
        ("GET", "/ping", 404),
        ("POST", "/predictions/", 404),
        ("POST", f"/predictions/{MODEL}/1.0/more", 404),
        ("GET", "/predictions/..%2fmodels", 404),
        ("GET", "/predictions/..%2f..%2fmodels", 400),
        ("GET", f"/predictions/{MODEL}", 405),
        ("POST", "/v2", 405),
        ("POST", "/predictions/nobody", 404),
        ("POST", f"/predictions/{MODEL}", 400),
        ("POST", f"/v1/models/{MODEL}:predict", 400),
        ("GET", "/v2", 200),
        ("GET", "/readyz", 200),
    ],
)
def test_what_passes_and_what_does_not(edge: RunningEdge, method: str, path: str, status: int) -> None:
    """Predictions, explanations and readiness alone; every refusal has TorchServe's form."""
    request = requests.Request(method, edge.url, headers={"Authorization": f"Bearer {KEY}"}).prepare()
    request.url = edge.url + path  # as it stands: requests would decode it
    deadline = time.monotonic() + DEADLINE_S
    with plain_session() as session:
        answer = session.send(request, timeout=30)
        while answer.status_code == 503:  # the last server that was asked was exchanging its token
            assert answer.json()["message"].endswith("ask again.")
            assert time.monotonic() < deadline
            answer = session.send(request, timeout=30)
    assert answer.status_code == status
    if status != 200:
        document = answer.json()
        assert document["code"] == status
        assert {"code", "type", "message"} == set(document)


def test_whose_refusal_it_is(edge: RunningEdge) -> None:
    """What the handler says of an image reaches the client as it is, also with the status of a refused token."""
    for image, status, kind in ((b"", 400, "InvalidRequest"), (b"no image", 415, "UnsupportedImage")):
        answer = edge.predict(image)
        assert (answer.status_code, answer.json()["type"]) == (status, kind)
        assert answer.headers["x-model-name"] == MODEL


@pytest.mark.parametrize("key", [None, "wrong", KEY[:-1], f"{KEY}x"], ids=["none", "wrong", "shorter", "longer"])
def test_without_a_key_nothing_is_answered(edge: RunningEdge, digit: bytes, key: str | None) -> None:
    """401, and not the answer that the edge's own token would get."""
    with socket.create_connection(edge.address) as connection:
        credential = f"Authorization: Bearer {key}\r\n" if key else ""
        request = f"POST /predictions/{MODEL} HTTP/1.0\r\n{credential}Content-Length: {len(digit)}\r\n\r\n"
        connection.sendall(request.encode() + digit)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "NotAuthorizedException"
    assert edge.predict(digit).ok


def test_no_header_makes_a_prediction_a_description(
    edge: RunningEdge, machines: dict[str, Machine], digit: bytes
) -> None:
    """The handler describes itself to whoever has the inference token, and not through the edge."""
    path, asks = f"/predictions/{MODEL}", {"describe": "True"}
    token = {"Authorization": f"Bearer {machines['a'].keys()['inference']}"}
    url = machines["a"].running.inference_url
    assert "class_names" in requests.post(url + path, data=digit, headers=token | asks, timeout=30).json()
    with plain_session() as session:
        answer = session.post(edge.url + path, data=digit, headers=asks, timeout=30)
    assert answer.json() == pytest.approx(edge.predict(digit).json(), abs=1e-5)


def test_the_body_cap_is_the_servers(edge: RunningEdge) -> None:
    """One byte over TorchServe's limit is refused with JSON, the limit itself is passed on."""
    for config in (ROOT / "config").glob("*.properties"):
        [limit] = re.findall(r"^max_request_size=(\d+)$", config.read_text(), flags=re.MULTILINE)
    assert f"client_max_body_size {limit};" in (TEMPLATE / "nginx.conf").read_text()
    over, within = edge.predict(b"x" * (int(limit) + 1)), edge.predict(b"x" * int(limit))
    assert (over.status_code, over.json()["code"]) == (413, 413)
    assert within.status_code == 415


def test_tokens_stay_behind_the_edge(edge: RunningEdge, machines: dict[str, Machine], digit: bytes) -> None:
    """Neither an answer nor a log nor what the edge says holds one, and the file that does is its owner's."""
    answers = [edge.predict(digit), edge.predict(b""), edge.predict(digit, key=None), edge.predict(b"", model="nobody")]
    told = "".join(f"{answer.headers}{answer.text}" for answer in answers) + edge.said
    told += "".join(log.read_text() for log in (edge.folder / "logs").iterdir())
    written = (edge.folder / "run" / "servers.conf").read_text()
    for machine in (machines["a"], machines["b"]):
        assert machine.keys()["inference"] in written
        assert not any(key in told for key in machine.keys().values())
    for private, mode in (("run/servers.conf", 0o600), ("run", 0o700)):
        assert stat.S_IMODE((edge.folder / private).stat().st_mode) == mode


def test_tls_is_verified(edge: RunningEdge, digit: bytes) -> None:
    """The client that knows the certificate is answered, the one that does not refuses it."""
    with plain_session() as session:
        url = f"{edge.https_url}/predictions/{MODEL}"
        assert session.post(url, data=digit, verify=str(edge.folder / "certificate.pem"), timeout=30).ok
        with pytest.raises(requests.exceptions.SSLError):
            session.post(url, data=digit, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_server_fails_no_request(
    edge: RunningEdge, careless: RunningEdge, machines: dict[str, Machine], digit: bytes, number: signal.Signals
) -> None:
    """kill -9 and SIGTERM under load, until it is back with new tokens: none; without retries there are some."""
    old = machines["b"].keys()
    with load(edge, digit) as result:
        with load(careless, digit) as without:
            machines["b"].java.send_signal(number)
            wait_for(lambda: without.failed, "a failed request of the edge without retries")
            wait_for(lambda: "b" not in edge.in_service(), "b is out of service")
        assert edge.ready()
        machines["b"].start()
        wait_for(lambda: "b" in edge.in_service(), "b is in service again")
        before = machines["b"].requests()
    assert machines["b"].keys() != old
    assert machines["b"].requests() > before
    assert result.failed == {}


@pytest.mark.slow
def test_a_killed_worker_fails_its_requests_alone(
    edge: RunningEdge, machines: dict[str, Machine], digit: bytes
) -> None:
    """What killed it may kill the next, so TorchServe's words of it reach the client; everything else is answered."""
    with load(edge, digit) as result:
        machines["a"].worker.kill()
        wait_for(lambda: machines["a"].running.client().ready_workers(MODEL) == 1, "a has a worker again")
    assert set(result.failed) <= {500, 504, 507}
    assert sum(result.failed.values()) <= 2 * CLIENTS, "those that it had, and those that came before the edge looked"


@pytest.mark.slow
def test_a_token_that_another_exchanges_fails_no_request(
    edge: RunningEdge, careless: RunningEdge, machines: dict[str, Machine], digit: bytes
) -> None:
    """TorchServe's 400 is not the client's fault; the new token is in use within seconds."""
    with load(careless, digit) as without, load(edge, digit) as result:
        machines["a"].exchange_token()
        token = machines["a"].keys()["inference"]
        written = edge.folder / "run" / "servers.conf"
        wait_for(lambda: token in written.read_text(), "the edge has the new token")
    assert result.failed == {}
    assert 503 in without.failed


@pytest.mark.slow
def test_tokens_are_renewed_in_time(edge: RunningEdge, machines: dict[str, Machine], digit: bytes) -> None:
    """Before they expire, without a failed request and with the server in service all the while."""
    old = machines["c"].keys()["inference"]
    with load(edge, digit) as result:
        wait_for(lambda: machines["c"].keys()["inference"] != old, "c has a new token", SHORT_LIFE_S)
        before = machines["c"].requests()
        wait_for(lambda: machines["c"].requests() > before, "c is asked with it", SHORT_LIFE_S)
    assert "c" in edge.in_service()
    assert result.failed == {}


@pytest.mark.slow
def test_scaling_the_only_server_fails_no_request(
    edge: RunningEdge, machines: dict[str, Machine], digit: bytes
) -> None:
    """While its second worker loads, which takes until its file is there, it stays in service with the first."""
    client = machines["a"].running.client()
    [weights] = processes.temp_dir(machines["a"].run_dir).rglob("model.pt")
    edge.change_servers(b=True, c=True)
    try:
        wait_for(lambda: edge.in_service() == {"a"}, "a alone is in service")
        with load(edge, digit) as result:
            hidden = weights.rename(weights.with_suffix(".hidden"))
            client.scale(MODEL, 2, wait=False)
            wait_for(lambda: f"a: in service: {MODEL}: 1 of 2 workers ready" in edge.said, "the edge sees it scaled")
            hidden.rename(weights)
            wait_for(lambda: client.ready_workers(MODEL) == 2, "a has two workers")
        assert result.failed == {}
    finally:
        edge.change_servers()
        wait_for(lambda: edge.in_service() == set(SERVERS), "all three servers are in service")
        client.scale(MODEL, 1)
        wait_for(lambda: len(processes.workers(machines["a"].run_dir)) == 1, "the second worker has ended")


@pytest.mark.slow
def test_a_drained_server_gets_none(edge: RunningEdge, machines: dict[str, Machine], digit: bytes) -> None:
    """What it has is finished, what comes goes to the others, and afterwards it gets its share again."""
    with load(edge, digit) as result:
        edge.change_servers(b=True)
        wait_for(lambda: "b" not in edge.in_service(), "b is out of service")
        wait_for(lambda: "b: out of service: drained" in edge.said, "the edge says so")
        wait_for(lambda: not (edge.folder / "run" / "closing").exists(), "nginx has the new list")
        before = machines["b"].requests()
        seen = result.total
        wait_for(lambda: result.total > seen + 100, "a hundred further answers")
        assert machines["b"].requests() == before
        edge.change_servers()
        wait_for(lambda: machines["b"].requests() > before, "b gets requests again")
    assert result.failed == {}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["java", "worker"])
def test_a_server_that_hangs_fails_its_requests_alone(
    edge: RunningEdge, machines: dict[str, Machine], digit: bytes, what: str
) -> None:
    """Stopped where it is: who waits for it is refused in bounded time, who comes later does not wait."""
    stopped = machines["a"].java if what == "java" else machines["a"].worker
    with load(edge, digit) as result:
        stopped.suspend()
        try:
            wait_for(lambda: "a" not in edge.in_service(), "a is out of service")
            seen = result.total
            wait_for(lambda: result.total > seen + 100, "a hundred further answers")
            failed = dict(result.failed)
        finally:
            stopped.resume()
    assert set(result.failed) == {504}
    assert result.failed[504] <= failed.get(504, 0) + CLIENTS
    assert READ_TIMEOUT_S < result.slowest_s < READ_TIMEOUT_S + 5


@pytest.mark.slow
def test_nobody_in_service_is_not_ready(edge: RunningEdge, digit: bytes) -> None:
    """/readyz is 503 as soon as no server takes requests, predictions are refused in TorchServe's form."""
    edge.change_servers(a=True, b=True, c=True)
    wait_for(lambda: not edge.ready(), "the edge is not ready")
    answer = edge.predict(digit)
    assert (answer.status_code, answer.json()["type"]) == (503, "ServiceUnavailableException")
    edge.change_servers()
    wait_for(edge.ready, "the edge is ready")
    assert edge.predict(digit).ok


def broken_connections(edge: RunningEdge, clients: int = 8) -> int:
    """How many of the connections that are always in use are cut while nginx takes two new configurations."""
    host, _, port = edge.url.removeprefix("http://").partition(":")
    stop = threading.Event()

    def ask() -> int:
        cut = 0
        while not stop.is_set():
            with closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
                connection.connect()
                is_open = True
                while is_open and not stop.is_set():
                    try:
                        connection.request("POST", f"/predictions/{MODEL}", headers={"Authorization": f"Bearer {KEY}"})
                        answer = connection.getresponse()
                        answer.read()
                        is_open = not answer.will_close
                    except OSError:
                        cut, is_open = cut + 1, False
        return cut

    with ThreadPoolExecutor(clients) as pool:
        tasks = [pool.submit(ask) for _ in range(clients)]
        try:
            for _ in range(2):
                with Nginx(edge.folder).change():
                    pass
        finally:
            stop.set()
        return sum(task.result() for task in tasks)


@pytest.mark.slow
def test_a_new_configuration_cuts_no_connection(edge: RunningEdge, careless: RunningEdge) -> None:
    """Clients that send one request after another never see theirs end unanswered; where nothing is done, they do."""
    for each in (edge, careless):
        each.change_servers(a=True, b=True, c=True)  # refusals are fast, so that most connections wait for a request
    try:
        wait_for(lambda: not edge.ready() and not careless.ready(), "quick answers")
        assert broken_connections(edge) == 0
        assert broken_connections(careless) > 0
    finally:
        for each in (edge, careless):
            each.change_servers()
    wait_for(lambda: edge.ready() and careless.ready(), "both edges are ready")


def as_version(archive: Path, version: str, target: Path) -> None:
    """The same archive under another version."""
    content = ArchiveContent(archive)
    manifest = {"model": {**content.model, "modelVersion": version}}
    content.copy(target, {MANIFEST_FILE: json.dumps(content.document(MANIFEST_FILE) | manifest)})


@pytest.mark.slow
def test_a_canary_gets_its_share(edge: RunningEdge, machines: dict[str, Machine], digit: bytes) -> None:
    """A third of the requests that name no version, though only one server has the new one; all others as before."""
    as_version(machines["a"].store / f"{MODEL}.mar", "2.0", machines["a"].store / "canary.mar")
    client = machines["a"].running.client()
    client.register("canary.mar")

    def served(model: str, count: int) -> Counter[str]:
        with plain_session() as session:
            answers = [session.post(f"{edge.url}/predictions/{model}", data=digit, timeout=30) for _ in range(count)]
        assert {answer.status_code for answer in answers} == {200}
        return Counter(answer.headers["x-model-version"] for answer in answers)

    canary = edge.folder / "canary.conf"
    none = canary.read_text()
    try:
        with Nginx(edge.folder).change():
            canary.write_text(
                f'map "" $canary_model {{ default "{MODEL}"; }}\n'
                'split_clients $request_id $canary_version { 33% "2.0"; * ""; }\n'
                'map "" $copied_model { default ""; }\n'
            )
        assert 0.18 < served(MODEL, 150)["2.0"] / 150 < 0.48
        assert served(f"{MODEL}/1.0", 20) == {"1.0": 20}
        with Nginx(edge.folder).change():
            canary.write_text(
                'map "" $canary_model { default "other"; }\n'
                'map "" $canary_version { default "2.0"; }\n'
                'map "" $copied_model { default ""; }\n'
            )
        assert served(MODEL, 20) == {"1.0": 20}
    finally:
        with Nginx(edge.folder).change():
            canary.write_text(none)
        client.unregister(MODEL, "2.0")


@pytest.mark.slow
def test_slow_clients_hurt_nobody(edge: RunningEdge, digit: bytes) -> None:
    """500 connections that never finish their header, from another address: cut in time, and no other fails."""
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(edge.address, source_address=("127.0.0.2", 0)))
            for _ in range(500)
        ]
        for connection in slow:
            connection.sendall(b"POST /predictions/lenet5-digits HTTP/1.1\r\nHost: ")
        with load(edge, digit) as result:
            for connection in slow:
                connection.settimeout(HEADER_TIMEOUT_S + 30)
                assert ended(connection)
    assert result.failed == {}


@pytest.mark.slow
def test_one_address_gets_no_more_than_its_share(edge: RunningEdge, digit: bytes) -> None:
    """Of 150 slow bodies with a key, from one address, 100 may be at work; others are answered meanwhile."""
    header = (
        f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n"
    )
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(edge.address, source_address=("127.0.0.3", 0)))
            for _ in range(150)
        ]
        for connection in slow:
            connection.sendall(header.encode())
        with load(edge, digit) as result:
            wait_for(lambda: len(select.select(slow, [], [], 0)[0]) == 50, "fifty refusals")
            refused = [connection.recv(12) for connection in select.select(slow, [], [], 0)[0]]
    assert set(refused) == {b"HTTP/1.1 429"}
    assert result.failed == {}


@pytest.mark.slow
def test_the_edge_may_die_and_come_back(edge: RunningEdge, digit: bytes) -> None:
    """kill -9 of the command leaves nginx serving, and the next one takes it over."""
    nginx = (edge.folder / "run" / "nginx.pid").read_text()
    with load(edge, digit) as result:
        edge.process.kill()
        edge.process.wait()
        with (edge.folder / SAID).open("wb") as said:
            edge.process = start(edge.folder, said.fileno())
        wait_for(lambda: "edge: serves 3 servers" in edge.said, "the new command serves")
    assert result.failed == {}
    assert (edge.folder / "run" / "nginx.pid").read_text() == nginx


def test_a_spoilt_file_changes_nothing(edge: RunningEdge, digit: bytes) -> None:
    """It is named in one line, nginx goes on with what it had, and takes the file once it is right."""
    keys = edge.folder / "keys.conf"
    before = keys.read_text()
    keys.write_text(before.replace(";", ""))
    wait_for(lambda: f"error: nginx in {edge.folder}: " in edge.said, "the edge complains")
    assert "keys.conf" in edge.said
    assert edge.predict(digit).ok
    keys.write_text(before.replace("{", '{ "Bearer another" "another";', 1))
    wait_for(lambda: edge.predict(digit, key="another").ok, "the new key is known")
    keys.write_text(before)
    servers = edge.folder / "servers.yaml"
    listed = servers.read_text()
    servers.write_text(listed.replace("key_file", "keyfile"))
    wait_for(lambda: "servers.0.key_file: field required" in edge.said, "the edge complains")
    servers.write_text(listed)
    wait_for(lambda: edge.predict(digit, key="another").status_code == 401, "the key is gone")


@pytest.mark.slow
def test_an_edge_in_front_of_another(edge: RunningEdge, digit: bytes, tmp_path: Path) -> None:
    """Another machine's servers, over TLS that is verified and with a key of their edge; a wrong key shows nobody."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    inner = {
        "name": "inner",
        "url": edge.https_url,
        "key_file": str(tmp_path / "key"),
        "certificate_authority": str(edge.folder / "certificate.pem"),
    }
    port = free_ports()
    folder = make_folder(tmp_path / "outer", port, {"edges": [inner]}, READ_TIMEOUT_S)
    with running(folder, port) as outer:
        assert outer.predict(digit).json() == pytest.approx(edge.predict(digit).json(), abs=1e-5)
        (tmp_path / "key").write_text("wrong\n")
        wait_for(lambda: outer.predict(digit).status_code == 503, "the other edge refuses the key")
        inner["certificate_authority"] = str(folder / "certificate.pem")
        (folder / "servers.yaml").write_text(yaml.safe_dump({"edges": [inner]}))
        wait_for(lambda: not outer.ready(), "the other edge's certificate is refused")
        assert "SSLError" in outer.said
