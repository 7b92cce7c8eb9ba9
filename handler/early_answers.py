"""Answer some rows of a batch at once while the others are still worked on.

TorchServe ends a batch with the message in which no row says that more will follow. Rows that are not finished are
therefore begun as streams, with nothing in them yet, and end with the batch; finished rows are taken out of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ts.protocol.otf_message_handler import create_predict_response


def send(bodies: Sequence[bytes], unfinished: Collection[int], context: Any) -> None:
    """Send the bodies of all rows of the batch but the `unfinished` ones, whose status and headers go out as well.

    The handler must then return normally, whatever happens: an error would answer the finished rows a second time.
    """
    pending = [b"" if index in unfinished else body for index, body in enumerate(bodies)]
    # False stands for "more will follow", None for "this is no stream".
    context.stopping_criteria = [
        lambda _, more=index in unfinished: False if more else None for index in range(len(bodies))
    ]
    message = create_predict_response(pending, context.request_ids, "Prediction success", 200, context)
    context.cl_socket.sendall(message)
    context.stopping_criteria = None
    for index in range(len(bodies)):
        if index not in unfinished:
            del context.request_ids[index]
