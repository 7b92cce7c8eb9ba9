"""The same answers over gRPC, whose requests share batches with HTTP's."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from client.torchserve import TorchServe
from server.launch import RunningServer
from tests.conftest import MODEL
from tests.images import BAD

_PACKAGE = "org.pytorch.serve.grpc.inference"


def _messages() -> tuple[Any, Any]:
    """Request and response of TorchServe's inference.proto, which its package does not ship compiled."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package=_PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
    request.field.add(
        name="input", number=3, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_REPEATED,
        type_name=f".{_PACKAGE}.PredictionsRequest.InputEntry",
    )  # fmt: skip
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("PredictionsRequest", "PredictionResponse")
    found = [message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names]
    return found[0], found[1]


def predict(torchserve: RunningServer, body: bytes, token: str | None = None) -> dict[str, Any]:
    request, response = _messages()
    token = token or json.loads(torchserve.key_file.read_text())["inference"]["key"]
    metadata = (("protocol", "gRPC"), ("channel", "predictions"), ("authorization", f"Bearer {token}"))
    port = int(torchserve.inference_url.rpartition(":")[2]) + 3  # the fourth of the server's five
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(
            f"/{_PACKAGE}.InferenceAPIsService/Predictions",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        answer = call(request(model_name=MODEL, input={"data": body}), metadata=metadata, timeout=30)
    document: dict[str, Any] = json.loads(answer.prediction)
    return document


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


def test_grpc_needs_the_token_too(torchserve: RunningServer, digit: bytes) -> None:
    """A wrong token is refused."""
    with pytest.raises(grpc.RpcError) as refusal:
        predict(torchserve, digit, token="wrong")
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
