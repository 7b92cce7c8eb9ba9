"""Asking again where that is safe: the server has not seen the request, or says that it did not answer it.

| what happened | asked again |
|---|---|
| the connection was refused by a server that answered before | until the time is up |
| 503, the queue is full; 429, an edge's limit is reached | until the time is up |
| 507 or 500 "Worker died.": the worker was killed | twice: the image itself may be what kills it |
| anything else | never |

TorchServe ends a worker that takes longer than its `responseTimeout` with the same 500; that is asked again only where
the timeout is shorter than the time for which anything is.

Pauses double from a tenth of a second to two seconds, and are shortened at random by up to a half, so that many
clients do not come back together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from client.errors import ClientError, NothingListens, ServerBusy, WorkerDied

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_MOST_DEATHS = 2

T = TypeVar("T")


def call(attempt: Callable[[], T], time_s: float, examine: Callable[[ClientError, int], None]) -> T:
    """The result of `attempt`, which is made again until it succeeds, fails otherwise, or `time_s` are over.

    Args:
        examine: called with each such error and its number, from 1; what it raises ends the matter.

    Raises:
        ClientError: the last one.
    """
    deadline = time.monotonic() + time_s
    pause_s, attempts, deaths = _FIRST_PAUSE_S, 0, 0
    while True:
        try:
            return attempt()
        except (NothingListens, ServerBusy, WorkerDied) as error:
            attempts += 1
            deaths += isinstance(error, WorkerDied)
            examine(error, attempts)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or deaths > _MOST_DEATHS:
                raise
            time.sleep(min(left_s, pause_s * random.uniform(0.5, 1)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
