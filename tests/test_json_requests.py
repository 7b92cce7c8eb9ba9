"""JSON as clients really send it: with another content type or none, and base64 as their libraries write it."""

from __future__ import annotations

import base64
import gc
import json
import socket
import struct
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from ts.context import RequestProcessor
from ts.protocol import otf_message_handler

from handler import torchserve_patches
from handler.decoding import decode
from handler.errors import RequestError
from handler.identity import Identity
from handler.image_classifier import ImageClassifier
from handler.request import Request
from handler.settings import HandlerSettings
from tests.images import b64, encode, gradient
from tests.worker import load, make_context

SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)
IMAGE = encode(gradient(300, 200))
V1 = {"instances": [{"b64": b64(IMAGE)}]}
V2 = {"inputs": [{"datatype": "BYTES", "shape": [1], "data": [b64(IMAGE)]}]}
IDENTITY = Identity("m", "1.0", "digest")


def read(body: Any, content_type: str | None = None, **fields: Any) -> Request:
    headers = {"host": "localhost"} if content_type is None else {"host": "localhost", "content-type": content_type}
    return Request.read({"body": body} | fields, headers, SETTINGS)


def is_answered(request: Request) -> bool:
    [pixels] = request.images
    return isinstance(pixels, torch.Tensor) and torch.equal(pixels, decode(IMAGE, SETTINGS))


@pytest.mark.parametrize("document", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("content_type", [None, "application/JSON", "text/plain", "application/octet-stream"])
def test_json_is_taken_whatever_its_content_type(document: dict[str, Any], content_type: str | None) -> None:
    """TorchServe parses it under one spelling of the header alone, and hands over bytes or text otherwise."""
    text = "\n " + json.dumps(document)
    body: Any = text if content_type == "text/plain" else bytearray(text.encode())
    request = read(body, content_type)
    assert is_answered(request)
    assert request.protocol == ("v1" if document is V1 else "v2")


@pytest.mark.parametrize(
    "body", [b"{", b'{"inputs": [', b'{"a": 1}', b"{" * 100_000, b'{"b64": "' + b"A" * 500 + b'"}']
)
def test_what_only_looks_like_json_is_refused_by_the_name_of_the_header(body: bytes) -> None:
    """A 400 that says what is missing, and not that it is no image."""
    request = read(bytearray(body))
    assert request.refusal is not None
    assert request.refusal.code == 400
    assert "Content-Type: application/json" in str(request.refusal)


def test_json_in_a_form_is_refused_by_the_name_of_the_header() -> None:
    """As `curl -d` sends it: the frontend makes a field's name of it."""
    name, _, value = json.dumps(V1).partition("=")
    request = Request.read({name: bytearray(value.encode())}, {"Host": "x"}, SETTINGS)
    assert "Content-Type: application/json" in str(request.refusal)


@pytest.mark.parametrize("body", [b"\xef\xbb\xbf" + json.dumps(V1).encode(), "\ufeff" + json.dumps(V1)])
def test_json_may_begin_with_a_byte_order_mark(body: bytes | str) -> None:
    """As Windows writes it, whether TorchServe hands over bytes or text."""
    assert is_answered(read(body))


def test_a_list_is_no_request() -> None:
    """Without the object around it: the refusal says how it should look, and not that it is no image."""
    request = read(bytearray(json.dumps(V1["instances"]).encode()))
    assert '"instances"' in str(request.refusal)


def test_a_file_of_a_form_that_is_called_body_is_a_file() -> None:
    """Beside another one; alone it is what TorchServe makes of a raw body."""
    request = read(bytearray(json.dumps(V1).encode()), other=bytearray(IMAGE))
    refused, pixels = request.images
    assert isinstance(refused, RequestError)
    assert isinstance(pixels, torch.Tensor)


def binary(datatype: str, tensor: bytes, /, **changes: Any) -> Request:
    """A request of Triton's clients: JSON, and the tensor behind it."""
    parameters = {"binary_data_size": len(tensor)}
    described = {"name": "image", "datatype": datatype, "shape": [1], "parameters": parameters, **changes}
    head = json.dumps({"id": "7", "inputs": [described]}).encode()
    headers = {"host": "x", "content-type": "application/octet-stream", "inference-header-content-length": len(head)}
    return Request.read({"body": bytearray(head + tensor)}, {k: str(v) for k, v in headers.items()}, SETTINGS)


def test_a_tensor_may_lie_behind_the_json() -> None:
    """Encoded images after their lengths, or the pixels themselves, as in JSON alone."""
    one = struct.pack("<I", len(IMAGE)) + IMAGE
    request = binary("BYTES", one)
    assert is_answered(request)
    assert (request.protocol, request.request_id) == ("v2", "7")
    assert len(binary("BYTES", one * 3).tensors) == 3
    pixels = decode(IMAGE, SETTINGS)
    [found] = binary("UINT8", pixels.numpy().tobytes(), shape=[1, 3, 32, 32]).images
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, pixels)


@pytest.mark.parametrize(
    ("tensor", "changes", "message"),
    [
        (b"\xff\xff\xff\xffAB", {}, "ends within an element"),
        (b"\x02\0\0", {}, "ends within an element"),
        (b"\0\0\0\0" * 65, {}, "more than the 64 allowed"),
        (b"AB", {"parameters": {"binary_data_size": 3}}, "binary_data_size is 3, and 2 bytes follow"),
        (b"AB", {"parameters": None}, "inference-header-content-length"),
        (b"AB", {"datatype": "UINT8", "shape": [1, 3, 32, 32]}, "must be 3072 whole numbers"),
        (b"AB", {"datatype": "UINT8", "shape": [-1, 3, 32, 32]}, "shape"),
    ],
)
def test_a_tensor_behind_the_json_must_be_as_it_says(tensor: bytes, changes: dict[str, Any], message: str) -> None:
    """One that ends too early, too many elements, another size, and none that is described."""
    request = binary("BYTES", tensor, **changes)
    assert request.refusal is not None
    assert request.refusal.code == 400
    assert message in str(request.refusal)


def test_json_that_torchserve_could_not_parse_is_refused() -> None:
    """It was parsed once."""
    request = read(bytearray(b'{"inputs": '), "application/json")
    assert str(request.refusal) == "the body is neither valid JSON nor an image"


URL_BYTES = encode(gradient(301, 200))


@pytest.mark.parametrize(
    "written",
    [
        base64.encodebytes(URL_BYTES).decode(),
        base64.encodebytes(URL_BYTES).decode().replace("\n", "\r\n"),
        b64(URL_BYTES) + "\n",
        base64.urlsafe_b64encode(URL_BYTES).decode(),
        base64.urlsafe_b64encode(URL_BYTES).decode().rstrip("="),
        "data:image/png;base64," + b64(URL_BYTES),
        "\n DATA:image/png; BASE64," + b64(URL_BYTES),
        f"data:image/png;name={'n' * 200}.png;base64," + quote(b64(URL_BYTES), safe=""),
        "\ufeff" + b64(URL_BYTES),
    ],
    ids=[
        "lines",
        "lines of Windows",
        "a final newline",
        "of URLs",
        "without padding",
        "data:",
        "DATA:",
        "quoted",
        "BOM",
    ],
)
def test_base64_is_taken_as_libraries_write_it(written: str) -> None:
    """Android's and Java's encoders, Python's encodebytes, a browser's FileReader: the same pixels."""
    [pixels] = read({"instances": [{"b64": written}]}, "application/json").images
    assert isinstance(pixels, torch.Tensor)
    assert torch.equal(pixels, decode(URL_BYTES, SETTINGS))


@pytest.mark.parametrize(
    "written", ["?", "AAA*", "A", "data:image/png,AAAA", "data:" + "x" * 400 + ";base64,AAAA", "b'AAAA'", 7, None]
)
def test_what_is_not_base64_is_refused(written: Any) -> None:
    """Each in its own place."""
    good, bad = read({"instances": [{"b64": b64(IMAGE)}, {"b64": written}]}, "application/json").images
    assert isinstance(good, torch.Tensor)
    assert isinstance(bad, RequestError)
    assert bad.code == 400
    assert "base64" in str(bad) or "b64" in str(bad)


def test_an_instance_may_name_its_image() -> None:
    """The one key whose value holds base64; two of them are refused, by the names of those that are read."""
    held = {"b64": b64(IMAGE)}
    for instance in (
        {"image_bytes": held}, {"image_bytes": held, "key": "1", "of": {"no": 1}}, {"b64": None, "data": b64(IMAGE)},
        {"data": held}, {"image": {"data": b64(IMAGE)}},
    ):  # fmt: skip
        assert is_answered(read({"instances": [instance]}, "application/json"))
    assert is_answered(read({"inputs": [{"datatype": "BYTES", "data": [held]}]}, "application/json"))
    for instance in ({"image": b64(IMAGE)}, {"a": held, "b": held}, {"b64": None}, {}):
        [refusal] = read({"instances": [instance]}, "application/json").images
        assert "b64, data, body are read" in str(refusal)


@pytest.mark.parametrize(
    "document",
    [
        {"id": "7", "inputs": []}, {"id": "7", "inputs": [{"datatype": "FP32", "data": [1]}]},
        {"id": "7" * 501, "inputs": [{"datatype": "BYTES", "data": [b64(IMAGE)]}]},
        {"id": "7", "inputs": [{"datatype": "BYTES", "data": [b64(b"no image")]}]},
    ],
)  # fmt: skip
def test_refusals_of_v2_have_what_the_frontend_reads(document: dict[str, Any]) -> None:
    """Without one of the four fields TorchServe's gRPC ends the worker; v1 needs none of them."""
    answer = read(document, "application/json").answer([], IDENTITY)
    refused = json.loads(answer.body)
    assert refused.keys() == {"code", "type", "message", "id", "model_name", "model_version", "outputs"}
    assert isinstance(refused["id"], str)
    assert refused["outputs"] == [{"name": "error", "datatype": "BYTES", "shape": [1], "data": [refused["message"]]}]
    v1 = json.loads(read({"instances": []}, "application/json").answer([], IDENTITY).body)
    assert v1.keys() == {"code", "type", "message"}


def test_a_failure_of_ours_keeps_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 500 of a v2 request has these fields as well, and so has a wrong top_k."""
    wrong = Request.read({"body": V2}, {"Host": "x", "x-top-k": "none"}, SETTINGS).answer([], IDENTITY)
    monkeypatch.setattr("handler.kserve.v2_images", lambda *_: 1 / 0)
    failed = read(V2, "application/json").answer([], IDENTITY)
    for answer, code in ((wrong, 400), (failed, 500)):
        assert json.loads(answer.body).keys() >= {"id", "model_name", "model_version", "outputs"}
        assert json.loads(answer.body)["code"] == code


def test_only_rows_that_came_by_grpc_end_a_stream(run: Path, digit: bytes) -> None:
    """They have no header of their own; over HTTP the word would leave a client waiting."""
    classifier: ImageClassifier = load(run)
    context = make_context(run, 3)
    field = {"data": {"content-type": ""}}
    context.request_processor = [RequestProcessor(each) for each in ({"Host": "x", **field}, field, {})]
    classifier.handle([{"body": digit}, {"data": digit}, {"data": b"no image"}], context)
    streams = [context.get_response_headers(index).get("ts_stream_next") for index in range(3)]
    assert streams == [None, "false", "false"]


def test_garbage_is_not_looked_for_while_json_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 MB of lists in lists would take over a second; before and after it is, also where parsing fails."""
    seen: list[bool] = []
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda *args: (seen.append(gc.isenabled()), parse(*args))[1])
    for value in (b"{}", b"{"):
        read(bytearray(value))
        assert gc.isenabled()
    assert seen == [False] * 2


def field(content_type: bytes, value: bytes) -> bytes:
    parts = (b"body", content_type, value)
    return b"".join(struct.pack("!i", len(part)) + part for part in parts)


@pytest.mark.parametrize(("content_type", "value"), [(b"application/json", b"{"), (b"text/plain", b"\xff")])
def test_a_body_that_is_not_what_it_claims_to_be_logs_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, content_type: bytes, value: bytes
) -> None:
    """TorchServe's own parser, which the handler turns off, logs 2 KB of traceback for it."""

    def logged() -> str:
        caplog.clear()
        frontend, worker = socket.socketpair()
        with frontend, worker:
            frontend.sendall(field(content_type, value))
            assert otf_message_handler._retrieve_input_data(worker)["value"] == value
        return caplog.text

    torchserve_patches.install()
    assert logged() == ""
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    assert "Traceback" in logged()


@pytest.mark.parametrize("text", ["null", "true", "7", "[1]", '"a"'])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    """Also where it is sent as JSON."""
    assert read(bytearray(text.encode()), "application/json").refusal is not None
