"""The same answers over gRPC, whose requests share batches with HTTP's: every call, with good, bad and mixed input."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from archive import java_libraries
from client.torchserve import TorchServe
from operate.grpc_door.messages import classes
from server import processes
from server.launch import RunningServer
from tests.conftest import MODEL
from tests.images import BAD

_INFERENCE = "org.pytorch.serve.grpc.inference"
_OPEN_INFERENCE = "org.pytorch.serve.grpc.openinference"
_STANDARD = "inference"
"""The package of the Open Inference Protocol, which clients of Triton and KServe ask."""

_TENSOR = {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "*int64"), "contents": (5, "Contents")}
# As the protos in TorchServe's jar say it, as far as it is used; `*` is repeated.
_MESSAGES: dict[str, dict[str, dict[str, tuple[int, str]]]] = {
    _INFERENCE: {
        "Entry": {"key": (1, "string"), "value": (2, "bytes")},
        "PredictionsRequest": {"model_name": (1, "string"), "input": (3, "*Entry"), "sequence_id": (4, "string")},
        "PredictionResponse": {"prediction": (1, "bytes")},
    },
    _OPEN_INFERENCE: {
        "Contents": {
            "bool_contents": (1, "*bool"), "uint_contents": (4, "*uint32"), "fp32_contents": (6, "*float"),
            "bytes_contents": (8, "*bytes"),
        },
        "Input": _TENSOR,
        "Output": _TENSOR,
        "ModelInferRequest": {
            "model_name": (1, "string"), "id": (3, "string"), "inputs": (5, "*Input"),
            "raw_input_contents": (7, "*bytes"),
        },
        "ModelInferResponse": {
            "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"),
            "outputs": (5, "*Output"),
        },
    },
}  # fmt: skip
CLASSES = {name: made for package in _MESSAGES for name, made in classes(package, _MESSAGES[package]).items()}


def call(
    torchserve: RunningServer, method: str, request: Any, response: Any, kind: str, token: str | None = None
) -> Any:
    """The one answer of a unary call, or the list of a stream's; `request` is an iterator where the client streams."""
    token = token or json.loads(torchserve.key_file.read_text())["inference"]["key"]
    metadata = (("protocol", "gRPC"), ("channel", "predictions"), ("authorization", f"Bearer {token}"))
    port = int(torchserve.inference_url.rpartition(":")[2]) + 3  # the fourth of the server's five
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        make: Callable[..., Any] = getattr(channel, kind)
        asked = make(
            method, request_serializer=lambda one: one.SerializeToString(), response_deserializer=response.FromString
        )
        answer = asked(request, metadata=metadata, timeout=30)
        return answer if kind == "unary_unary" else list(answer)


def predictions_request(body: bytes, **more: str) -> Any:
    return CLASSES["PredictionsRequest"](model_name=MODEL, input=[CLASSES["Entry"](key="data", value=body)], **more)


def predict(torchserve: RunningServer, body: bytes, token: str | None = None) -> dict[str, Any]:
    method = f"/{_INFERENCE}.InferenceAPIsService/Predictions"
    answer = call(
        torchserve, method, predictions_request(body), CLASSES["PredictionResponse"], "unary_unary", token=token
    )
    document: dict[str, Any] = json.loads(answer.prediction)
    return document


def stream(torchserve: RunningServer, body: bytes) -> list[dict[str, Any]]:
    method = f"/{_INFERENCE}.InferenceAPIsService/StreamPredictions"
    request = predictions_request(body)
    answers = call(torchserve, method, request, CLASSES["PredictionResponse"], "unary_stream")
    return [json.loads(answer.prediction) for answer in answers]


def infer(
    torchserve: RunningServer,
    package: str = _OPEN_INFERENCE,
    raw: bytes | None = None,
    model: str = MODEL,
    **tensor: Any,
) -> Any:
    """The answer of ModelInfer to one input, or to `raw_input_contents`."""
    contents = {name: tensor.pop(name) for name in list(tensor) if name.endswith("_contents")}
    image = CLASSES["Input"](name="image", contents=CLASSES["Contents"](**contents) if contents else None, **tensor)
    request = CLASSES["ModelInferRequest"](model_name=model, id="7", inputs=[image])
    if raw is not None:
        request.raw_input_contents.append(raw)
    method = f"/{package}.GRPCInferenceService/ModelInfer"
    return call(torchserve, method, request, CLASSES["ModelInferResponse"], "unary_unary")


def pids(client: TorchServe) -> list[int]:
    return [worker["pid"] for worker in client.describe(MODEL)["workers"]]


def test_grpc_answers_as_http_does(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """The same image, the same probabilities."""
    assert predict(torchserve, digit) == pytest.approx(client.predict(MODEL, digit), abs=1e-5)


@pytest.mark.parametrize("name", ["text", "truncated png", "too long"])
def test_a_refusal_over_grpc_says_why(torchserve: RunningServer, name: str) -> None:
    """TorchServe passes no status of a row on over gRPC: the error object is the answer, as in a list of several."""
    body, code = BAD[name]
    refused = predict(torchserve, body)
    assert refused["code"] == code
    assert refused.keys() == {"code", "type", "message"}


def test_a_stream_of_predictions_has_one_answer(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """Of a good image and of bad ones; no worker dies of it."""
    before = pids(client)
    assert stream(torchserve, digit) == [pytest.approx(client.predict(MODEL, digit), abs=1e-5)]
    for name in ("text", "truncated png", "empty"):
        [refused] = stream(torchserve, BAD[name][0])
        assert refused["code"] == BAD[name][1]
    assert pids(client) == before


def test_streams_of_requests_are_not_served(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """TorchServe wants a model of batches in sequence for StreamPredictions2: an error, and nobody else notices."""
    before = pids(client)
    method = f"/{_INFERENCE}.InferenceAPIsService/StreamPredictions2"
    with pytest.raises(grpc.RpcError) as refusal:
        requests = [predictions_request(body, sequence_id="a") for body in (digit, BAD["text"][0])]
        call(torchserve, method, iter(requests), CLASSES["PredictionResponse"], "stream_stream")
    # It fails at the first message, and where the second one comes after that its netty ends the connection.
    assert refusal.value.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
    assert len(client.predict(MODEL, digit)) == 5
    assert pids(client) == before


def test_model_infer_answers_as_http_does(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """Bytes and pixels. TorchServe's frontend puts labels into quotation marks, as JSON has them."""
    before, expected = pids(client), client.predict(MODEL, digit)
    for tensor in (
        {"datatype": "BYTES", "shape": [1], "bytes_contents": [digit]},
        {"datatype": "UINT8", "shape": [1, 1, 32, 32], "uint_contents": [0] * 1024},
    ):
        answer = infer(torchserve, **tensor)
        label, probability = answer.outputs
        labels = [json.loads(each) for each in label.contents.bytes_contents]
        assert (answer.id, answer.model_name, list(label.shape)) == ("7", MODEL, [1, 5])
        if tensor["datatype"] == "BYTES":
            assert dict(zip(labels, probability.contents.fp32_contents, strict=True)) == pytest.approx(
                expected, abs=1e-5
            )
    assert pids(client) == before


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"datatype": "BYTES", "shape": [1], "bytes_contents": [b"no image"]}, "not an image"),
        ({"datatype": "BYTES", "shape": [1]}, "raw_input_contents"),
        ({"datatype": "BYTES", "shape": [1], "raw": b"pixels"}, "raw_input_contents"),
        ({"datatype": "UINT8", "shape": [1, 1, 32, 32], "uint_contents": [256] * 1024}, "0 to 255"),
        ({"datatype": "UINT8", "shape": [1], "uint_contents": [1]}, "shape"),
        ({"datatype": "FP32", "shape": [1], "fp32_contents": [1.0]}, "datatype"),
        ({"datatype": "x" * 100_000, "shape": [1], "bytes_contents": [b""]}, "something in it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_of_model_infer_says_why(
    torchserve: RunningServer, client: TorchServe, tensor: dict[str, Any], message: str
) -> None:
    """In the tensor `error`, which is all that the frontend passes on; no worker dies of it."""
    before = pids(client)
    answer = infer(torchserve, **tensor)
    [error] = answer.outputs
    assert (answer.id, answer.model_name, error.name) == ("7", MODEL, "error")
    assert message in json.loads(error.contents.bytes_contents[0])
    assert pids(client) == before


def test_a_good_and_a_bad_image_of_one_call(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """Open Inference v2 refuses a request as a whole."""
    before = pids(client)
    answer = infer(torchserve, datatype="BYTES", shape=[2], bytes_contents=[digit, b"no image"])
    assert [output.name for output in answer.outputs] == ["error"]
    assert pids(client) == before


def test_clients_of_the_standard_package_are_not_served(torchserve: RunningServer, digit: bytes) -> None:
    """TorchServe's service has a package of its own."""
    with pytest.raises(grpc.RpcError) as refusal:
        infer(torchserve, package=_STANDARD, datatype="BYTES", shape=[1], bytes_contents=[digit])
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_grpc_needs_the_token_too(torchserve: RunningServer, digit: bytes) -> None:
    """A wrong token is refused."""
    with pytest.raises(grpc.RpcError) as refusal:
        predict(torchserve, digit, token="wrong")
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_proxy_could_not_make_tritonclient_work() -> None:
    """It puts every input where TorchServe's service does not look, under whatever name it finds the service."""
    tritonclient = pytest.importorskip("tritonclient.grpc", reason="no tritonclient with gRPC")
    tensor = tritonclient.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array([b"image"], dtype=object))
    assert tensor._get_content() is not None
    assert not tensor._get_tensor().HasField("contents")
    with zipfile.ZipFile(java_libraries.JAR) as jar:
        service = jar.read("org/pytorch/serve/grpcimpl/OpenInferenceProtocolImpl.class")
    assert b"getContents" in service
    assert b"RawInputContents" not in service


def test_grpc_listens_on_this_machine_alone(torchserve: RunningServer) -> None:
    """TorchServe has no key that would close its two gRPC ports; they are on loopback, as its others are."""
    java = processes.find(torchserve.key_file.parent)
    assert java is not None
    listening = [each.laddr for each in java.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    first = int(torchserve.inference_url.rpartition(":")[2])
    assert {address.port for address in listening} == set(range(first, first + 5))
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
