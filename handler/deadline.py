"""Which requests of a batch can be answered in time. The others are refused before an image of theirs is decoded.

| header | set by | what |
|---|---|---|
| `X-Request-Start` | the edge | since when the request waits (`handler.arrival`); without it nobody knows |
| `X-Envoy-Expected-Rq-Timeout-Ms` | the client; Envoy itself, and so Istio's gateways | how long the client waits |

A batch is answered as a whole. So a request is also refused where it would make those before it late.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from handler.arrival import Arrival
from handler.errors import InvalidRequest, RequestError, RequestTooLate

HEADER = "x-envoy-expected-rq-timeout-ms"
_MILLISECONDS = re.compile(r"[0-9]{1,9}")
_BATCHES = 10


class Deadlines:
    """Judges the requests of one worker.

    Args:
        max_wait_s: after so long nobody waits, whatever the client says.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._image_s: deque[float] = deque(maxlen=_BATCHES)

    def computed(self, images: int, seconds: float) -> None:
        """A batch with so many images took so long."""
        if images:
            self._image_s.append(seconds / images)
        elif self._image_s:  # all may have been refused by what others took: soon one is tried again
            self._image_s.popleft()

    def refusals(
        self, arrivals: Sequence[Arrival], headers: Sequence[Mapping[str, Any]], now: float
    ) -> list[RequestError | None]:
        """For each request of a batch why it is not computed, or None.

        Args:
            headers: with their names in lower case.
            now: Unix time in seconds.
        """
        image_s = statistics.median(self._image_s) if self._image_s else 0.0
        found: list[RequestError | None] = []
        images, least_s = 0, math.inf
        for arrival, asked in zip(arrivals, headers, strict=True):
            try:
                left_s = self._left_s(arrival, asked, now)
                if left_s < math.inf:
                    least_s = _check_room((images + 1) * image_s, left_s, least_s)
            except RequestError as refusal:
                found.append(refusal)
            else:
                found.append(None)
                images += 1
        return found

    def _left_s(self, arrival: Arrival, headers: Mapping[str, Any], now: float) -> float:
        """How much longer the client waits; infinity where it does not say, or nobody knows how long it has waited.

        Raises:
            InvalidRequest, RequestTooLate
        """
        given = str(headers.get(HEADER, "0"))
        if not _MILLISECONDS.fullmatch(given):
            raise InvalidRequest(f"{HEADER}: expected whole milliseconds, found {given[:20]!r}")
        if arrival.started is None:
            return math.inf
        waited_s = now - arrival.started
        if waited_s > self._max_wait_s:
            raise RequestTooLate(f"the request waited {waited_s:.1f} s, max_wait_s is {self._max_wait_s:g}")
        waits_s = int(given) / 1000  # 0 is Envoy's word for no limit
        return waits_s - max(0.0, waited_s) if waits_s else math.inf


def _check_room(needs_s: float, left_s: float, least_s: float) -> float:
    """Returns what the batch has left; raises RequestTooLate where it would take longer."""
    if left_s <= 0:
        raise RequestTooLate("the request waited longer than its client waits")
    if needs_s > min(left_s, least_s):
        raise RequestTooLate(f"the answer would take {needs_s:.3f} s and come later than clients wait")
    return min(left_s, least_s)
