"""Standard gRPC clients get through `python -m operate grpc` what HTTP gets: answers, refusals and limits."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from grpc import StatusCode

from client.errors import NoAddress
from client.torchserve import TorchServe
from handler.decoding import decode
from operate.__main__ import app
from operate.edge.nginx import Nginx
from operate.errors import DoorUnusable
from operate.grpc_door import door as door_module
from operate.grpc_door import messages, upstream
from operate.grpc_door.command import MAX_BYTES, credentials
from operate.grpc_door.messages import CLASSES, MOST_ELEMENTS, InvalidMessage
from operate.grpc_door.upstream import Upstream
from server.launch import RunningServer
from tests.commands import invoke
from tests.conftest import MODEL, PATIENCE_S, ROOT, free_ports, run_module, signals_of_a_terminal, wait_for
from tests.contract.contract import PIXELS, V2, about, of_v2, v2
from tests.edges import KEY, behind, certificate_command, ended, make_folder, running
from tests.listening import Quiet, listening
from tests.open_inference import (
    answers_of,
    begin,
    call,
    connected,
    door_before,
    infer_request,
    send,
    status_of,
    tensor,
)
from tests.pages import blocks

TOKEN = "the caller's"
ANSWER = {
    "id": "7",
    "model_name": MODEL,
    "model_version": "1.0",
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": ["ä", "1"]},
        {"name": "probability", "datatype": "FP32", "shape": [2, 1], "data": [0.5, 0.25]},
        {"name": "accepted", "datatype": "BOOL", "shape": [2], "data": [True, False]},
    ],
}
NO_ANSWER = (StatusCode.INTERNAL, "the server's answer does not follow this protocol")
TOO_MANY = MOST_ELEMENTS + 1
NO_TRITON = "no tritonclient with gRPC: pip install 'tritonclient[grpc]'"


@pytest.fixture(scope="module")
def door(torchserve: RunningServer) -> Iterator[str]:
    """Before the session's TorchServe."""
    with door_before(torchserve.inference_url) as address:
        yield address


@pytest.fixture
def token(torchserve: RunningServer) -> str:
    """As it is now: other tests have it exchanged."""
    return str(json.loads(torchserve.key_file.read_text())["inference"]["key"])


def refused(address: str, method: str, request: Any = None, **options: Any) -> tuple[StatusCode, str]:
    """Status and message of a call that is refused."""
    with pytest.raises(grpc.RpcError) as refusal:
        call(address, method, request, **options)
    return refusal.value.code(), refusal.value.details()


def answering(
    document: object, status: int = 200, seen: list[BaseHTTPRequestHandler] | None = None
) -> type[BaseHTTPRequestHandler]:
    """An HTTP server that says the same to everyone."""

    class Stub(Quiet):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if seen is not None:
                seen.append(self)
            self.answer(document, status)

        do_POST = do_GET

    return Stub


class Held(Quiet):
    """Answers once it may."""

    asked: threading.Event
    released: threading.Event

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.set()
        self.released.wait(PATIENCE_S)
        with suppress(ConnectionError):  # nobody waits after the deadline
            self.answer(ANSWER)


@pytest.fixture
def held() -> Iterator[str]:
    """The address of a server whose answers wait for `Held.released`."""
    Held.asked, Held.released = threading.Event(), threading.Event()
    with listening(Held) as url:
        try:
            yield url
        finally:
            Held.released.set()


def door_command(url: str, *options: object) -> list[str]:
    return [sys.executable, "-m", "operate", "--url", url, "grpc", *map(str, options)]


def wanted(name: str, *parameters: str) -> Any:
    """A requested output."""
    return CLASSES["InferRequestedOutputTensor"](name=name, parameters=[{"key": key} for key in parameters])


def with_parameters(*parameters: str) -> Any:
    """An input of one image."""
    given = tensor(bytes_contents=[b"a"])
    given.parameters.extend(CLASSES["ParametersEntry"](key=key) for key in parameters)
    return given


@contextmanager
def door_process(url: str, *options: object, status: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the command and its process, until it has ended with this status and without a word."""
    with signals_of_a_terminal():
        process = subprocess.Popen(
            door_command(url, "--port", 0, *options), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    try:
        if said:
            assert re.fullmatch(rf"127\.0\.0\.1:\d+ asks {url}\n", said)
            yield said.split()[0], process
    finally:
        process.terminate()
        complaints = process.communicate(timeout=90)[1]
    assert (process.returncode, complaints) == (status, "")


@pytest.mark.parametrize("raw", [False, True])
def test_images_are_answered_as_over_http(
    door: str, token: str, torchserve: RunningServer, session: requests.Session, digit: bytes, raw: bool
) -> None:
    """In `contents` and as Triton's clients send them; the answer comes in the same form, and names its model."""
    expected = session.post(torchserve.inference_url + V2, json=v2(digit, digit), timeout=30).json()
    response = call(door, "ModelInfer", infer_request(digit, digit, raw=raw), token)
    assert answers_of(response) == [about(answer) for answer in of_v2(expected)]
    assert (response.id, response.model_name, response.model_version) == ("7", MODEL, "1.0")
    assert len(response.raw_output_contents) == (2 if raw else 0)
    assert [output.HasField("contents") for output in response.outputs] == [not raw] * 2


@pytest.mark.parametrize("raw", [False, True])
def test_pixels_are_answered_as_their_image(door: str, token: str, client: TorchServe, digit: bytes, raw: bool) -> None:
    """UINT8, in `uint_contents` and as bytes."""
    pixels = decode(digit, PIXELS).numpy()
    shape = [1, *pixels.shape]
    given = tensor("UINT8", shape) if raw else tensor("UINT8", shape, uint_contents=pixels.ravel().tolist())
    more = {"raw_input_contents": [pixels.tobytes()]} if raw else {}
    request = CLASSES["ModelInferRequest"](model_name=MODEL, inputs=[given], **more)
    response = call(door, "ModelInfer", request, token)
    assert answers_of(response) == [about(client.predict(MODEL, digit))]
    assert response.id == ""


def test_a_version_top_k_and_single_outputs(door: str, token: str, client: TorchServe, digit: bytes) -> None:
    """The version in the request, `x-top-k` in the metadata, and only the outputs that are asked for."""
    request = infer_request(digit, model_version="1.0")
    [answer] = answers_of(call(door, "ModelInfer", request, token, metadata=[("x-top-k", "2")]))
    assert answer == about(client.predict(MODEL, digit, top_k=2))
    response = call(door, "ModelInfer", infer_request(digit, raw=True, outputs=[wanted("probability")]), token)
    assert [output.name for output in response.outputs] == ["probability"]
    assert np.frombuffer(response.raw_output_contents[0], "<f4")[0] == pytest.approx(max(answer.values()), abs=1e-5)


def test_a_bad_image_refuses_its_batch_as_over_http(
    door: str, token: str, torchserve: RunningServer, session: requests.Session, digit: bytes
) -> None:
    """With HTTP's message; a damaged one and one that is none."""
    for bad in (b"no image", digit[:100]):
        refusal = session.post(torchserve.inference_url + V2, json=v2(digit, bad), timeout=30).json()
        code, message = refused(door, "ModelInfer", infer_request(digit, bad), token=token)
        assert code is StatusCode.INVALID_ARGUMENT
        assert message == f"{refusal['code']} {refusal['type']}: {refusal['message']}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": []}, "one tensor, found 0"),
        ({"inputs": [tensor(bytes_contents=[b"a"])] * 2}, "one tensor, found 2"),
        ({"inputs": [tensor()]}, 'must be in "contents.bytes_contents" or in "raw_input_contents"'),
        ({"inputs": [tensor()], "raw_input_contents": [b""]}, "raw_input_contents"),
        ({"inputs": [tensor()], "raw_input_contents": [b"a", b"b"]}, "raw_input_contents"),
        ({"inputs": [tensor(bytes_contents=[b"a"])], "raw_input_contents": [b"a"]}, "raw_input_contents"),
        ({"inputs": [tensor()], "raw_input_contents": [b"\xff\xff\xff\xffno"]}, "ends within an element"),
        ({"inputs": [tensor("FP32", fp32_contents=[1.0])]}, 'must be "BYTES" or "UINT8", found'),
        ({"inputs": [tensor("UINT8", [1, 1, 32, 32], uint_contents=[256] * 1024)]}, "from 0 to 255"),
        ({"inputs": [tensor("UINT8", [1], uint_contents=[1])]}, '"inputs[0].shape" must be'),
        ({"id": "x" * 501}, '"id" has more than'),
        ({"outputs": [wanted("logits")]}, "label, probability, found 'logits'"),
        ({"outputs": [wanted("label", "classification")]}, 'parameter "classification" of a tensor is not supported'),
        ({"outputs": [wanted("label", "shared_memory_region")]}, 'parameter "shared_memory_region"'),
        ({"inputs": [with_parameters("shared_memory_region")]}, 'parameter "shared_memory_region"'),
        ({"inputs": [with_parameters(*["a"] * TOO_MANY)]}, f'"parameters" has {TOO_MANY} elements'),
        ({"outputs": [wanted("label")] * TOO_MANY}, f'"outputs" has {TOO_MANY} elements, more than 1000'),
        ({"inputs": [tensor(shape=[1] * TOO_MANY, bytes_contents=[b"a"])]}, f'"inputs[0].shape" has {TOO_MANY}'),
        ({"inputs": [tensor(bytes_contents=[b""] * TOO_MANY)]}, f'"contents.bytes_contents" has {TOO_MANY}'),
        ({"inputs": [tensor(bytes_contents=[b""] * MOST_ELEMENTS)]}, "65 images in one request are more than the 64"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_request_that_is_none_says_why(
    door: str, token: str, digit: bytes, fields: dict[str, Any], message: str
) -> None:
    """Whether the door or the server refuses it."""
    fields = {"model_name": MODEL, "inputs": [tensor(bytes_contents=[digit])], **fields}
    code, details = refused(door, "ModelInfer", CLASSES["ModelInferRequest"](**fields), token=token)
    assert code is StatusCode.INVALID_ARGUMENT
    assert message in details


@pytest.mark.parametrize(
    "named",
    [
        {"model_name": "nobody"}, {"model_version": "9.9"}, {"model_name": ""}, {"model_name": ".."},
        {"model_name": "a/../b"}, {"model_name": f"{MODEL}?x"}, {"model_version": "../1.0"},
    ],
    ids=str,
)  # fmt: skip
def test_an_unknown_model_is_not_found(door: str, token: str, digit: bytes, named: dict[str, str]) -> None:
    """Nor a name that would be another path of the server."""
    assert refused(door, "ModelInfer", infer_request(digit, **named), token=token)[0] is StatusCode.NOT_FOUND
    name, version = named.get("model_name", MODEL), named.get("model_version", "")
    for method in ("ModelReady", "ModelMetadata"):
        request = CLASSES[f"{method}Request"](name=name, version=version)
        assert refused(door, method, request, token=token)[0] is StatusCode.NOT_FOUND


@pytest.mark.parametrize("wrong", [None, "wrong"])
def test_without_the_token_nothing_is_answered(door: str, digit: bytes, wrong: str | None) -> None:
    """The door adds none of its own: neither predictions nor readiness."""
    named = {"name": MODEL}
    for method, request in {
        "ModelInfer": infer_request(digit),
        "ModelReady": CLASSES["ModelReadyRequest"](**named),
        "ModelMetadata": CLASSES["ModelMetadataRequest"](**named),
        "ServerReady": None,
        "ServerLive": None,
        "ServerMetadata": None,
    }.items():
        code, message = refused(door, method, request, token=wrong)
        assert code is StatusCode.UNAUTHENTICATED
        assert "InvalidKeyException" in message


def test_server_and_model_tell_what_they_are(door: str, token: str) -> None:
    """Liveness, readiness and metadata."""
    assert call(door, "ServerLive", token=token).live
    assert call(door, "ServerReady", token=token).ready
    server = call(door, "ServerMetadata", token=token)
    assert (server.name, server.version) == ("Torchserve", "0.12.0")
    assert call(door, "ModelReady", CLASSES["ModelReadyRequest"](name=MODEL, version="1.0"), token).ready
    model = call(door, "ModelMetadata", CLASSES["ModelMetadataRequest"](name=MODEL), token)
    assert (model.name, list(model.versions)) == (MODEL, ["1.0"])
    assert [(each.name, each.datatype, list(each.shape)) for each in model.inputs] == [("image", "BYTES", [-1])]
    assert [each.name for each in model.outputs] == ["label", "probability"]


def test_the_version_of_a_server_is_a_word() -> None:
    """Without the line break of the file that it is read from."""
    with listening(answering({"name": "Torchserve", "version": "0.12.0\n"})) as url, door_before(url) as door:
        assert call(door, "ServerMetadata").version == "0.12.0"


def test_a_large_message_is_refused(door: str, token: str) -> None:
    """By the door one byte above its limit; by the server where the door's limit is not reached."""
    empty = infer_request(raw=True, id="")
    empty.raw_input_contents[0] = bytes(MAX_BYTES)
    beyond = MAX_BYTES - (empty.ByteSize() - MAX_BYTES)
    for size, code, word in (
        (beyond + 1, StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        (beyond, StatusCode.INVALID_ARGUMENT, "413"),
    ):
        empty.raw_input_contents[0] = bytes(size)
        found = refused(door, "ModelInfer", empty, token=token)
        assert found[0] is code
        assert word in found[1]


def test_what_a_caller_says_is_passed_on(digit: bytes) -> None:
    """Its token, trace and deadline; nothing else, and no token where it sends none."""
    seen: list[BaseHTTPRequestHandler] = []
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = [("traceparent", trace), ("x-request-id", "a-1"), ("describe", "True"), ("x-retry", "yes")]
    with listening(answering(ANSWER, seen=seen)) as url, door_before(url) as door:
        response = call(door, "ModelInfer", infer_request(digit), TOKEN, metadata=metadata, timeout_s=20)
        call(door, "ModelInfer", infer_request(digit, model_version="2"), timeout_s=None)
    first, second = (request.headers for request in seen)
    assert [request.path for request in seen] == [f"/predictions/{MODEL}", f"/predictions/{MODEL}/2"]
    assert (first["authorization"], first["traceparent"], first["x-request-id"]) == (f"Bearer {TOKEN}", trace, "a-1")
    assert not {"describe", "x-retry"} & {name.lower() for name in first}
    assert "authorization" not in second
    waits_ms = [int(headers["x-envoy-expected-rq-timeout-ms"]) for headers in (first, second)]
    assert 0 < waits_ms[0] < 21_000  # gRPC rounds up what it sends
    assert waits_ms[1] == 30_000
    assert re.fullmatch(r"t=\d{10,}\.\d{3}", first["x-request-start"])
    label, _, accepted = response.outputs
    assert [each.decode() for each in label.contents.bytes_contents] == ["ä", "1"]
    assert list(accepted.contents.bool_contents) == [True, False]


def test_marks_in_raw_form(digit: bytes) -> None:
    """A byte for each image."""
    with listening(answering(ANSWER)) as url, door_before(url) as door:
        response = call(door, "ModelInfer", infer_request(digit, raw=True))
    assert (response.outputs[2].name, response.raw_output_contents[2]) == ("accepted", b"\x01\x00")
    assert answers_of(response) == [{"ä": 0.5}, {"1": 0.25}]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, StatusCode.INVALID_ARGUMENT), (401, StatusCode.UNAUTHENTICATED), (403, StatusCode.PERMISSION_DENIED),
        (404, StatusCode.NOT_FOUND), (408, StatusCode.DEADLINE_EXCEEDED), (413, StatusCode.INVALID_ARGUMENT),
        (415, StatusCode.INVALID_ARGUMENT), (422, StatusCode.INVALID_ARGUMENT), (429, StatusCode.RESOURCE_EXHAUSTED),
        (500, StatusCode.INTERNAL), (501, StatusCode.UNIMPLEMENTED), (503, StatusCode.UNAVAILABLE),
        (504, StatusCode.DEADLINE_EXCEEDED), (507, StatusCode.INTERNAL),
    ],
)  # fmt: skip
def test_an_http_status_becomes_the_fitting_one(digit: bytes, status: int, code: StatusCode) -> None:
    """With the server's message, cut where it is long."""
    document = {"code": status, "type": "Kind", "message": "why " + "x" * 1000}
    with listening(answering(document, status)) as url, door_before(url) as door:
        found, message = refused(door, "ModelInfer", infer_request(digit))
    assert found is code
    assert (message[:12], len(message)) == (f"{status} Kind: why"[:12], 500)


def test_what_is_no_answer_of_such_a_server(digit: bytes) -> None:
    """No path for it, a redirect, an error without a reason, JSON of another form, and something that is no JSON."""
    named = CLASSES["ModelReadyRequest"](name=MODEL)
    other_handler = (StatusCode.UNIMPLEMENTED, "the model has another handler, which gRPC cannot ask here")
    with listening(answering([])) as url, door_before(url) as door:
        for method, request in (
            ("ServerLive", None), ("ServerReady", None), ("ServerMetadata", None), ("ModelInfer", infer_request(digit)),
        ):  # fmt: skip
            assert refused(door, method, request) == NO_ANSWER
        assert refused(door, "ModelReady", named) == other_handler
        assert refused(door, "ModelMetadata", CLASSES["ModelMetadataRequest"](name=MODEL)) == other_handler
    outputs = [{"name": "probability", "datatype": "FP32", "shape": [1, 1], "data": ["0.5"]}]
    with listening(answering({**ANSWER, "outputs": outputs})) as url, door_before(url) as door:
        for raw in (True, False):
            assert refused(door, "ModelInfer", infer_request(digit, raw=raw)) == NO_ANSWER
    no_path = {"code": 404, "type": "ResourceNotFoundException", "message": "Requested resource is not found"}
    for status, document, expected in (
        (404, no_path, (StatusCode.UNIMPLEMENTED, "404 ResourceNotFoundException: Requested resource is not found")),
        (302, {}, (StatusCode.INTERNAL, "302 Found: the server gives no reason")),
        (413, [], (StatusCode.INVALID_ARGUMENT, "413 Request Entity Too Large: the server gives no reason")),
    ):
        with listening(answering(document, status)) as url, door_before(url) as door:
            assert refused(door, "ServerMetadata") == expected

    class Page(Quiet):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"<html>")

    with listening(Page) as url, door_before(url) as door:
        assert refused(door, "ModelInfer", infer_request(digit)) == NO_ANSWER

    class Other(Page):
        """A worker that describes its model in another way."""

        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("x-model-name", MODEL)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    with listening(Other) as url, door_before(url) as door:
        assert refused(door, "ModelMetadata", CLASSES["ModelMetadataRequest"](name=MODEL)) == NO_ANSWER


def test_nobody_behind_the_door(digit: bytes) -> None:
    """Predictions may be asked for again, and nothing is ready."""
    with door_before(f"http://127.0.0.1:{free_ports()}") as door:
        code, message = refused(door, "ModelInfer", infer_request(digit))
        assert (code, message) == (
            StatusCode.UNAVAILABLE,
            "the server behind the door does not answer (ConnectionError)",
        )
        assert not call(door, "ServerLive").live
        assert not call(door, "ServerReady").ready
        assert not call(door, "ModelReady", CLASSES["ModelReadyRequest"](name=MODEL)).ready
        assert refused(door, "ServerMetadata")[0] is StatusCode.UNAVAILABLE


def test_calls_at_a_time_are_bounded_and_end_with_their_deadline(held: str, digit: bytes) -> None:
    """The second of two is refused at once while the first waits; the first ends in time."""
    with door_before(held, most_calls=1) as door, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refused, door, "ModelInfer", infer_request(digit), timeout_s=2)
        assert Held.asked.wait(PATIENCE_S)
        assert refused(door, "ServerLive")[0] is StatusCode.RESOURCE_EXHAUSTED
        assert waiting.result(PATIENCE_S)[0] is StatusCode.DEADLINE_EXCEEDED
        Held.released.set()


def test_an_address_that_does_not_answer(digit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a connection is not even refused, nobody is there either."""
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):  # they wait to be accepted, and the system leaves the next one without an answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        with door_before(f"http://127.0.0.1:{listener.getsockname()[1]}") as door:
            code, message = refused(door, "ModelInfer", infer_request(digit))
            assert (code, message[-16:]) == (StatusCode.UNAVAILABLE, "(ConnectTimeout)")
            assert not call(door, "ServerLive").live


def test_a_slow_upload_is_no_slow_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may take longer for a large body than for a connection."""
    monkeypatch.setattr(upstream, "CONNECT_TIMEOUT_S", 1.0)

    class Slow(Quiet):
        def do_POST(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            left = int(self.headers["Content-Length"])
            while left:
                left -= len(self.rfile.read(min(left, 300_000)))
                time.sleep(0.2)
            self.answer(ANSWER)

    with listening(Slow) as url, door_before(url) as door:
        assert call(door, "ModelInfer", infer_request(bytes(6_000_000))).outputs


def test_an_answer_that_stops_is_late(digit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that does not begin."""
    monkeypatch.setattr(upstream, "LONGEST_WAIT_S", 0.5)
    released = threading.Event()

    class Half(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            released.wait(PATIENCE_S)

    with listening(Half) as url, door_before(url) as door:
        try:
            found = refused(door, "ModelInfer", infer_request(digit), timeout_s=None)
            assert found == (StatusCode.DEADLINE_EXCEEDED, "no answer within 0.5 s")
        finally:
            released.set()


def test_no_caller_gets_the_cookies_of_another(digit: bytes) -> None:
    """None that a server sets is sent again."""
    seen = []

    class Setting(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers["Cookie"])
            self.send_response(200)
            self.send_header("Set-Cookie", "who=me")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    with listening(Setting) as url, door_before(url) as door:
        for _ in range(2):
            refused(door, "ModelInfer", infer_request(digit))
    assert seen == [None, None]


def test_only_web_addresses_are_asked() -> None:
    """Another scheme is refused at the start, not at each call. So are credentials, which are not repeated."""
    with pytest.raises(NoAddress, match="is no address of a server"):
        Upstream(TorchServe("ftp://127.0.0.1:21"), 1)
    for url in ("http://me:secret@127.0.0.1:8080", "ftp://me:secret@127.0.0.1"):
        with pytest.raises(DoorUnusable, match="--url has a user or password") as refusal:
            Upstream(TorchServe(url), 1)
        assert "secret" not in str(refusal.value)


def test_what_is_no_message() -> None:
    """A malformed one, and one that protobuf would refuse elsewhere, are the caller's mistakes."""
    with door_before("http://127.0.0.1:1") as door:
        for method in ("ModelInfer", "ServerLive"):
            code, message = refused(door, method, b"\xff")
            assert (code, message) == (StatusCode.INVALID_ARGUMENT, f"the message is no {method}Request")


def test_one_message_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait until it is read, and what refuses it lets it go."""
    with pytest.raises(InvalidMessage, match="one tensor, found 2") as refusal:
        messages.read("ModelInfer", b"\x2a\0" * 2)  # two empty inputs
    assert refusal.value.__context__ is None
    held = [value for frame, _ in traceback.walk_tb(refusal.tb) for value in frame.f_locals.values()]
    assert not [value for value in held if isinstance(value, CLASSES["ModelInferRequest"])]

    inside: list[object] = []

    def inference(request: Any) -> int:
        inside.append(request)
        time.sleep(0.05)
        found = len(inside)
        inside.remove(request)
        return found

    monkeypatch.setattr(messages, "_inference", inference)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(messages.read, ["ModelInfer"] * 4, [b""] * 4)) == {1}


def test_a_compressed_message_is_refused(digit: bytes) -> None:
    """Before it is unpacked, however small it would be."""
    with door_before("http://127.0.0.1:1") as door:
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            code, message = refused(door, "ModelInfer", infer_request(digit), compression=compression)
            assert code is StatusCode.UNIMPLEMENTED
            assert "is disabled" in message


def test_a_message_that_declares_4_gb_is_refused_at_once() -> None:
    """By its five bytes, before any other comes."""
    with door_before("http://127.0.0.1:1") as door, connected(door) as connection:
        begin(connection, "ModelInfer")
        send(connection, b"", 2**32 - 1)
        assert status_of(connection) is StatusCode.RESOURCE_EXHAUSTED


def test_metadata_that_http_cannot_have() -> None:
    """Is the caller's mistake: gRPC lets it pass."""
    with door_before("http://127.0.0.1:1") as door, connected(door) as connection:
        begin(connection, "ServerLive", (b"x-request-id", "日".encode()))
        send(connection, b"")
        assert status_of(connection) is StatusCode.INVALID_ARGUMENT


def test_a_word_in_a_refusal_is_not_its_kind(door: str, token: str, digit: bytes) -> None:
    """A caller who writes what TorchServe says of a wrong token does not get to hear that theirs is."""
    metadata = [("x-top-k", "InvalidKeyException")]
    code, message = refused(door, "ModelInfer", infer_request(digit), token=token, metadata=metadata)
    assert code is StatusCode.INVALID_ARGUMENT
    assert "InvalidKeyException" in message


def test_a_client_that_is_gone_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers no ping loses its call, and its connection also without one."""
    for name, divisor in (("grpc.keepalive_time_ms", 50), ("grpc.http2.ping_timeout_ms", 5)):
        monkeypatch.setitem(door_module.OPTIONS, name, door_module.OPTIONS[name] // divisor)
    with (
        listening(answering({"live": True})) as url, door_before(url, most_calls=1) as door,
        connected(door) as idle, ExitStack() as stack,
    ):  # fmt: skip

        def begun() -> bool:
            begin(stack.enter_context(connected(door)), "ModelInfer")  # is refused while the question has the place
            return is_full(door)

        wait_for(begun, "a call has the only place")
        wait_for(lambda: not is_full(door), "the place is free", 30)
        while idle.recv(1000):  # the end, and before it the door's pings
            pass
        assert ended(idle)


def test_a_message_is_at_most_what_grpc_can_count() -> None:
    """More would be refused by gRPC, at the start and without a word of the option."""
    said = invoke(app, "grpc", "--max-bytes", 2**31)
    assert said.exit_code == 2
    assert "2147483647" in said.output


@pytest.mark.process
def test_a_stop_lets_calls_end(held: str, digit: bytes) -> None:
    """After SIGTERM the running call is answered and a new one is not."""
    with door_process(held) as (door, process), ThreadPoolExecutor(1) as pool:
        begun = pool.submit(call, door, "ModelInfer", infer_request(digit))
        assert Held.asked.wait(PATIENCE_S)
        process.terminate()
        wait_for(lambda: refuses_connections(door), "the door is closed")
        Held.released.set()
        assert answers_of(begun.result(PATIENCE_S)) == [{"ä": 0.5}, {"1": 0.25}]
        assert process.wait(PATIENCE_S) == 0


def is_full(door: str) -> bool:
    """Whether other calls have every place."""
    try:
        assert call(door, "ServerLive").live
        return False
    except grpc.RpcError as error:
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED
        return True


def refuses_connections(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except ConnectionError:  # reset where the door closes at this moment
        return True
    return False


@pytest.mark.process
def test_a_second_signal_stops_at_once(held: str, digit: bytes) -> None:
    """The running call, for which the first one waits, is not answered."""
    with door_process(held, status=1) as (door, process), ThreadPoolExecutor(1) as pool:
        begun = pool.submit(refused, door, "ModelInfer", infer_request(digit))
        assert Held.asked.wait(PATIENCE_S)
        process.terminate()
        wait_for(lambda: refuses_connections(door), "the door is closed")
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 1
        assert begun.result(PATIENCE_S)[0] is StatusCode.UNAVAILABLE


@pytest.mark.process
def test_tls(torchserve: RunningServer, token: str, client: TorchServe, digit: bytes, tmp_path: Path) -> None:
    """With a certificate of one's own: a client that trusts it is answered, another and plain text are not."""
    subprocess.run(["bash", "-ec", certificate_command()], cwd=tmp_path, check=True, capture_output=True)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "certificate.key"
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["bash", "-ec", certificate_command()], cwd=other, check=True, capture_output=True)
    with door_process(torchserve.inference_url, "--tls-cert", certificate, "--tls-key", key) as (door, _):
        request = infer_request(digit)
        [answer] = answers_of(call(door, "ModelInfer", request, token, certificate.read_bytes()))
        assert answer == about(client.predict(MODEL, digit))
        for untrusted in (None, (other / "certificate.pem").read_bytes()):
            assert refused(door, "ServerLive", certificate=untrusted)[0] is StatusCode.UNAVAILABLE
    for files, complaint in (
        ((certificate, None), "TLS needs both --tls-cert and --tls-key"),
        ((None, key), "TLS needs both --tls-cert and --tls-key"),
        ((certificate, other / "certificate.key"), "are no certificate and its key in PEM"),
        ((certificate, tmp_path / "none"), "No such file or directory"),
    ):
        with pytest.raises(DoorUnusable, match=complaint):
            credentials(*files)


@pytest.mark.process
@pytest.mark.parametrize(
    ("host", "note"),
    [
        ("127.0.0.1", ""),
        ("0.0.0.0", "tokens and images travel unencrypted: --tls-cert and --tls-key turn TLS on\n"),
    ],
)
def test_a_port_that_is_taken_is_said(host: str, note: str) -> None:
    """In one line, also where another door has it; and where others could listen in, a line says so."""
    with door_before("http://127.0.0.1:1") as door:
        port = door.split(":")[1]
        said = run_module("operate", "grpc", "--host", host, "--port", port)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == f"{note}error: cannot listen on {host}:{port}: try another --port or --host\n"


def test_without_the_door_standard_clients_are_not_served(
    torchserve: RunningServer, door: str, token: str, digit: bytes
) -> None:
    """The negative control: the same call to TorchServe's own gRPC port and through the door."""
    port = int(torchserve.inference_url.rpartition(":")[2]) + 3  # the fourth of the server's five
    request = infer_request(digit, raw=True)
    assert refused(f"127.0.0.1:{port}", "ModelInfer", request, token=token)[0] is StatusCode.UNIMPLEMENTED
    assert call(door, "ModelInfer", request, token).outputs


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx")
def test_before_an_edge(torchserve: RunningServer, client: TorchServe, digit: bytes, tmp_path: Path) -> None:
    """By the edge's keys; readiness and a version's share too, and no metadata of models, which it does not pass."""
    port = free_ports()
    folder = make_folder(tmp_path / "edge", port, behind({"a": torchserve}))
    with running(folder, port) as edge, door_before(edge.url) as door:
        [answer] = answers_of(call(door, "ModelInfer", infer_request(digit, raw=True), KEY))
        assert answer == about(client.predict(MODEL, digit))
        assert call(door, "ServerReady", token=KEY).ready
        assert call(door, "ModelReady", CLASSES["ModelReadyRequest"](name=MODEL), KEY).ready
        assert refused(door, "ModelInfer", infer_request(digit), token="wrong")[0] is StatusCode.UNAUTHENTICATED
        code, message = refused(door, "ModelMetadata", CLASSES["ModelMetadataRequest"](name=MODEL), token=KEY)
        assert (code, message[:7]) == (StatusCode.UNIMPLEMENTED, "an edge")
        with Nginx(folder).change():
            (folder / "canary.conf").write_text(
                f'map "" $canary_model {{ default "{MODEL}"; }}\n'
                'map "" $canary_version { default "9.9"; }\n'
                'map "" $copied_model { default ""; }\n'
            )
        assert refused(door, "ModelInfer", infer_request(digit), token=KEY)[0] is StatusCode.NOT_FOUND
        assert call(door, "ModelInfer", infer_request(digit, model_version="1.0"), KEY).outputs


def test_tritonclient(torchserve: RunningServer, door: str, token: str, client: TorchServe, digit: bytes) -> None:
    """The real one: it asks for everything that the door answers, and TorchServe itself answers it nothing."""
    triton = pytest.importorskip("tritonclient.grpc", reason=NO_TRITON)
    utils = pytest.importorskip("tritonclient.utils", reason=NO_TRITON)
    headers = {"authorization": f"Bearer {token}"}
    images = triton.InferInput("image", [2], "BYTES")
    images.set_data_from_numpy(np.array([digit, digit], dtype=object))
    with closing(triton.InferenceServerClient(door)) as asked:
        assert asked.is_server_live(headers)
        assert asked.is_server_ready(headers)
        assert asked.is_model_ready(MODEL, headers=headers)
        assert asked.get_server_metadata(headers).name == "Torchserve"
        assert asked.get_model_metadata(MODEL, headers=headers).inputs[0].datatype == "BYTES"
        answer = asked.infer(MODEL, [images], headers=headers, request_id="7", client_timeout=30)
        labels, probabilities = (answer.as_numpy(name) for name in ("label", "probability"))
        assert (labels.shape, probabilities.shape, probabilities.dtype) == ((2, 5), (2, 5), np.float32)
        for names, values in zip(labels, probabilities, strict=True):
            assert dict(zip((name.decode() for name in names), values, strict=True)) == about(
                client.predict(MODEL, digit)
            )
        with pytest.raises(utils.InferenceServerException, match="not an image") as refusal:
            images.set_data_from_numpy(np.array([digit, b"no image"], dtype=object))
            asked.infer(MODEL, [images], headers=headers)
        assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(utils.InferenceServerException, match='parameter "classification"'):
            asked.infer(MODEL, [images], headers=headers, outputs=[triton.InferRequestedOutput("label", 3)])
    port = int(torchserve.inference_url.rpartition(":")[2]) + 3
    with closing(triton.InferenceServerClient(f"127.0.0.1:{port}")) as asked:
        with pytest.raises(utils.InferenceServerException) as refusal:
            asked.infer(MODEL, [images], headers=headers)
        assert refusal.value.status() == "StatusCode.UNIMPLEMENTED"


def test_field_numbers_are_tritons() -> None:
    """Every field of every message here has number, type and repetition of the field in Triton's own schema."""
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason=NO_TRITON)
    theirs = {}
    for message in service_pb2.DESCRIPTOR.message_types_by_name.values():
        theirs |= {each.name: each for each in (message, *message.nested_types)}
    for name, ours in CLASSES.items():
        for field in ours.DESCRIPTOR.fields:
            known = theirs[name].fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (known.number, known.type, known.is_repeated), name


def test_the_docs_example(
    door: str,
    token: str,
    digit: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/requests.md: labels and probabilities of one image."""
    pytest.importorskip("tritonclient.grpc", reason=NO_TRITON)
    [example] = blocks("docs/requests.md", "import os", "python")
    (tmp_path / "digit.png").write_bytes(digit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN", token)
    assert "127.0.0.1:8001" in example
    exec(compile(example.replace("127.0.0.1:8001", door), "docs/requests.md", "exec"), {})
    assert re.match(r"\[\[b'\d' ", capsys.readouterr().out)
