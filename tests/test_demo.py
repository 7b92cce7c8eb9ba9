"""The page: what is uploaded, pasted or drawn is answered, what goes wrong can be read there, and nothing leaks."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect

from client import demo
from client.errors import PageUnusable
from client.torchserve import TorchServe
from server.launch import RunningServer
from tests.conftest import LAPTOP, MODEL, PHONE, ROOT, free_ports, run_module, signals_of_a_terminal
from tests.images import BAD
from tests.listening import Quiet, key_file

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the package gradio is not installed")
PATIENCE_MS = 60_000
COPY = """encoded => {
    const bytes = Uint8Array.from(atob(encoded), character => character.charCodeAt(0));
    return navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
}"""


@contextmanager
def serving(url: str, key_file: Path, temporary: Path) -> Iterator[str]:
    """The page of the server at `url`, as a process of its own; yields its address."""
    command = [
        sys.executable, "-m", "client", "--url", url, "--key-file", str(key_file),
        "demo", MODEL, "--port", str(free_ports()),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def address(torchserve: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of the real server."""
    with serving(torchserve.inference_url, torchserve.key_file, tmp_path_factory.mktemp("demo")) as address:
        yield address


@contextmanager
def opened(browser: Browser, address: str, size: tuple[int, int] = LAPTOP) -> Iterator[tuple[Page, list[Request]]]:
    """A tab with the page, and every request that it makes."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    requests: list[Request] = []
    try:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = context.new_page()
        tab.on("request", lambda request: requests.append(request))
        tab.goto(address)
        expect(tab.get_by_role("heading", name=MODEL)).to_be_visible(timeout=PATIENCE_MS)
        yield tab, requests
    finally:
        context.close()


def upload(tab: Page, content: bytes) -> None:
    file = {"name": "an image.png", "mimeType": "image/png", "buffer": content}
    tab.locator("input[type=file]").first.set_input_files(file)


def expect_answer(tab: Page, pattern: str) -> None:
    expect(tab.get_by_label("Time and version")).to_have_value(re.compile(pattern), timeout=PATIENCE_MS)


def expect_explained(tab: Page, label: str) -> None:
    """The best class, time and version, and a picture that has arrived."""
    expect_answer(tab, rf"^\d+\.\d ms, {MODEL} version 1\.0$")
    expect(tab.get_by_test_id("label-output-value")).to_have_text(label)
    tab.wait_for_function(
        "[...document.images].some(image => image.complete && image.naturalWidth == 320)", timeout=PATIENCE_MS
    )


@needs_gradio
def test_an_upload_is_answered_and_nothing_leaves(
    browser: Browser, address: str, torchserve: RunningServer, client: TorchServe, digit: bytes, tmp_path: Path
) -> None:
    """Bars, explanation, time and version as the server says; all requests go to the page, and none has a token."""
    with opened(browser, address) as (tab, requests):
        upload(tab, digit)
        expect_explained(tab, next(iter(client.predict(MODEL, digit))))
        tab.screenshot(path=tmp_path / "laptop.png", full_page=True)
        assert hosts(requests) == {"127.0.0.1"}
        sent = "".join(f"{r.url}{r.headers}{(r.post_data_buffer or b'')!r}" for r in requests) + tab.content()
        for entry in json.loads(torchserve.key_file.read_text()).values():
            assert entry["key"] not in sent
        tab.evaluate("fetch('http://localhost:9/').catch(() => null)")
        assert hosts(requests) == {"127.0.0.1", "localhost"}


def hosts(requests: list[Request]) -> set[str | None]:
    return {urlsplit(request.url).hostname for request in requests if not request.url.startswith(("data:", "blob:"))}


@needs_gradio
def test_paste_and_a_bad_file_on_a_phone(
    browser: Browser, address: str, client: TorchServe, digit: bytes, tmp_path: Path
) -> None:
    """A pasted image is answered, a bad one gets the server's own words, and all of it fits the screen."""
    with opened(browser, address, PHONE) as (tab, _):
        tab.evaluate(COPY, base64.b64encode(digit).decode())
        tab.get_by_label("Paste from clipboard").click()
        expect_explained(tab, next(iter(client.predict(MODEL, digit))))
        tab.screenshot(path=tmp_path / "phone.png", full_page=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        tab.get_by_label("Remove Image").click()
        expect_answer(tab, "^$")
        tab.reload()
        expect(tab.get_by_role("heading", name=MODEL)).to_be_visible(timeout=PATIENCE_MS)
        upload(tab, BAD["text"][0])
        expect_answer(tab, "^error: 415 UnsupportedImage: not an image in an accepted format")
        tab.screenshot(path=tmp_path / "bad.png", full_page=True)


@needs_gradio
def test_a_drawing_is_answered(browser: Browser, address: str, tmp_path: Path) -> None:
    """A stroke from top to bottom is a one, light on dark as the digits of training are."""
    with opened(browser, address) as (tab, _):
        tab.get_by_role("tab", name="Drawing").click()
        tab.get_by_label("Brush").first.click()
        canvas = tab.locator("canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x, y - 100)
        tab.mouse.down()
        tab.mouse.move(x, y + 100, steps=20)
        tab.mouse.up()
        tab.get_by_role("button", name="Classify").click()
        expect_explained(tab, "1")
        tab.screenshot(path=tmp_path / "drawing.png", full_page=True)


class Recorder(Quiet):
    """Keeps what it is sent, and refuses it."""

    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"code": 400, "type": "Recorded", "message": "seen"}, 400)


@contextmanager
def recording() -> Iterator[tuple[str, list[bytes], Callable[[], None]]]:
    """A server that refuses all; yields its address, the bodies that it is sent, and how to stop it early."""
    recorder = type("Recorder", (Recorder,), {"bodies": []})
    server = HTTPServer(("127.0.0.1", 0), recorder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}", recorder.bodies, stop
    finally:
        stop()
        thread.join()


@pytest.mark.process
@pytest.mark.slow
@needs_gradio
def test_bytes_arrive_as_they_are_and_a_dead_server_is_told(browser: Browser, digit: bytes, tmp_path: Path) -> None:
    """The server gets the very file, also one that is no image; once it is gone the page says so; uploads go."""
    tokens = key_file(tmp_path, inference={"key": "a-token"})
    with recording() as (url, bodies, stop), serving(url, tokens, tmp_path) as address:
        with opened(browser, address) as (tab, _):
            for content in (digit, BAD["truncated jpeg"][0]):
                upload(tab, content)
                expect_answer(tab, "^error: 400 Recorded: seen$")
                tab.get_by_label("Remove Image").click()
                expect_answer(tab, "^$")
            stop()
            upload(tab, digit)
            expect_answer(tab, "^error: .*127.0.0.1.*")
            tab.screenshot(path=tmp_path / "down.png", full_page=True)
        assert bodies == [digit, BAD["truncated jpeg"][0]]
        [uploads] = tmp_path.glob("demo-*")
        assert any(file.read_bytes() == digit for file in uploads.rglob("*.png"))
    assert not list(tmp_path.glob("demo-*"))


@pytest.mark.process
def test_a_closed_terminal_leaves_no_uploads(tmp_path: Path) -> None:
    """Their folder goes with the command, here while it imports gradio."""
    closing = "import signal\nprint('imported', flush=True)\nsignal.raise_signal(signal.SIGHUP)"
    (tmp_path / "gradio.py").write_text(closing)
    with signals_of_a_terminal():
        finished = run_module(
            "client", "demo", MODEL, env={**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
        )
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "imported\n", "interrupted\n")
    assert not list(tmp_path.glob("demo-*"))


def test_only_uploads_are_read(tmp_path: Path) -> None:
    """A file that the browser names is sent only from the folder of uploads, whatever way leads out of it."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "in.png").write_bytes(b"in")
    (tmp_path / "out.png").write_bytes(b"out")
    (uploads / "link.png").symlink_to(tmp_path / "out.png")
    assert demo.read_upload({"path": str(uploads / "in.png")}, uploads) == b"in"
    for path in (tmp_path / "out.png", uploads / ".." / "out.png", uploads / "link.png"):
        with pytest.raises(PageUnusable, match="only what was uploaded"):
            demo.read_upload({"path": str(path)}, uploads)


@pytest.mark.process
def test_without_gradio_one_line_says_what_to_install(tmp_path: Path) -> None:
    """A missing gradio is told with the command that installs it."""
    (tmp_path / "gradio.py").write_text("raise ImportError('not here')")
    finished = run_module("client", "demo", MODEL, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert finished.returncode == 1
    assert finished.stderr == "error: the page needs gradio: pip install 'gradio>=6.31'\n"


def test_a_drawing_is_turned_light_on_dark() -> None:
    """Black strokes on white become white on black where that is asked for, as PNG either way."""
    drawing = Image.new("RGB", (4, 4), "white")
    drawing.putpixel((1, 1), (0, 0, 0))
    for light_on_dark, expected in ((True, (255, 0)), (False, (0, 255))):
        encoded = demo.encode_drawing(drawing, light_on_dark)
        assert encoded.startswith(b"\x89PNG")
        seen = Image.open(io.BytesIO(encoded)).convert("L")
        assert (seen.getpixel((1, 1)), seen.getpixel((0, 0))) == expected


class Reached(Exception):
    pass


def guarded(headers: Mapping[str, str], name: str = "127.0.0.1", kind: str = "http") -> int:
    """The status of a request with these headers; 200 where it reaches the page."""

    async def page(scope: demo.Scope, receive: demo.Receive, send: demo.Send) -> None:
        raise Reached

    async def receive() -> object:
        raise AssertionError("nothing of the body is read")

    said: list[Mapping[str, Any]] = []

    async def send(message: Mapping[str, Any]) -> None:
        said.append(message)

    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    try:
        demo.Guard(page, name)({"type": kind, "headers": sent}, receive, send).send(None)
    except Reached:
        return 200
    except StopIteration:  # as an event loop runs it to its end
        pass
    return int(said[0].get("status", said[0].get("code")))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "LOCALHOST:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.1.2:7860"}, 200),
        ({"host": "rebound.example:7860"}, 403),
        ({"host": "localhost.rebound.example"}, 403),
        ({"host": "localhost:7860@rebound.example"}, 403),
        ({"host": "localhost\n"}, 403),
        ({"host": ""}, 403),
        ({}, 403),
        ({"host": "127.0.0.1:7860", "origin": "https://other.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:9"}, 403),
        ({"host": "127.0.0.1:7860", "content_length": str(300 << 20)}, 413),
        ({"host": "127.0.0.1:7860", "content_length": "-1"}, 411),
        ({"host": "127.0.0.1:7860", "transfer_encoding": "chunked"}, 411),
    ],
)
def test_only_the_page_itself_asks(headers: dict[str, str], status: int) -> None:
    """By an address, or by a name of this machine; no page that is pointed here, no other page, no large body."""
    assert guarded(headers) == status


def test_a_host_that_is_named_may_be_asked_for() -> None:
    """`--host NAME` is the name's own permission; a socket of another page is closed."""
    assert guarded({"host": "page.example:7860"}, "page.example") == 200
    assert guarded({"host": "rebound.example"}, kind="websocket") == 1008


def test_the_page_names_no_key_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the tokens should be is said in the terminal alone."""
    pytest.importorskip("PIL")
    [(_, _, line)] = demo.ask(TorchServe("http://127.0.0.1:9", key_file=tmp_path / "none.json"), MODEL, b"image")
    assert str(tmp_path) not in line
    assert "the terminal" in line
    assert str(tmp_path / "none.json") in capsys.readouterr().err


@needs_gradio
def test_a_page_that_is_pointed_here_gets_nothing(address: str) -> None:
    """As the command serves it."""
    port = urlsplit(address).port
    for headers, status in (
        ({}, 200),
        ({"Host": f"rebound.example:{port}"}, 403),
        ({"Origin": "http://a.example"}, 403),
    ):
        assert requests.get(address, headers=headers, timeout=30).status_code == status
    large = requests.post(f"{address}/gradio_api/upload", data=b"x" * (20 << 20), timeout=30)
    assert large.status_code == 413
