"""Code that is not in the model store does not get in by the management API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path

import pytest
import requests

from client.errors import ModelApiOff
from server.launch import RunningServer
from tests.broken import appended, repacked
from tests.conftest import MODEL, with_model_api
from tests.listening import Quiet

pytestmark = [pytest.mark.torture, pytest.mark.server, pytest.mark.slow]

ARCHIVE = "stranger.mar"


class Elsewhere(HTTPServer):
    """Another machine with an archive: under its own path and behind a redirect."""

    def __init__(self, archive: bytes) -> None:
        super().__init__(("127.0.0.1", 0), ElsewhereHandler)
        self.url, self.archive = f"http://127.0.0.1:{self.server_address[1]}", archive
        self.hits: list[str] = []


class ElsewhereHandler(Quiet):
    server: Elsewhere

    def do_GET(self) -> None:
        self.server.hits.append(self.path)
        if self.path.startswith("/redirect/"):
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/{ARCHIVE}")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.archive)))
        self.end_headers()
        self.wfile.write(self.server.archive)


@pytest.fixture(scope="module")
def strange(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a working archive, and the same unpacked, whose code leaves the file `ran` in it."""
    folder = tmp_path_factory.mktemp("strange")
    marking = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()"
    repacked(model_store / f"{MODEL}.mar", folder, lambda content: appended(content, "image_classifier.py", marking))
    (folder / f"{MODEL}.mar").rename(folder / ARCHIVE)
    return folder


@pytest.fixture(scope="module")
def elsewhere(strange: Path) -> Iterator[Elsewhere]:
    with Elsewhere((strange / ARCHIVE).read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attacks(strange: Path, elsewhere: Elsewhere) -> dict[str, str]:
    """Ways to name the archive outside the store."""
    return {
        "http": f"{elsewhere.url}/{ARCHIVE}",
        "redirect": f"{elsewhere.url}/redirect/{ARCHIVE}",
        "file": f"file://{strange / ARCHIVE}",
        "absolute path": str(strange / ARCHIVE),
        "parent folder": f"../../{strange.name}/{ARCHIVE}",
        "folder": str(strange / "content"),
    }


def register(server: RunningServer, url: str, name: str = "stranger") -> requests.Response:
    """Past the client, which would not send it: one who has the management token."""
    token = json.loads(server.key_file.read_text())["management"]["key"]
    return requests.post(
        f"{server.management_url}/models",
        params={"url": url, "model_name": name, "initial_workers": "1", "synchronous": "true"},
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
    )


@pytest.fixture(scope="module")
def open_server(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The model API is on, all else is as we ship it."""
    with with_model_api(tmp_path_factory.mktemp("open"), model_store) as server:
        yield server


@pytest.fixture(scope="module")
def careless_server(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The model API is on, and URLs are allowed as by TorchServe's default."""
    allowed = "allowed_urls=file://.*|http(s)?://.*\n"
    with with_model_api(tmp_path_factory.mktemp("careless"), model_store, allowed) as server:
        yield server


def content(server: RunningServer) -> dict[str, bytes]:
    store = server.key_file.parent / "model_store"
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["http", "redirect", "file", "absolute path", "parent folder"])
def test_what_is_not_in_the_store_is_refused(
    open_server: RunningServer, strange: Path, elsewhere: Elsewhere, way: str
) -> None:
    """With the model API on: refused, nobody is asked for the archive, no code runs, the store is as it was."""
    before = content(open_server)
    answer = register(open_server, attacks(strange, elsewhere)[way])
    assert 400 <= answer.status_code < 500, answer.text
    assert content(open_server) == before
    assert elsewhere.hits == []
    assert not (strange / "ran").exists()
    assert open_server.client().models() == [MODEL]


@pytest.mark.parametrize("way", ["http", "redirect", "file", "absolute path", "parent folder", "folder"])
def test_by_default_nothing_is_registered(
    tortured: RunningServer, strange: Path, elsewhere: Elsewhere, way: str
) -> None:
    """The model API is off as shipped, and then not even a folder's code runs."""
    answer = register(tortured, attacks(strange, elsewhere)[way])
    assert answer.status_code == 405
    assert elsewhere.hits == []
    assert not (strange / "ran").exists()
    with pytest.raises(ModelApiOff):
        tortured.client().register(MODEL)


def test_what_the_model_api_lets_through(open_server: RunningServer, strange: Path, elsewhere: Elsewhere) -> None:
    """A control, and a limit: with the model API on, whoever has the management token can have a folder's code run."""
    assert register(open_server, attacks(strange, elsewhere)["folder"]).ok
    assert (strange / "ran").exists()
    open_server.client().unregister("stranger")
    (strange / "ran").unlink()


@pytest.mark.parametrize("way", ["http", "redirect", "file"])
def test_urls_that_are_allowed_get_in(
    careless_server: RunningServer, strange: Path, elsewhere: Elsewhere, way: str
) -> None:
    """The control: with TorchServe's own `allowed_urls` the same requests succeed, and the code runs."""
    assert register(careless_server, attacks(strange, elsewhere)[way]).ok
    assert (strange / "ran").exists()
    assert ARCHIVE in content(careless_server)
    careless_server.client().unregister("stranger")
    (careless_server.key_file.parent / "model_store" / ARCHIVE).unlink(missing_ok=True)
    (strange / "ran").unlink()
    elsewhere.hits.clear()
