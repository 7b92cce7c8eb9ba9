"""Which request this is and when it came, by its headers. No header is trusted: a broken one costs only what it says.

| header | set by | taken | else |
|---|---|---|---|
| `X-Request-ID` | the client, or the edge | 1 to 128 letters, digits and `._:/+=-` | TorchServe's own id |
| `traceparent` | the client | as W3C Trace Context, level 1, has it | a new trace, by the id if that is a UUID |
| `X-Request-Start` | the edge | Unix time in seconds, `t=1790000000.123` | unknown how long it waited |
| `X-Edge-Time` | the edge | seconds that the edge took to read the request | the same |
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

TRACE_HEADER = "traceresponse"
"""Of an answer, as drafted for level 2 of W3C Trace Context: TorchServe writes an `x-request-id` of its own."""
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.{0,400})?", re.ASCII
)
_TRACE_ID = re.compile("(?!0{32})[0-9a-f]{32}")
_START, _SECONDS = re.compile(r"t=(\d{1,12}\.\d{3})"), re.compile(r"\d{1,6}\.\d{3}")
_SAMPLED = 1


class Arrival(NamedTuple):
    """What a request's headers say of it, besides what it asks for."""

    request_id: str
    engine_id: str
    """The engine's own; TorchServe writes its own into the answer's `x-request-id`."""
    trace_id: str
    span_id: str
    """Of the worker's part of the trace."""
    parent_id: str | None = None
    """The span that the client asks from; None where the trace begins here."""
    sampled: bool = False
    """The client records the trace."""
    started: float | None = None
    """Unix time at which the edge passed it on, in seconds."""
    edge_s: float = 0.0
    """How long the edge had been reading it by then."""

    @classmethod
    def of(cls, headers: Mapping[str, Any], engine_id: str | None = None) -> Arrival:
        """Args:
        headers: with their names in lower case.
        engine_id: by default a random one.
        """
        engine_id = engine_id or secrets.token_hex(16)
        given = str(headers.get("x-request-id", ""))
        request_id = given if _ID.fullmatch(given) else engine_id
        trace_id, parent_id, sampled = _trace(str(headers.get("traceparent")), request_id)
        start = _START.fullmatch(str(headers.get("x-request-start")))
        edge = _SECONDS.fullmatch(str(headers.get("x-edge-time"))) if start else None
        return cls(
            request_id, engine_id, trace_id, secrets.token_hex(8), parent_id, sampled,
            float(start[1]) if start else None, float(edge[0]) if edge else 0.0,
        )  # fmt: skip

    @property
    def traceresponse(self) -> str:
        """The header `TRACE_HEADER`."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


UNKNOWN = Arrival("", "", "", "")
"""Of a request whose headers are still to be read."""


def _trace(traceparent: str, request_id: str) -> tuple[str, str | None, bool]:
    """Trace, parent and whether it is sampled."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found and not (found[1] == "00" and found[5]):  # only a later version has more fields
        return found[2], found[3], bool(int(found[4], 16) & _SAMPLED)
    digits = request_id.replace("-", "").lower()
    return digits if _TRACE_ID.fullmatch(digits) else secrets.token_hex(16), None, False
