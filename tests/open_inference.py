"""Calls of `inference.GRPCInferenceService`, as any client of the Open Inference Protocol makes them over gRPC."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from client.torchserve import TorchServe
from operate.grpc_door.command import MAX_BYTES
from operate.grpc_door.door import Door, serving
from operate.grpc_door.messages import CLASSES, SERVICE
from operate.grpc_door.upstream import Upstream
from tests.conftest import MODEL


@contextmanager
def door_before(url: str, most_calls: int = 8) -> Iterator[str]:
    """The address of a door in this process, before the HTTP server at `url`."""
    door = Door(Upstream(TorchServe(url), most_calls))
    with serving(door, "127.0.0.1", 0, None, most_calls, MAX_BYTES) as address:
        yield address


def call(
    address: str,
    method: str,
    request: Any = None,
    token: str | None = None,
    certificate: bytes | None = None,
    metadata: Sequence[tuple[str, str]] = (),
    timeout_s: float | None = 30,
    compression: grpc.Compression | None = None,
) -> Any:
    """The response; raises grpc.RpcError. Bytes are sent as they are."""
    request = CLASSES[f"{method}Request"]() if request is None else request
    if token is not None:
        metadata = [*metadata, ("authorization", f"Bearer {token}")]
    if certificate is None:
        channel = grpc.insecure_channel(address)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate))
    with channel:
        ask = channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=CLASSES[f"{method}Response"].FromString,
        )
        return ask(request, metadata=metadata, timeout=timeout_s, compression=compression)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2 (RFC 9113)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def connected(address: str) -> socket.socket:
    """HTTP/2 that says hello, and nothing that it is not made to say."""
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
    return connection


def begin(connection: socket.socket, method: str, *more: tuple[bytes, bytes]) -> None:
    """Send the headers of a call, and no message."""
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", f"/{SERVICE}/{method}".encode()),
        (b":authority", b"door"), (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more,
    ]  # fmt: skip
    block = b"".join(b"\0" + b"".join(bytes([len(part)]) + part for part in field) for field in fields)
    connection.sendall(frame(1, 4, 1, block))


def send(connection: socket.socket, message: bytes, size: int | None = None) -> None:
    """The message of the call that was begun, declared with its size or another one."""
    size = len(message) if size is None else size
    connection.sendall(frame(0, int(size == len(message)), 1, struct.pack(">BI", 0, size) + message))


def status_of(connection: socket.socket) -> grpc.StatusCode:
    """With which the call ends that was begun."""
    said = b""
    while not (found := re.search(rb"grpc-status(?:\x01(\d)|\x02(\d\d))", said)):
        said += (more := connection.recv(65_536))
        assert more, said
    number = int(found[1] or found[2])
    return next(code for code in grpc.StatusCode if code.value[0] == number)


def tensor(datatype: str = "BYTES", shape: Sequence[int] = (1,), **contents: Any) -> Any:
    contents_or_none = CLASSES["InferTensorContents"](**contents) if contents else None
    return CLASSES["InferInputTensor"](name="image", datatype=datatype, shape=shape, contents=contents_or_none)


def infer_request(*images: bytes, raw: bool = False, **fields: Any) -> Any:
    """For encoded images, in `contents` or as Triton's clients send them."""
    fields = {"model_name": MODEL, "id": "7", **fields}
    if raw:
        encoded = b"".join(struct.pack("<I", len(image)) + image for image in images)
        return CLASSES["ModelInferRequest"](
            inputs=[tensor(shape=[len(images)])], raw_input_contents=[encoded], **fields
        )
    return CLASSES["ModelInferRequest"](inputs=[tensor(shape=[len(images)], bytes_contents=images)], **fields)


def answers_of(response: Any) -> list[dict[str, float]]:
    """What the outputs `label` and `probability` say of each image."""
    label, probability = response.outputs[:2]
    assert (label.name, label.datatype) == ("label", "BYTES")
    assert (probability.name, probability.datatype) == ("probability", "FP32")
    images, classes = label.shape
    if response.raw_output_contents:
        labels = list(_elements(response.raw_output_contents[0]))
        values = struct.unpack(f"<{images * classes}f", response.raw_output_contents[1])
    else:
        labels, values = label.contents.bytes_contents, tuple(probability.contents.fp32_contents)
    pairs = list(zip((each.decode() for each in labels), values, strict=True))
    return [dict(pairs[row * classes : (row + 1) * classes]) for row in range(images)]


def _elements(raw: bytes) -> Iterator[bytes]:
    while raw:
        [length] = struct.unpack_from("<I", raw)
        yield raw[4 : 4 + length]
        raw = raw[4 + length :]
