"""Copies of real requests: which ones the edge makes, that no client waits for them, and what comes of them."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.torchserve import TorchServe
from operate.edge.nginx import Nginx
from operate.edge.share import EdgeShare
from operate.errors import EdgeUnusable
from operate.rollout import mirror
from operate.rollout.asking import Turn, compare
from operate.rollout.comparison import Answer, Comparison, Limits
from operate.rollout.mirror import Mirror
from tests.conftest import MODEL, free_ports, wait_for
from tests.edges import RunningEdge, before_nothing, make_folder, plain_session, running, substitute
from tests.listening import Quiet, key_file, listening

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="the program nginx is not installed")
LARGE = b"\x89PNG" + bytes(2_000_000)


def copies_of(taken: Mirror, count: int) -> list[Turn]:
    """The next so many, as soon as they are there."""
    wait_for(lambda: taken._waiting.qsize() >= count, f"{count} copies")
    return [taken._waiting.get_nowait() for _ in range(taken._waiting.qsize())]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """An edge before nothing: a request is answered by 503, and copied all the same."""
    port = free_ports()
    folder = make_folder(tmp_path_factory.mktemp("mirror") / "edge", port, before_nothing(port))
    substitute(folder / "nginx.conf", "100ms", "2s")  # patience on a busy machine
    with running(folder, port, wait=False) as edge:
        wait_for(Nginx(folder).is_running, "nginx")
        yield edge


@pytest.mark.slow
@needs_nginx
def test_the_edge_copies_what_a_client_sends(edge: RunningEdge) -> None:
    """Whole and with the headers that count, of the one model, if no version is named and the client has a key."""
    share = EdgeShare(edge.folder / "canary.conf")
    taken = Mirror(share.copies, 60, 10, 1)
    url = f"{edge.url}/predictions"
    with pytest.raises(EdgeUnusable):
        share.copy('m"; } evil', 1)
    with taken.listening(), plain_session() as session:
        share.copy(MODEL, 1)
        headers = {"Content-Type": "image/png", "X-Top-K": "3", "X-Request-ID": "mine", "X-Retry": "yes"}
        assert session.post(f"{url}/{MODEL}", LARGE, headers=headers).status_code == 503
        session.post(f"{url}/{MODEL}", data=iter([b"in ", b"pieces"]))
        for path in (f"/predictions/{MODEL}/1.0", "/predictions/other", f"/explanations/{MODEL}", "/v2/models/m/infer"):
            session.post(f"{edge.url}{path}", b"no copy")
        session.get(f"{url}/{MODEL}")
        assert edge.predict(b"no key", key=None).status_code == 401
        assert session.post(f"{edge.url}/copy", b"from outside").status_code == 404
        session.post(f"{url}/{MODEL}", b"the last")
        first, second, last = copies_of(taken, 3)
        assert (first.read(), second.read(), last.read()) == (LARGE, b"in pieces", b"the last")
        assert {name: first.headers.get(name) for name in headers} == {
            "Content-Type": "image/png", "X-Top-K": "3", "X-Request-ID": None, "X-Retry": None
        }  # fmt: skip
        share.copy(MODEL, 0.2)
        for _ in range(100):
            session.post(f"{url}/{MODEL}", b"")
        share.withdraw()
        assert 5 < len(copies_of(taken, 1)) + taken.left_out < 40
        session.post(f"{url}/{MODEL}", b"")
        assert taken._waiting.empty()
    assert not share.copies.exists()


def has_followed(edge: RunningEdge) -> bool:
    """Whether the command has made its change after the one of the share."""
    changed, followed = (edge.folder / name for name in ("canary.conf", "run/servers.conf"))
    return followed.stat().st_mtime_ns > changed.stat().st_mtime_ns and not (edge.folder / "run" / "closing").exists()


@contextmanager
def hanging(path: Path) -> Iterator[None]:
    """A socket that takes connections and never reads."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(2)
        yield
    path.unlink()


@pytest.mark.slow
@needs_nginx
def test_a_client_gets_its_answer_whatever_becomes_of_the_copy(edge: RunningEdge) -> None:
    """The same answer where nobody listens, where who listens hangs, and where more come than it can take."""
    share = EdgeShare(edge.folder / "canary.conf")
    with plain_session() as session:

        def answers(count: int) -> set[tuple[int, str]]:
            found = (session.post(f"{edge.url}/predictions/{MODEL}", LARGE) for _ in range(count))
            return {(answer.status_code, answer.text) for answer in found}

        without = answers(3)
        share.copy(MODEL, 1)
        assert answers(30) == without
        # The command follows the changed file. A copy that hangs longer than its answers end their connections would
        # lose the next request; as shipped, it is given up long before.
        wait_for(lambda: has_followed(edge), "the edge's own change")
        with hanging(share.copies):
            assert answers(3) == without
        taken = Mirror(share.copies, 60, 10, 1)
        with taken.listening():
            assert answers(mirror._MOST_WAITING + 8) == without
            wait_for(lambda: taken.left_out, "copies that are left out")
            assert taken._waiting.full()
        share.withdraw()
        assert len(without) == 1


def test_a_broken_copy_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a word, and the next one is taken."""
    taken = Mirror(tmp_path / "copies", 60, 10, 1)
    with taken.listening():
        for sent in (
            b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi",
        ):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(taken.socket))
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(100)
        [copy] = copies_of(taken, 1)
    assert (copy.read(), taken.left_out) == (b"hi", 1)
    assert capfd.readouterr() == ("", "")


def test_copies_come_no_faster_than_asked(tmp_path: Path) -> None:
    """And the time ends where none come."""
    taken = Mirror(tmp_path / "copies", 0.3, 20, 1)
    for _ in range(3):
        taken.take(Turn(lambda: b""))
    began = time.monotonic()
    turns = [turn for turn in taken.due() if turn]
    assert len(turns) == 3
    assert time.monotonic() - began >= 0.3
    assert taken.compared == 6


FORMS: list[Any] = [
    {"7": 0.75, "1": 0.25},
    [{"7": 0.75, "1": 0.25}, {"code": 400, "type": "UnreadableImage", "message": "?"}],
    {"predictions": [{"7": 0.75, "1": 0.25}]},
    {"outputs": [{"name": "label", "shape": [1, 2], "data": ["7", "1"]},
                 {"name": "probability", "shape": [1, 2], "data": [0.75, 0.25]}]},
]  # fmt: skip


def worse(form: Any) -> Any:
    """The other class first."""
    if "outputs" in form:
        labels, probabilities = form["outputs"]
        return {"outputs": [{**labels, "data": labels["data"][::-1]}, probabilities]}
    if isinstance(form, list):
        return [worse(form[0]), *form[1:]]
    return {"predictions": [worse(form["predictions"][0])]} if "predictions" in form else {"1": 0.75, "7": 0.25}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("change", "disagreements"), [(lambda form: form, 0), (worse, 3)])
def test_both_versions_answer_a_copy(
    tmp_path: Path, form: Any, change: Callable[[Any], Any], disagreements: int
) -> None:
    """In the form that it has; the header that says which goes to both; another class and its probability count."""
    asked: list[tuple[str, str, bytes]] = []

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Content-Type"], body))
            self.answer(change(form) if self.path.endswith("/2.0") else form)

    taken = Mirror(tmp_path / "copies", 0.5, 100, 1)
    for _ in range(3):
        taken.take(Turn(lambda: b"{}", headers={"Content-Type": "application/json"}))
    with listening(Handler) as url:
        server = TorchServe(url, url, key_file(tmp_path, inference={"key": "i"}), retry_s=0)
        found = compare(server, "m", ("1.0", "2.0"), taken, Limits(), lambda seconds, comparison: None)
    assert sorted(set(asked)) == [(f"/predictions/m/{v}", "application/json", b"{}") for v in ("1.0", "2.0")]
    assert (len(found.pairs), found.disagreements, found.excess) == (3, disagreements, 0)
    assert found.largest_difference == (0.5 if disagreements else 0)


def test_answers_with_no_class_in_common_differ_by_nothing_that_can_be_said() -> None:
    comparison = Comparison(1)
    comparison.add(Answer([{"7": 1.0}], 1), Answer([{"1": 1.0}], 1))
    assert (comparison.disagreements, comparison.largest_difference) == (1, 0.0)
