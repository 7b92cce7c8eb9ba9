"""The messages of `inference.GRPCInferenceService`, and their tensors as HTTP carries them.

The classes are made at run time, so that no generated code has to fit the installed protobuf. Field numbers are those
of KServe's `grpc_predict_v2.proto` and Triton's `grpc_service.proto`, which agree. Fields that nothing here reads are
left out: protobuf keeps their bytes and gives them no name.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
MOST_ELEMENTS = 1000
"""Of one repeated field, except for pixels; by default a model takes 64 images (`serving.max_images`)."""
_UNSUPPORTED = ("classification", "shared_memory_region")
"""Parameters of a tensor that ask for another answer, or for data from elsewhere."""

_TENSOR = {
    "name": (1, "string"), "datatype": (2, "string"), "shape": (3, "*int64"), "parameters": (4, "*ParametersEntry"),
    "contents": (5, "InferTensorContents"),
}  # fmt: skip
_NAMED = {"name": (1, "string"), "version": (2, "string")}
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {**_NAMED, "extensions": (3, "*string")},
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ModelMetadataRequest": _NAMED,
    "TensorMetadata": {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "*int64")},
    "ModelMetadataResponse": {
        "name": (1, "string"), "versions": (2, "*string"), "platform": (3, "string"), "inputs": (4, "*TensorMetadata"),
        "outputs": (5, "*TensorMetadata"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "*bool"), "uint_contents": (4, "*uint32"), "fp32_contents": (6, "*float"),
        "bytes_contents": (8, "*bytes"),
    },
    "ParametersEntry": {"key": (1, "string")},  # of a map, which travels as a repeated message
    "InferInputTensor": _TENSOR,
    "InferOutputTensor": _TENSOR,
    "InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, "*ParametersEntry")},
    "ModelInferRequest": {
        "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"),
        "inputs": (5, "*InferInputTensor"), "outputs": (6, "*InferRequestedOutputTensor"),
        "raw_input_contents": (7, "*bytes"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"),
        "outputs": (5, "*InferOutputTensor"), "raw_output_contents": (6, "*bytes"),
    },
}  # fmt: skip


class InvalidMessage(Exception):
    """A request that cannot be passed on; the message is written for the client who sent it."""


def classes(package: str, messages: Mapping[str, Mapping[str, tuple[int, str]]]) -> dict[str, Any]:
    """Message → class, in a pool of its own: a client in the same process may have Triton's.

    Args:
        messages: message → field → number and type: a scalar's or one of these messages, with `*` before it if it
            repeats.
    """
    described = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for message, fields in messages.items():
        added = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = described.LABEL_REPEATED if kind.startswith("*") else described.LABEL_OPTIONAL
            field = added.field.add(name=name, number=number, label=label)
            if (kind := kind.lstrip("*")) in messages:
                field.type, field.type_name = described.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = getattr(described, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{message}"))
        for message in messages
    }


CLASSES = classes(PACKAGE, _MESSAGES)
_READING = threading.Lock()


@dataclass(frozen=True)
class Inference:
    """What a ModelInferRequest asks for."""

    model_name: str
    model_version: str
    body: bytes
    """Of the same request over HTTP: JSON, and the tensor behind it."""
    json_bytes: int
    outputs: Sequence[str]
    """Names of those to answer with; all if there are none."""
    raw: bool
    """Answer in `raw_output_contents`, not in `contents`."""


def read(method: str, data: bytes) -> Any:
    """The request of a method: an `Inference` for ModelInfer, or else the message.

    One is read at a time, and none is kept that is refused: a message of empty elements takes 35 times its bytes.

    Raises:
        InvalidMessage: it is none that can be passed on.
    """
    with _READING:
        try:
            request = CLASSES[f"{method}Request"].FromString(data)
        except DecodeError:
            raise InvalidMessage(f"the message is no {method}Request") from None
        try:
            return _inference(request) if method == "ModelInfer" else request
        except InvalidMessage as invalid:
            reason = str(invalid)  # the exception itself would keep the message
        del request
    raise InvalidMessage(reason)


def _inference(request: Any) -> Inference:
    """
    Args:
        request: ModelInferRequest with one input, in `contents` or in `raw_input_contents`: BYTES (encoded images), or
            UINT8 of shape [N,C,H,W] (pixels). In raw form each element of BYTES stands behind its length, four bytes
            with the lowest first.

    Raises:
        InvalidMessage: it has no such input.
    """
    if len(request.inputs) != 1:
        raise InvalidMessage(f'"inputs" must be one tensor, found {len(request.inputs)}')
    [tensor] = request.inputs
    outputs = _few("outputs", request.outputs)
    for each in (tensor, *outputs):
        for parameter in _few("parameters", each.parameters):
            if parameter.key in _UNSUPPORTED:
                raise InvalidMessage(f'the parameter "{parameter.key}" of a tensor is not supported: leave it out')
    data = _data(tensor, request.raw_input_contents)
    described = {
        "name": tensor.name, "datatype": tensor.datatype, "shape": list(_few("inputs[0].shape", tensor.shape)),
        "parameters": {"binary_data_size": len(data)},
    }  # fmt: skip
    head = json.dumps({**({"id": request.id} if request.id else {}), "inputs": [described]}).encode()
    return Inference(
        request.model_name, request.model_version, head + data, len(head),
        [output.name for output in outputs], bool(request.raw_input_contents),
    )  # fmt: skip


def infer_response(document: Mapping[str, Any], requested: Collection[str], raw: bool) -> Any:
    """ModelInferResponse with the tensors of an HTTP answer: `label` BYTES[N,K], `probability` FP32[N,K], and
    `accepted` BOOL[N] where the model marks its answers.

    Args:
        document: the JSON of the answer.
        requested: names of the outputs to answer with; all if there are none.
        raw: put them into `raw_output_contents`, not into `contents`.

    Raises:
        InvalidMessage: the answer has no output of a requested name.
    """
    outputs = {output["name"]: output for output in document["outputs"]}
    if unknown := sorted(set(requested) - outputs.keys()):
        raise InvalidMessage(f"the outputs are {', '.join(outputs)}, found {unknown[0]!r:.100}")
    response = CLASSES["ModelInferResponse"](
        id=document.get("id", ""), model_name=document["model_name"], model_version=document["model_version"]
    )
    for name, output in outputs.items():
        if requested and name not in requested:
            continue
        datatype, data = output["datatype"], output["data"]
        values = [text.encode() for text in data] if datatype == "BYTES" else data
        tensor = response.outputs.add(name=name, datatype=datatype, shape=output["shape"])
        if raw:
            response.raw_output_contents.append(_RAW[datatype](values))
        else:
            getattr(tensor.contents, _CONTENTS[datatype]).extend(values)
    return response


def _data(tensor: Any, raw: Sequence[bytes]) -> bytes:
    """The raw form of an input."""
    if tensor.datatype not in ("BYTES", "UINT8"):
        raise InvalidMessage(f'"inputs[0].datatype" must be "BYTES" or "UINT8", found {tensor.datatype!r:.100}')
    field = _CONTENTS[tensor.datatype]
    contents = getattr(tensor.contents, field)
    if len(raw) + bool(contents) != 1 or not (contents or raw[0]):
        raise InvalidMessage(f'the data of "inputs[0]" must be in "contents.{field}" or in "raw_input_contents"')
    if raw:
        return raw[0]
    if tensor.datatype == "BYTES":
        _few("contents.bytes_contents", contents)
    try:
        return _RAW[tensor.datatype](contents)
    except ValueError:
        raise InvalidMessage(f'"contents.{field}" must be whole numbers from 0 to 255') from None


def _few(name: str, values: Sequence[Any]) -> Sequence[Any]:
    """The values of a repeated field, before anything is made of them.

    Raises:
        InvalidMessage: they are more than any request has.
    """
    if len(values) > MOST_ELEMENTS:
        raise InvalidMessage(f'"{name}" has {len(values)} elements, more than {MOST_ELEMENTS}')
    return values


def _behind_lengths(elements: Iterable[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


_CONTENTS = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents", "BOOL": "bool_contents"}
"""Datatype → field of InferTensorContents."""
_RAW: dict[str, Callable[[Any], bytes]] = {
    "BYTES": _behind_lengths,
    "UINT8": bytes,
    "FP32": lambda values: struct.pack(f"<{len(values)}f", *values),
    "BOOL": bytes,
}
"""Datatype → its raw form, as Triton has it."""
