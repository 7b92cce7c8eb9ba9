"""OpenTelemetry spans of each request, where the environment names a collector; docs/monitoring.md says how.

Off without `OTEL_EXPORTER_OTLP_ENDPOINT`. Sampler, queue and timeout are set by the SDK's own variables.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from handler.arrival import Arrival

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_WARN_INTERVAL_S = 60.0
_SDK_QUEUE = 2048


class Spans:
    """Sends a span for each request and one for each of its stages, from a thread of the SDK's own."""

    def __init__(self, service_name: str) -> None:
        """Raises: ImportError: the packages of the extra `tracing` are missing."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._trace, self._ids = trace, _ids()
        name = os.environ.get("OTEL_SERVICE_NAME") or service_name
        # At the end of a worker a collector that is down would hold it up.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name}), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(_processor())
        self._tracer = self._provider.get_tracer(__name__)

    @classmethod
    def of_environment(cls, service_name: str) -> Spans | None:
        """None where no collector is named, the SDK is switched off, or its packages are missing, which is said."""
        named = next((name for name in ENDPOINTS if os.environ.get(name)), None)
        is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if named is None or is_off or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
            return None
        try:
            return cls(service_name)
        except ImportError as error:
            lacking = f"{named} is set, and the package {error.name} is missing: see docs/monitoring.md"
        except ValueError as error:
            lacking = f"a variable OTEL_* cannot be used: {error}"
        logger.warning("No spans: %s", lacking)
        return None

    def tell(
        self, arrival: Arrival, stages: Mapping[str, tuple[float, float]], status: int, attributes: Mapping[str, Any]
    ) -> None:
        """One request that has its answer.

        Args:
            stages: for each its beginning and end in order, Unix time in seconds.
        """
        trace = self._trace
        self._ids.next = (int(arrival.trace_id, 16), int(arrival.span_id, 16))
        times = list(stages.values())
        began, ended = times[0][0], times[-1][1]
        root = self._tracer.start_span(
            "request", self._parent(arrival), trace.SpanKind.SERVER, start_time=_ns(began),
            attributes={"http.response.status_code": status, "request.id": arrival.request_id, **attributes},
        )  # fmt: skip
        if not root.is_recording():  # as the sampler decides
            return
        context = trace.set_span_in_context(root)
        for stage, (begin, end) in stages.items():
            self._tracer.start_span(stage, context, start_time=_ns(begin)).end(_ns(end))
        if status >= 500:
            root.set_status(trace.StatusCode.ERROR)
        root.end(_ns(ended))

    def flush(self) -> None:
        """Send what waits."""
        self._provider.force_flush()

    def _parent(self, arrival: Arrival) -> Any:
        trace = self._trace
        if arrival.parent_id is None:
            return trace.set_span_in_context(trace.INVALID_SPAN)
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if arrival.sampled else trace.TraceFlags.DEFAULT)
        remote = trace.SpanContext(int(arrival.trace_id, 16), int(arrival.parent_id, 16), True, flags)
        return trace.set_span_in_context(trace.NonRecordingSpan(remote))


def _ids() -> Any:
    """Gives the next span the ids that the answer names; further ones are random."""
    from opentelemetry.sdk.trace import RandomIdGenerator

    class Ids(RandomIdGenerator):  # type: ignore[misc]
        next: tuple[int, int] | None = None

        def generate_trace_id(self) -> int:
            assert self.next is not None
            return self.next[0]

        def generate_span_id(self) -> int:
            given, self.next = self.next, None
            return given[1] if given else int(super().generate_span_id())

    return Ids()


def _processor() -> Any:
    """The SDK's, which says in one line a minute at most how many spans were lost."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

    # It would say more, at every try.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    most_waiting = int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") or _SDK_QUEUE)

    class Exporter(OTLPSpanExporter):  # type: ignore[misc]
        lock = threading.Lock()
        waiting, lost, told = 0, 0, -_WARN_INTERVAL_S

        def take(self) -> bool:
            with self.lock:
                has_room = self.waiting < most_waiting
                self.waiting += has_room
            return has_room or self.lose(1)

        def export(self, spans: Any) -> Any:
            result = super().export(spans)
            with self.lock:
                self.waiting -= len(spans)
            if result is not SpanExportResult.SUCCESS:
                self.lose(len(spans))
            return result

        def lose(self, count: int) -> bool:
            self.lost += count
            if time.monotonic() - self.told >= _WARN_INTERVAL_S:
                self.told = time.monotonic()
                logger.warning("%d spans are lost: the collector is down or slow. Requests are answered", self.lost)
                self.lost = 0
            return False

    class Processor(BatchSpanProcessor):  # type: ignore[misc]
        def on_end(self, span: Any) -> None:
            if exporter.take():
                super().on_end(span)

    exporter = Exporter()
    return Processor(exporter)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
