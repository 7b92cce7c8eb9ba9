"""The Open Inference Protocol's gRPC service, each call of which is passed on to an HTTP server.

    python -m operate grpc

| call | HTTP |
|---|---|
| `ServerLive`, `ServerReady`, `ServerMetadata` | `GET /v2/health/live`, `GET /v2/health/ready`, `GET /v2` |
| `ModelInfer` | `POST /predictions/NAME`, of which an edge gives a new version its share |
| `ModelReady`, `ModelMetadata` | the same with the header `describe`, which a worker answers itself |

A version stands behind the name. Limits, refusals and metrics are those of the HTTP server. The door has no token: the
caller's `authorization` is passed on as it is. If the door added one, everyone who reaches its port would get
predictions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import requests
from grpc import StatusCode

from operate.errors import DoorUnusable
from operate.grpc_door import messages
from operate.grpc_door.messages import CLASSES, Inference, InvalidMessage
from operate.grpc_door.upstream import LONGEST_WAIT_S, Refused, Upstream, document, reading, refusal

OPTIONS = {
    "grpc.so_reuseport": 0,  # with it a second door could listen on the same port and get some of the connections
    "grpc.compression_enabled_algorithms_bitset": 1,  # none: of 6 KB it would make 6 MB
    # Ends what a client that is gone leaves behind: calls that hold one of the places, and connections.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.http2.ping_timeout_ms": 10_000,  # keepalive_timeout_ms alone would leave it a minute
    "grpc.keepalive_permit_without_calls": 1,
}
"""Of the server."""
_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)
"""Of a model or version. Another one could lead to another path of the server."""


class Door:
    """The service. Its methods take a request and the context of its call, and return the response.

    Raises:
        Refused, InvalidMessage: there is none.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as `grpc.server` takes it."""
        methods = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                _refusing(name, method),  # reads the message itself: gRPC would call a bad one an error of the server
                response_serializer=CLASSES[f"{name}Response"].SerializeToString,
            )
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler(messages.SERVICE, handlers)

    def server_live(self, request: Any, context: grpc.ServicerContext) -> Any:
        said = _unless_away(lambda: self._upstream.document(context, "GET", "/v2/health/live"))
        with reading():
            return CLASSES["ServerLiveResponse"](live=said is not None and said["live"])

    def server_ready(self, request: Any, context: grpc.ServicerContext) -> Any:
        said = _unless_away(lambda: self._upstream.document(context, "GET", "/v2/health/ready"))
        with reading():
            return CLASSES["ServerReadyResponse"](ready=said is not None and said["ready"])

    def server_metadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        said = self._upstream.document(context, "GET", "/v2")
        with reading():
            return CLASSES["ServerMetadataResponse"](name=said["name"], version=said["version"].strip())

    def model_ready(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Whether a worker answers."""
        answered = _unless_away(lambda: self._of_a_worker(request, context))
        return CLASSES["ModelReadyResponse"](ready=answered is not None)

    def model_metadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The input as encoded images; the protocol cannot say that it also takes UINT8 pixels."""
        answer = self._of_a_worker(request, context)
        if answer.status_code != 200:
            raise Refused(StatusCode.UNIMPLEMENTED, "an edge lets no model describe itself: ask one of its servers")
        said = document(answer)
        with reading():
            accept = said["handler"]["accept"]
            outputs = [("label", "BYTES", [-1, -1]), ("probability", "FP32", [-1, -1])]
            if accept["error_rate"] is not None or accept["known"] is not None:
                outputs.append(("accepted", "BOOL", [-1]))
            response = CLASSES["ModelMetadataResponse"](name=request.name, versions=[answer.headers["x-model-version"]])
            response.inputs.add(name="image", datatype="BYTES", shape=[-1])
            for name, datatype, shape in outputs:
                response.outputs.add(name=name, datatype=datatype, shape=shape)
            return response

    def model_infer(self, request: Inference, context: grpc.ServicerContext) -> Any:
        path = _predictions(request.model_name, request.model_version)
        json_bytes = str(request.json_bytes)
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": json_bytes}
        said = self._upstream.document(context, "POST", path, request.body, headers)
        with reading():
            return messages.infer_response(said, request.outputs, request.raw)

    def _of_a_worker(self, request: Any, context: grpc.ServicerContext) -> requests.Response:
        """What a worker answers when it is asked to describe its model. An edge drops the header that asks for it: then
        the worker answers that the request holds no image, and names its model all the same."""
        path = _predictions(request.name, request.version)
        answer = self._upstream.ask(context, "POST", path, b"", {"describe": "True"})
        if "x-model-name" not in answer.headers:
            if answer.status_code == 200:
                raise Refused(StatusCode.UNIMPLEMENTED, "the model has another handler, which gRPC cannot ask here")
            raise refusal(answer)
        return answer


@contextmanager
def serving(
    door: Door, host: str, port: int, tls: grpc.ServerCredentials | None, most_calls: int, max_bytes: int
) -> Iterator[str]:
    """Have `door` answer while the block runs, then let the calls that run end.

    Args:
        port: 0 takes a free one.
        tls: certificate and key; None for plain text.
        most_calls: at a time; further ones get RESOURCE_EXHAUSTED at once.
        max_bytes: of one message.

    Yields:
        HOST:PORT.

    Raises:
        DoorUnusable: it cannot listen there.
    """
    host = f"[{host}]" if ":" in host else host
    options = [("grpc.max_receive_message_length", max_bytes), *OPTIONS.items()]
    with ThreadPoolExecutor(most_calls, thread_name_prefix="call") as pool:
        server = grpc.server(pool, [door.handler()], options=options, maximum_concurrent_rpcs=most_calls)
        address = f"{host}:{port}"
        try:
            taken = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
        except RuntimeError:
            raise DoorUnusable(f"cannot listen on {address}: try another --port or --host") from None
        server.start()
        try:
            yield f"{host}:{taken}"
        finally:
            server.stop(LONGEST_WAIT_S).wait()


def _refusing(
    name: str, method: Callable[[Any, grpc.ServicerContext], Any]
) -> Callable[[bytes, grpc.ServicerContext], Any]:
    """The method, given the message as it came; its refusals as gRPC has them."""

    def answer(message: bytes, context: grpc.ServicerContext) -> Any:
        try:
            return method(messages.read(name, message), context)
        except Refused as refused:
            return context.abort(refused.code, str(refused))
        except InvalidMessage as invalid:
            return context.abort(StatusCode.INVALID_ARGUMENT, str(invalid))

    return answer


def _unless_away(ask: Callable[[], Any]) -> Any:
    """The answer; None where nobody can give it at present."""
    try:
        return ask()
    except Refused as refused:
        if refused.code is StatusCode.UNAVAILABLE:
            return None
        raise


def _predictions(name: str, version: str) -> str:
    return f"/predictions/{_checked(name)}" + (f"/{_checked(version)}" if version else "")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise Refused(StatusCode.NOT_FOUND, f"no model or version has the name {name!r:.100}")
    return name
