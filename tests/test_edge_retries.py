"""How often an edge asks for one request, and which pages of other origins it answers; the servers are made up."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
from playwright.sync_api import Browser

from operate import slow
from operate.edge import nginx
from operate.edge.nginx import Nginx
from tests.conftest import MODEL, free_ports, wait_for
from tests.edges import KEY, READ_TIMEOUT_S, RunningEdge, make_folder, plain_session, running, substitute
from tests.listening import Quiet, key_file, listening

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx")

ORIGIN = "https://app.example"
SERVERS = ("a", "b", "c")
WAITS = "X-Envoy-Expected-Rq-Timeout-Ms"


class Made(Quiet):
    """Answers as the model's name says, as TorchServe or the handler would: "400-reset-200" is three answers, and the
    last of them from then on."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    """The path of every prediction that any of them is asked for."""
    started: ClassVar[list[str]] = []
    """The header of each by which a worker knows what nobody waits for any more."""
    followed: ClassVar[list[tuple[str | None, str | None, str | None]]] = []
    """The headers of each by which it can be followed, and how long its client waits."""
    ended = threading.Event()

    def do_GET(self) -> None:
        ready = {"modelVersion": "1.0", "minWorkers": 1, "workers": [{"status": "READY"}]}
        self.answer([ready] if self.path.startswith("/models") else {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(self.path)
        self.started.append(self.headers["X-Request-Start"])
        self.followed.append((self.headers["X-Request-ID"], self.headers["traceparent"], self.headers[WAITS]))
        answers = self.path.rpartition("/")[2].split("-")
        what = answers[min(self.asked.count(self.path), len(answers)) - 1]
        if what in ("reset", "slow"):
            self.ended.wait(READ_TIMEOUT_S * 3 if what == "slow" else 0)
            self.close_connection = True
        elif what.startswith("handler"):
            self.send_response(int(what.removeprefix("handler")))
            self.send_header("x-model-name", MODEL)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif what.isdigit() and what != "200":
            self.answer({"code": int(what), "type": "Made", "message": "as asked"}, int(what))
        else:
            self.answer({"seven": 1.0})


@contextmanager
def edge_in(place: Path, *changes: tuple[str, str, str]) -> Iterator[RunningEdge]:
    """Before three of them; each change is a file of the folder, what stands there, and what is put in its place."""
    port = free_ports()
    tokens = key_file(place, inference={"key": "token"}, management={"key": "token"}, API={"key": "token"})
    with ExitStack() as stack:
        urls = [stack.enter_context(listening(Made)) for _ in SERVERS]
        servers = [
            {"name": name, "url": url, "management_url": url, "key_file": str(tokens)}
            for name, url in zip(SERVERS, urls, strict=True)
        ]
        folder = make_folder(place / "edge", port, {"models": {MODEL: None}, "servers": servers}, READ_TIMEOUT_S)
        for change in changes:
            substitute(folder / change[0], *change[1:])
        with running(folder, port) as edge:
            wait_for(lambda: edge.in_service() == set(SERVERS), "all are in service")
            yield edge
        Made.ended.set()


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of a page of another origin."""
    with listening(Made) as url:
        yield url


@pytest.fixture(scope="module")
def edge(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """As it is shipped, but for two origins."""
    line = ("cors.conf", 'default "";', f'default ""; "{ORIGIN}" $http_origin; "{page}" $http_origin;')
    with edge_in(tmp_path_factory.mktemp("edge"), line) as edge:
        yield edge


@pytest.fixture(scope="module")
def generous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """Asks every server, takes a name for whole where a line ends, and writes every request down."""
    every = ("nginx.conf", "non_idempotent http_403", "non_idempotent http_403 http_500 http_503 http_504")
    dollar = ("nginx.conf", r"(/[\w.-]+)?\z|^/v1", "(/[\\w.-]+)?$|^/v1")
    log = ("nginx.conf", '"~^0\\.[0-4]" 0;', "")
    with edge_in(tmp_path_factory.mktemp("generous"), every, dollar, log) as edge:
        yield edge


def asked(edge: RunningEdge, model: str) -> tuple[int, int]:
    """How many servers were asked, and the status that the client gets."""
    Made.asked.clear()
    status = edge.predict(b"image", model=model).status_code
    return len(Made.asked), status


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("200", (1, 200)),
        ("reset-200", (2, 200)),
        ("reset", (2, 504)),
        ("reset-507", (2, 507)),
        ("reset-handler400", (2, 503)),
        ("507", (1, 507)),
        ("500", (1, 500)),
        ("handler500", (1, 500)),
        ("handler415", (1, 415)),
        ("handler400", (2, 400)),
        ("503", (2, 503)),
        ("slow", (1, 504)),
        # A 400 of TorchServe is a token that was exchanged, and a 404 a version on another server: no worker is asked.
        ("400", (3, 503)),
        ("400-200", (2, 200)),
        ("400-reset-200", (3, 200)),
        ("reset-400-200", (3, 200)),
        ("404-reset-200", (3, 200)),
        ("reset-404-200", (3, 200)),
        ("404-400-200", (3, 200)),
    ],
)
def test_a_worker_is_asked_twice_at_most(edge: RunningEdge, model: str, expected: tuple[int, int]) -> None:
    """And once where it died, where the client is mistaken, and where a request that was sent whole is late."""
    assert asked(edge, model) == expected


def test_an_edge_with_other_rules_asks_every_server(generous: RunningEdge) -> None:
    """The negative control of what is counted above."""
    assert asked(generous, "500")[0] == len(SERVERS)
    assert asked(generous, "503")[0] > 2


@pytest.mark.parametrize(
    ("model", "expected"), [("200", (1, 200)), ("reset-200", (2, 200)), ("reset", (2, 504)), ("507", (1, 507))]
)
def test_edges_in_a_row_have_one_retry_together(
    edge: RunningEdge, tmp_path: Path, model: str, expected: tuple[int, int]
) -> None:
    """Whichever of them makes it; an outer edge that asks again after 504 makes another. Here both of its machines are
    the same one."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    inner = {
        "url": edge.https_url, "key_file": str(tmp_path / "key"),
        "certificate_authority": str(edge.folder / "certificate.pem"),
    }  # fmt: skip
    port = free_ports()
    folder = make_folder(
        tmp_path / "outer", port, {"edges": [{"name": name, **inner} for name in ("one", "two")]}, READ_TIMEOUT_S
    )
    with running(folder, port) as outer:
        assert asked(outer, model) == expected
        if model == "reset":
            with Nginx(folder).change():
                substitute(folder / "hop.conf", "504 = @late", "504 = @failed")
            assert asked(outer, model)[0] == 3


def test_workers_are_told_when_a_request_arrived(edge: RunningEdge) -> None:
    """The same time for both tries, whatever the client says of it."""
    Made.asked.clear()
    Made.started.clear()
    before = time.time()
    answer = requests.post(
        f"{edge.url}/predictions/reset-200", b"image", timeout=30,
        headers={"Authorization": f"Bearer {KEY}", "X-Request-Start": "t=99999999999.000"},
    )  # fmt: skip
    assert answer.status_code == 200
    first, second = Made.started
    assert first == second
    assert before - 0.002 <= float(first.removeprefix("t=")) <= time.time()


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def follow(edge: RunningEdge, request_id: str, traceparent: str, model: str = "200") -> tuple[int, str | None]:
    """Status and id of the answer; what the servers were told is in `Made.followed`."""
    Made.asked.clear()
    Made.followed.clear()
    headers = {"X-Request-ID": request_id, "traceparent": traceparent, WAITS: "900"}
    with plain_session() as session:
        answer = session.post(f"{edge.url}/predictions/{model}", b"image", headers=headers, timeout=30)
    return answer.status_code, answer.headers.get("X-Request-ID")


def test_a_request_is_followed_through_every_try(edge: RunningEdge) -> None:
    """Its id and trace reach both servers, and the id comes back, with a refusal of the edge as well."""
    assert follow(edge, "camera-1/42", TRACEPARENT, "reset-200") == (200, "camera-1/42")
    assert Made.followed == [("camera-1/42", TRACEPARENT, "900")] * 2
    assert requests.post(edge.url, headers={"X-Request-ID": "camera-1/42"}, timeout=30).headers["X-Request-ID"] == (
        "camera-1/42"
    )


@pytest.mark.parametrize(
    "broken", ["", "a" * 129, "a" * 10_000, "two words", "a\tb", "a;b", "caf\u00e9", '"', "a, b", "a\\nb"]
)
def test_a_broken_id_or_trace_is_replaced(edge: RunningEdge, broken: str) -> None:
    """The request is answered, with an id that the edge made."""
    status, made = follow(edge, broken, broken)
    assert status == 200
    assert made is not None
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert Made.followed == [(made, None, "900")]


def test_what_torchserve_has_no_room_for_stays_outside(edge: RunningEdge) -> None:
    """A header that nobody reads is dropped, and one that the handler reads is refused when it is that long."""
    with plain_session() as session:
        for name, status in (("Cookie", 200), ("X-Other", 200), ("Accept", 400), ("Content-Type", 400)):
            Made.asked.clear()
            headers = {name: "a" * 10_000}
            assert (
                session.post(f"{edge.url}/predictions/200", b"image", headers=headers, timeout=30).status_code == status
            )
            assert len(Made.asked) == (status == 200)


@pytest.mark.parametrize("lines", [b"X-Request-ID: a\r\n b\r\n", b"X-Request-ID: a\rb\r\n"], ids=["folded", "cr"])
def test_an_id_in_two_lines_is_none(edge: RunningEdge, lines: bytes) -> None:
    """nginx refuses the request, as any header that is none; no server is asked."""
    Made.asked.clear()
    with socket.create_connection(edge.address) as connection:
        head = f"POST /predictions/200 HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 0\r\n".encode()
        connection.sendall(head + lines + b"\r\n")
        answer = connection.makefile("rb").read()
    assert (answer[:13], Made.asked) == (b"HTTP/1.1 400 ", [])


def logged(edge: RunningEdge, request_id: str) -> list[dict[str, Any]]:
    """The lines of the access log with this id."""
    log = edge.folder / "logs" / "access.log"
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else []
    return [line for line in lines if line["id"] == request_id]


def test_slow_requests_leave_a_line(edge: RunningEdge, generous: RunningEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the edge writes down every one; as it is shipped a quick one leaves none. A full log is begun anew."""
    follow(edge, "quick", "")
    for name in ("one", "two"):
        follow(generous, name, "")
        wait_for(lambda name=name: logged(generous, name), "the edge has written a line")
        [line] = logged(generous, name)
        assert (line["client"], line["status"], line["path"]) == ("tests", 200, "/predictions/200")
        [found] = [each for each in slow.find([generous.folder], line["time"] - 60) if each.id == name]
        assert found.edge is not None
        assert 0 <= found.edge <= found.total
        Nginx(generous.folder).bound_log()
        assert logged(generous, name)
        with monkeypatch.context() as patch:
            patch.setattr(nginx, "MOST_LOG_BYTES", 1)
            Nginx(generous.folder).bound_log()
        assert name in (generous.folder / "logs" / "access.1.log").read_text()
    assert not logged(generous, "one")
    assert not logged(edge, "quick")


def test_an_unknown_model_is_looked_for_on_every_server(edge: RunningEdge) -> None:
    """No worker is asked for a 404, which comes back in TorchServe's words."""
    asks, status = asked(edge, "404")
    assert status == 404
    assert len(SERVERS) <= asks <= len(SERVERS) + 1  # nginx may not keep the first one's answer


def test_servers_out_of_service_use_up_no_try(edge: RunningEdge) -> None:
    """With two of three drained the third is asked; without any, nobody is."""
    edge.change_servers(a=True, b=True)
    wait_for(lambda: edge.in_service() == {"c"}, "c alone is in service")
    assert {asked(edge, "200") for _ in range(8)} == {(1, 200)}
    assert asked(edge, "reset") == (1, 503)
    edge.change_servers(a=True, b=True, c=True)
    wait_for(lambda: not edge.ready(), "nobody is in service")
    assert asked(edge, "200") == (0, 503)
    edge.change_servers()
    wait_for(lambda: edge.in_service() == set(SERVERS), "all are in service")


def status_of(edge: RunningEdge, path: str) -> int:
    with closing(http.client.HTTPConnection(*edge.address, timeout=30)) as connection:
        connection.request("POST", path, b"image", {"Authorization": f"Bearer {KEY}"})
        return connection.getresponse().status


def test_a_name_does_not_end_at_a_line_break(edge: RunningEdge, generous: RunningEdge) -> None:
    """No path of any API passes with one; where the expression ends in `$`, it does."""
    for path in ("/predictions/m%0a", "/explanations/m/1.0%0a", "/v1/models/m:predict%0a", "/v2/models/m/infer%0a"):
        assert status_of(edge, path) == 404
    assert status_of(edge, "/v2%0a") == 404
    assert status_of(generous, "/predictions/m%0a") == 200


def preflight(edge: RunningEdge, origin: str) -> requests.Response:
    headers = {
        "Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization",
    }  # fmt: skip
    return requests.options(f"{edge.url}/predictions/{MODEL}", headers=headers, timeout=30)


def test_a_preflight_is_answered_without_a_key(edge: RunningEdge, generous: RunningEdge) -> None:
    """For an origin of cors.conf, and no server is asked; another origin, or an edge as it is copied, gets 401."""
    Made.asked.clear()
    answer = preflight(edge, ORIGIN)
    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    for refused in (preflight(edge, "https://other.example"), preflight(generous, ORIGIN)):
        assert refused.status_code == 401
        assert not [name for name in refused.headers if name.lower().startswith("access-control")]
    assert Made.asked == []


@pytest.mark.parametrize(("model", "key"), [(MODEL, KEY), ("415", KEY), ("507", KEY), (MODEL, "wrong")])
def test_answers_and_errors_name_the_origin(edge: RunningEdge, model: str, key: str) -> None:
    """Once each, or the page could not read why it is refused; for another origin not at all."""
    for origin, named in ((ORIGIN, [ORIGIN]), ("https://other.example", [])):
        with closing(http.client.HTTPConnection(*edge.address, timeout=30)) as connection:
            headers = {"Authorization": f"Bearer {key}", "Origin": origin}
            connection.request("POST", f"/predictions/{model}", b"image", headers)
            answer = connection.getresponse()
            assert [value for name, value in answer.getheaders() if name == "Access-Control-Allow-Origin"] == named


FETCH = """async ([url, key]) => {
    const answer = await fetch(url, {method: "POST", body: "image", headers: {Authorization: `Bearer ${key}`}});
    return [answer.status, await answer.json()];
}"""


def test_a_page_of_a_browser_may_ask(browser: Browser, page: str, edge: RunningEdge, generous: RunningEdge) -> None:
    """With a key in its header, and it can read a refusal; an edge without its origin is closed to it."""
    context = browser.new_context()
    try:
        tab = context.new_page()
        tab.goto(page)
        url = f"{edge.url}/predictions"
        assert tab.evaluate(FETCH, [f"{url}/{MODEL}", KEY]) == [200, {"seven": 1.0}]
        assert tab.evaluate(FETCH, [f"{url}/{MODEL}", "wrong"])[0] == 401
        with pytest.raises(Exception, match="Failed to fetch"):
            tab.evaluate(FETCH, [f"{generous.url}/predictions/{MODEL}", KEY])
    finally:
        context.close()
