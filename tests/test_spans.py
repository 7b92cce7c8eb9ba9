"""Spans reach a real OTLP receiver where one is named, and a request never waits for it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from handler.image_classifier import ImageClassifier
from handler.spans import Spans
from tests.conftest import free_ports
from tests.listening import Quiet, listening
from tests.worker import ask, load

needs_sdk = pytest.mark.skipif(
    not find_spec("opentelemetry") or not find_spec("opentelemetry.exporter"),
    reason="the packages opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http are not installed",
)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = ["edge", "queue", "decode", "forward", "answer"]


class Collector(Quiet):
    """Takes OTLP over HTTP as protobuf; answers when it may."""

    spans: ClassVar[list[Any]] = []
    services: ClassVar[set[str]] = set()
    asked, may_answer = threading.Event(), threading.Event()

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.set()
        self.may_answer.wait()
        for resource in message.resource_spans:
            self.services.update(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        self.answer({}, 200 if self.path == "/v1/traces" else 404)


@pytest.fixture
def worker(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ImageClassifier]:
    """Loads one that sends its spans to this address."""

    def loaded(endpoint: str, **variables: str) -> ImageClassifier:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load(run)

    return loaded


@pytest.fixture
def collector() -> Iterator[str]:
    Collector.spans.clear()
    Collector.asked.clear()
    Collector.may_answer.set()
    with listening(Collector) as url:
        yield url
        Collector.may_answer.set()


def flush(classifier: ImageClassifier) -> None:
    assert classifier.trail._spans is not None
    classifier.trail._spans.flush()


@needs_sdk
def test_a_request_is_a_span_with_its_stages(worker: Any, run: Path, collector: str, digit: bytes) -> None:
    """Of the client's trace, in order of time; one that the client does not record is none."""
    classifier = worker(collector)
    began = time.time() - 2
    headers = {"X-Request-Start": f"t={began:.3f}", "X-Edge-Time": "0.500", "X-Request-ID": "camera-1"}
    recorded, not_recorded = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE[::-1]}-{PARENT}-00"
    ask(
        classifier,
        run,
        [digit, b"", digit],
        {0: {**headers, "traceparent": recorded}, 2: {"traceparent": not_recorded}},
    )
    flush(classifier)
    assert Collector.services == {"lenet5-digits"}
    of_client = [span for span in Collector.spans if span.trace_id.hex() == TRACE]
    [root] = [span for span in of_client if span.name == "request"]
    assert root.parent_span_id.hex() == PARENT
    assert {a.key: a.value.string_value for a in root.attributes}["request.id"] == "camera-1"
    stages = sorted((span for span in of_client if span is not root), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in stages] == STAGES
    assert {span.parent_span_id for span in stages} == {root.span_id}
    assert abs(stages[0].start_time_unix_nano / 1e9 - (began - 0.5)) < 0.01
    for before, after in pairwise(stages):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (
        stages[0].start_time_unix_nano, stages[-1].end_time_unix_nano
    )  # fmt: skip
    others = [span for span in Collector.spans if span.trace_id.hex() != TRACE]
    assert [span.name for span in others if not span.parent_span_id] == ["request"]
    assert sorted(span.name for span in others if span.parent_span_id) == sorted(STAGES[2:])
    assert TRACE[::-1] not in {span.trace_id.hex() for span in others}


@needs_sdk
def test_the_answer_names_its_span(worker: Any, run: Path, collector: str, digit: bytes) -> None:
    classifier = worker(collector)
    context = ask_for_context(classifier, run, digit)
    flush(classifier)
    [root] = [span for span in Collector.spans if span.name == "request"]
    assert context.get_response_headers(0)["traceresponse"][:52] == f"00-{root.trace_id.hex()}-{root.span_id.hex()}"


def ask_for_context(classifier: ImageClassifier, run: Path, digit: bytes) -> Any:
    from tests.worker import make_context

    context = make_context(run, 1)
    classifier.handle([{"body": digit}], context)
    return context


@needs_sdk
@pytest.mark.parametrize(
    "off", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}]
)
def test_off_as_the_standard_says(worker: Any, collector: str, off: dict[str, str]) -> None:
    """And by default: without the variable there is no thread and no span."""
    assert worker(collector, **off).trail._spans is None


@needs_sdk
def test_a_variable_that_cannot_be_used_costs_the_spans(worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And not the worker."""
    assert worker("http://127.0.0.1:9", OTEL_BSP_MAX_QUEUE_SIZE="many").trail._spans is None
    assert len([line for line in caplog.messages if line.startswith("No spans: a variable OTEL_*")]) == 1


@needs_sdk
def test_a_request_does_not_wait_for_the_collector(worker: Any, run: Path, collector: str, digit: bytes) -> None:
    """While it holds back its answer, more requests are answered than spans find room for, and a line says so."""
    Collector.may_answer.clear()
    lines: list[str] = []
    with told(lines):
        classifier = worker(collector, OTEL_BSP_SCHEDULE_DELAY="10", OTEL_BSP_MAX_QUEUE_SIZE="16",
                            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4", OTEL_EXPORTER_OTLP_TIMEOUT="60")  # fmt: skip
        assert ask(classifier, run, [digit])[1] == [200]
        assert Collector.asked.wait(30)
        for _ in range(10):
            assert ask(classifier, run, [digit] * 4)[1] == [200] * 4
        assert not Collector.may_answer.is_set()
    assert lines == ["1 spans are lost: the collector is down or slow. Requests are answered"]


@needs_sdk
def test_without_a_collector_one_line_says_what_is_lost(worker: Any, run: Path, digit: bytes) -> None:
    """However often it is tried; with one there is no line."""
    lines: list[str] = []
    with told(lines):
        classifier = worker(f"http://127.0.0.1:{free_ports()}")
        for _ in range(3):
            assert ask(classifier, run, [digit])[1] == [200]
            flush(classifier)
    assert len(lines) == 1
    assert "4 spans are lost" in lines[0]


@contextmanager
def told(lines: list[str]) -> Iterator[None]:
    """Collect every warning of a worker, also those of the SDK."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def test_without_the_packages_one_line_says_so(
    run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a collector is named; the worker loads and answers. Where none is named there is no line."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert Spans.of_environment("m") is None
    assert caplog.messages == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    classifier = load(run)
    assert [line for line in caplog.messages if "opentelemetry is missing" in line] != []
    assert ask(classifier, run, [digit])[1] == [200]
