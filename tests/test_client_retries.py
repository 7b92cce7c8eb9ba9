"""What the client asks again, and what it never does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from client import bulk
from client.errors import (
    ClientError,
    ModelNotFound,
    NotAuthorized,
    NothingListens,
    NotReady,
    RequestRefused,
    ServerBusy,
    ServerUnreachable,
    WorkerDied,
)
from client.inputs import expand
from client.torchserve import TorchServe
from tests.conftest import MODEL, PATIENCE_S
from tests.listening import Quiet, key_file, listening

Answer = tuple[int, object]
OK: Answer = (200, {"7": 0.9})
FULL: Answer = (503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker to serve"})
FAILED: Answer = (503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"})
LIMITED: Answer = (429, {"code": 429, "type": "TooManyRequestsException", "message": "Too many requests"})
REMOVED: Answer = (200, {"status": f'Model "{MODEL}" unregistered'})
GONE: Answer = (404, {"code": 404, "type": "ModelNotFoundException", "message": f"Model not found: {MODEL}"})
CONFUSED: Answer = (500, {"code": 500, "type": "ConcurrentModificationException"})
SCALING: Answer = (202, {"status": "Processing worker updates..."})
DEFAULT: Answer = (200, {"status": "Default version succesfully updated"})
UNKNOWN: Answer = (401, {"code": 401, "type": "NotAuthorizedException", "message": "Send a key"})
DIED: Answer = (507, {"code": 507, "type": "InternalServerException", "message": "Worker died."})
DIED_UNSEEN: Answer = (500, {"code": 500, "type": "InternalServerException", "message": "Worker died."})
SILENCE: Answer = (0, None)
"""The connection ends without an answer."""
Serve = Callable[..., tuple[TorchServe, list[Answer]]]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Serve]:
    """A server that gives the answers it is told to, in order; its client, and the answers still to be given."""

    def serve(*answers: Answer, retry_s: float = 20, gets: bool = False) -> tuple[TorchServe, list[Answer]]:
        remaining = list(answers)

        class Handler(Quiet):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_DELETE()

            def do_PUT(self) -> None:
                self.do_DELETE()

            def do_GET(self) -> None:
                if gets:
                    self.do_DELETE()
                else:
                    self.send_error(501)

            def do_DELETE(self) -> None:
                answer = remaining.pop(0)
                if answer == SILENCE:
                    self.close_connection = True
                else:
                    self.answer(answer[1], answer[0])

        path = key_file(tmp_path, inference={"key": "i"}, management={"key": "m"})
        url = servers.enter_context(listening(Handler))
        return TorchServe(url, url, path, retry_s=retry_s), remaining

    with ExitStack() as servers:
        yield serve


@pytest.mark.parametrize("answers", [[FULL, FULL, OK], [DIED, DIED_UNSEEN, OK], [FULL, DIED, OK], [LIMITED, OK]])
def test_what_is_safe_is_asked_again(scripted: Serve, answers: list[Answer]) -> None:
    """A full queue, a worker that was killed and an edge's limit are waited out."""
    client, _ = scripted(*answers)
    assert client.predict(MODEL, b"image") == OK[1]


@pytest.mark.parametrize("answer", [FAILED, (413, {"type": "ImageTooLarge", "message": ""}), (500, {})])
def test_nothing_else_is_asked_again(scripted: Serve, answer: Answer) -> None:
    """What the handler failed at and what was refused would fail again."""
    client, remaining = scripted(answer, OK)
    with pytest.raises(RequestRefused) as refusal:
        client.predict(MODEL, b"image")
    assert refusal.value.status == answer[0]
    assert remaining == [OK]


def test_an_answer_that_breaks_off_is_no_row(tmp_path: Path) -> None:
    """A server that ends within its answer is unreachable, which would befall every further image."""

    class Handler(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"7": ')

    (tmp_path / "a.png").write_bytes(b"image")
    with listening(Handler) as url, pytest.raises(ServerUnreachable, match="closed the connection before it answered"):
        client = TorchServe(url, key_file=key_file(tmp_path, inference={"key": "i"}))
        list(bulk.predict(client, MODEL, expand([str(tmp_path / "a.png")]), 1))


@pytest.mark.parametrize("answers", [[REMOVED], [CONFUSED, REMOVED], [CONFUSED, GONE]])
def test_a_failed_removal_is_made_again(scripted: Serve, answers: list[Answer]) -> None:
    """Once, after a 500; that the model is not found then is what was wanted."""
    client, remaining = scripted(*answers)
    assert client.unregister(MODEL) == f'Model "{MODEL}" unregistered'
    assert remaining == []


@pytest.mark.parametrize(
    ("answers", "error"), [([CONFUSED, CONFUSED, REMOVED], RequestRefused), ([FAILED, REMOVED], RequestRefused),
                           ([GONE, REMOVED], ModelNotFound)],
)  # fmt: skip
def test_another_removal_is_not_made_again(scripted: Serve, answers: list[Answer], error: type[ClientError]) -> None:
    """A second 500, another status and a model that was not found at first are raised."""
    client, remaining = scripted(*answers)
    with pytest.raises(error):
        client.unregister(MODEL)
    assert remaining == [REMOVED]


def test_a_failed_scaling_is_made_again(scripted: Serve) -> None:
    """Once, after a 500; a second one is raised by TorchServe's own name for it, and another status at once."""
    client, remaining = scripted(CONFUSED, SCALING)
    client.scale(MODEL, 1, wait=False)
    assert remaining == []
    client, remaining = scripted(CONFUSED, CONFUSED, SCALING)
    with pytest.raises(RequestRefused, match=r"^500 ConcurrentModificationException: no reason given$"):
        client.scale(MODEL, 1, wait=False)
    assert remaining == [SCALING]
    client, remaining = scripted(GONE, SCALING)
    with pytest.raises(ModelNotFound):
        client.scale(MODEL, 1, wait=False)
    assert remaining == [SCALING]


def described(*pids: int, status: str = "UNLOADING") -> Answer:
    """What TorchServe says of a version whose workers are the processes `pids`."""
    workers = [{"id": str(index), "status": status, "pid": pid} for index, pid in enumerate(pids)]
    return 200, [{"minWorkers": 1, "workers": workers}]


def versions(*files: str) -> Answer:
    """What it says of all versions of a model, 1.0 and on, by the files that they came from."""
    return 200, [{"modelVersion": f"{number}.0", "modelUrl": file} for number, file in enumerate(files, 1)]


BEFORE, AFTER, ACCEPTED = versions("first.mar"), versions("first.mar", "next.mar"), SCALING
LOADING = (BEFORE, ACCEPTED, AFTER, described(-1))
TAKEN: Answer = (409, {"code": 409, "type": "ConflictStatusException", "message": "is registered already"})


def test_a_version_is_registered_once_its_workers_have_loaded(scripted: Serve) -> None:
    """Its name is that of what has come from the file."""
    client, remaining = scripted(*LOADING, described(7), SILENCE, described(7), described(7, status="READY"), gets=True)
    assert client.register("next", model=MODEL) == f"{MODEL}/2.0"
    assert remaining == []


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([*LOADING, described(-1), described(7), described(8), AFTER, REMOVED], NotReady),
        ([*LOADING, GONE, BEFORE, AFTER, REMOVED], NotReady),
        ([BEFORE, SILENCE, BEFORE, AFTER, REMOVED], ServerUnreachable),
        ([BEFORE, ACCEPTED, BEFORE, AFTER, REMOVED], NotReady),
        ([BEFORE, TAKEN], RequestRefused),
    ],
)
def test_nothing_is_left_of_a_version_that_does_not_load(
    scripted: Serve, answers: list[Answer], error: type[ClientError]
) -> None:
    """A worker that ended, a version that has gone, and one that comes after its call was given up; what the server
    refuses is another's."""
    client, remaining = scripted(*answers, gets=True)
    with pytest.raises(error):
        client.register("next", model=MODEL)
    assert remaining == []


def test_a_dead_worker_may_come_back_while_a_model_is_scaled(scripted: Serve) -> None:
    """Its process is another one then, and has not failed to load."""
    client, remaining = scripted(SCALING, described(7), described(8), described(8, status="READY"), gets=True)
    client.scale(MODEL, 1)
    assert remaining == []


def test_a_failed_change_of_the_default_is_made_again(scripted: Serve) -> None:
    """Once, after a 500; another status is raised at once."""
    client, remaining = scripted(CONFUSED, DEFAULT)
    assert client.set_default(MODEL, "2.0") == DEFAULT[1]["status"]
    assert remaining == []
    client, remaining = scripted(GONE, DEFAULT)
    with pytest.raises(ModelNotFound):
        client.set_default(MODEL, "2.0")
    assert remaining == [DEFAULT]


def test_an_unknown_key_ends_a_run(scripted: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge's 401 would befall every image: it is raised, says where the key is from, and does not show it."""
    monkeypatch.setenv("TORCHSERVE_INFERENCE_TOKEN", "very-secret")
    client, remaining = scripted(UNKNOWN, OK)
    (tmp_path / "a.png").write_bytes(b"image")
    with pytest.raises(NotAuthorized, match=r"^401 NotAuth\S+: Send a key .*TORCHSERVE_INFERENCE_TOKEN") as refusal:
        list(bulk.predict(client, MODEL, expand([str(tmp_path / "a.png")]), 1))
    assert "very-secret" not in str(refusal.value)
    assert remaining == [OK]


def test_asking_again_ends(scripted: Serve) -> None:
    """When the time is up the last error is raised; an image that kills workers gets three of them."""
    started = time.monotonic()
    client, _ = scripted(*[FULL] * 50, retry_s=0.5)
    with pytest.raises(ServerBusy):
        client.predict(MODEL, b"image")
    assert 0.4 < time.monotonic() - started < PATIENCE_S
    client, remaining = scripted(*[DIED] * 5)
    with pytest.raises(WorkerDied):
        client.predict(MODEL, b"image")
    assert len(remaining) == 2


def test_a_server_that_was_there_is_waited_for(scripted: Serve) -> None:
    """A refused connection is tried again only if the server has answered before; otherwise it is said at once."""
    client, _ = scripted(OK, retry_s=0.5)
    client.predict(MODEL, b"image")
    port = int(client.url.rpartition(":")[2])
    gone = TorchServe("http://127.0.0.1:9", key_file=client._connection.tokens.path, retry_s=60)
    started = time.monotonic()
    with pytest.raises(NothingListens):
        gone.predict(MODEL, b"image")
    assert time.monotonic() - started < PATIENCE_S
    client._connection.urls = {**client._connection.urls, "inference": f"http://127.0.0.2:{port}"}
    started = time.monotonic()
    with pytest.raises(NothingListens):
        client.predict(MODEL, b"image")
    assert time.monotonic() - started > 0.4
