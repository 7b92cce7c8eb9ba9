"""What a worker tells of single requests: a line in its log for each that took long, with the time of each stage, and
spans (`handler.spans`).

| stage | from, to |
|---|---|
| `edge` | the edge has the request's head, and passes the whole on |
| `queue` | from then until a worker takes it |
| `decode`, `forward` | its batch's images, and the model on them |
| `answer` | putting the batch's answers together; of an explanation, the explanation |

The first two are known where an edge stands before the server. `python -m operate slow` reads these lines.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from handler.arrival import Arrival
from handler.identity import Identity
from handler.request import Answer, Request
from handler.spans import Spans

logger = logging.getLogger(__name__)

Stages = dict[str, tuple[float, float]]
"""For each its beginning and its end, Unix time in seconds."""

MARK = "request "
"""What such a line begins with; config/log4j2.xml sends it to requests.log by that."""


class Times(NamedTuple):
    """Of a batch."""

    taken: float
    """Unix time in seconds."""
    decoded_s: float
    """From then."""
    forwarded_s: float
    requests: int


class Trail:
    """Tells of the requests of one worker, which has one batch at a time.

    Args:
        log_slower_s: of those that took at least so long, from the edge on where there is one; None logs none.
        spans: gets every request.
    """

    def __init__(self, identity: Identity, log_slower_s: float | None, spans: Spans | None = None) -> None:
        self._model = {"model": identity.name, "version": identity.version}
        self._log_slower_s, self._spans = log_slower_s, spans
        self._times = Times(0, 0, 0, 0)

    def batch(
        self, requests: Sequence[Request], answers: Sequence[Answer], started: float, decoded: float, forwarded: float
    ) -> None:
        """A batch that has its answers, except for explanations.

        Args:
            started, decoded, forwarded: `time.perf_counter()` before decoding, after it, and after the model.
        """
        now, answered_s = time.time(), time.perf_counter() - started
        self._times = Times(now - answered_s, decoded - started, forwarded - started, len(requests))
        for request, answer in zip(requests, answers, strict=True):
            if request.wants != "explanation":
                self._tell(request, answer, answered_s)

    def explained(self, request: Request, answer: Answer) -> None:
        """A request of the last batch, which has its explanation now."""
        self._tell(request, answer, time.time() - self._times.taken)

    def _tell(self, request: Request, answer: Answer, answered_s: float) -> None:
        arrival, taken = request.arrival, self._times.taken
        took_s = answered_s + arrival.edge_s + max(0.0, taken - (arrival.started or taken))
        is_slow = self._log_slower_s is not None and took_s >= self._log_slower_s
        if self._spans is None and not is_slow:
            return
        stages = self._stages(arrival, answered_s)
        status = answer.refusal.code if answer.refusal else 200
        details = {**self._model, "images": len(request.images), "batch": self._times.requests}
        if is_slow:
            logger.info("%s%s", MARK, json.dumps(_line(arrival, stages, status, details)))
        if self._spans is not None:
            self._spans.tell(arrival, stages, status, details)

    def _stages(self, arrival: Arrival, answered_s: float) -> Stages:
        times = self._times
        taken, decoded, forwarded = times.taken, times.taken + times.decoded_s, times.taken + times.forwarded_s
        before: Stages = {}
        if arrival.started is not None:
            began = min(arrival.started, taken)  # two machines' clocks may differ
            before = {"edge": (began - arrival.edge_s, began), "queue": (began, taken)}
        handled = {
            "decode": (taken, decoded),
            "forward": (decoded, forwarded),
            "answer": (forwarded, taken + answered_s),
        }
        return {**before, **handled}


def _line(arrival: Arrival, stages: Stages, status: int, details: dict[str, object]) -> dict[str, object]:
    return {
        "time": round(stages["answer"][1], 3),
        "id": arrival.request_id,
        "engine_id": arrival.engine_id,
        "trace": arrival.trace_id,
        "status": status,
        **details,
        **{f"{stage}_s": round(end - begin, 6) for stage, (begin, end) in stages.items()},
    }
