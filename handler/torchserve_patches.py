"""Everything that changes TorchServe's own code or reaches into it: two patches, a setting and two functions.

| what | without it |
|---|---|
| `_keep_every_image`, a patch | of files that share a name only the last arrives; a form's text counts as an image |
| `_read_in_large_pieces`, a patch | reading takes a sixth of a request's time, where the network is small |
| `_leave_json_alone`, a setting | all JSON of a batch is in memory at once, and a body that is none is 2 KB of log |
| `end_streams`, a call | an answer to gRPC's StreamPredictions ends the worker |
| `send_finished`, a call | a batch is answered as a whole, so its other requests wait for an explanation |

`install` applies the patches, when `handler.image_classifier` is imported. Each replaces one function that TorchServe
0.12 offers no other way to change.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Sequence
from functools import lru_cache
from io import BufferedReader
from typing import Any

from ts.protocol import otf_message_handler
from ts.service import Service

from handler import fields


def install() -> None:
    """Patch this process's TorchServe; a second call changes nothing. Call it while no request is on its way."""
    if Service.retrieve_data_for_inference.__module__ != __name__:
        _keep_every_image()
    if otf_message_handler._retrieve_buffer.__module__ != __name__:
        _read_in_large_pieces()
    _leave_json_alone()


def _keep_every_image() -> None:
    """Pass on every image of a request, and nothing else in the place of one.

    TorchServe puts the fields of a request into a dict. Of equal names, as `curl -F image=@a -F image=@b` sends them,
    only the last would stay. Text of a form and the parameters of a URL arrive as files do, but without a content
    type, which the frontend gives every file.
    """
    retrieve_data = Service.retrieve_data_for_inference

    def retrieve_every_image(batch: list[dict[str, Any]]) -> Any:
        for request in batch:
            request["parameters"] = fields.chosen(request["parameters"])
        return retrieve_data(batch)

    Service.retrieve_data_for_inference = staticmethod(retrieve_every_image)


def _read_in_large_pieces() -> None:
    """Read requests through a buffer.

    A request reaches the worker as twenty or thirty short fields, most of them headers, and TorchServe asks the system
    for each length and each field alone.
    """
    read_alone = otf_message_handler._retrieve_buffer

    def retrieve_buffer(connection: socket.socket, length: int) -> bytes | bytearray:
        if length <= 0:
            return b""
        data = _reader(connection).read(length)
        # At the end of the connection TorchServe's own way ends the worker.
        return data if len(data) == length else read_alone(connection, length)

    otf_message_handler._retrieve_buffer = retrieve_buffer


@lru_cache(maxsize=1)
def _reader(connection: socket.socket) -> BufferedReader:
    return connection.makefile("rb")


def _leave_json_alone() -> None:
    """Hand bodies over as they came: `handler.request` parses them one after another, and keeps none."""
    os.environ["TS_DECODE_INPUT_REQUEST"] = "false"


def end_streams(indices: Sequence[int], context: Any) -> None:
    """Say of these requests of a batch, which came by gRPC, that no further answer follows.

    TorchServe's frontend needs the word for StreamPredictions, and cannot tell the worker which call it was. Over HTTP
    the same header would leave the client waiting.
    """
    for index in indices:
        context.set_response_header(index, "ts_stream_next", "false")


def send_finished(bodies: Sequence[bytes], unfinished: Collection[int], context: Any) -> None:
    """Answer the requests of a batch that are finished, while the handler works on the `unfinished` ones.

    TorchServe ends a batch with the message in which no answer says that more will follow. The unfinished requests
    are therefore begun as streams, empty but with status and headers, and end with the batch. The finished ones are
    taken out of the batch.

    The handler must then return normally, whatever happens: an error would answer the finished requests twice.

    Args:
        bodies: of all requests of the batch.
        unfinished: indices of those whose body is still to come.
    """
    pending = [b"" if index in unfinished else body for index, body in enumerate(bodies)]
    # False stands for "more will follow", None for "this is no stream".
    context.stopping_criteria = [
        lambda _, more=index in unfinished: False if more else None for index in range(len(bodies))
    ]
    message = otf_message_handler.create_predict_response(
        pending, context.request_ids, "Prediction success", 200, context
    )
    context.cl_socket.sendall(message)
    context.stopping_criteria = None
    for index in range(len(bodies)):
        if index not in unfinished:
            del context.request_ids[index]
