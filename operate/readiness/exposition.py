"""What the readiness server tells Prometheus, in its text format; docs/monitoring.md says what each metric means."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from operate.readiness.checks import BOUNDS_S, GoldenAnswers, Readiness

__all__ = ["CONTENT_TYPE", "text"]

Sample = tuple[str, dict[str, str], float]
"""What its name has after the metric's, its own labels, and its value."""


def text(model: str, readiness: Readiness, ended_at: float | None, golden: GoldenAnswers | None) -> str:
    """One model as it was found.

    Args:
        model: NAME or NAME/VERSION.
        ended_at: when the last check came to its end, in Unix time.
        golden: what became of the golden images, or None where there are none.

    What is not known has no sample, and so no value that could be taken for one.
    """
    metrics = _Metrics(model)
    metrics.add_gauge("torchserve_model_ready", "1 while /readyz says 200.", readiness.ready)
    if (workers := readiness.workers) is not None:
        metrics.add_gauge("torchserve_model_workers_ready", "Workers that have loaded the model.", workers.ready)
        declared = "Workers that the model should have at least."
        metrics.add_gauge("torchserve_model_workers_declared", declared, workers.declared)
    if ended_at is not None:
        ended = "When the last look at the model came to its end."
        metrics.add_gauge("torchserve_model_look_timestamp_seconds", ended, ended_at)
    if golden is not None:
        results = {"right": golden.right, "wrong": golden.wrong, "none": golden.none}
        answers: list[Sample] = [("_total", {"result": result}, number) for result, number in results.items()]
        answered = "Golden images by what they were answered with."
        metrics.add("torchserve_golden_answers", "counter", answered, answers)
        # By the library's own Histogram an image without an answer would be within its bound, and not in +Inf alone.
        buckets = [*zip(map(str, BOUNDS_S), golden.within, strict=True), ("+Inf", golden.asked)]
        times: list[Sample] = [("_bucket", {"le": bound}, number) for bound, number in buckets]
        times += [("_count", {}, golden.asked), ("_sum", {}, golden.seconds)]
        waited = "Time from asking for a golden image to its answer."
        metrics.add("torchserve_golden_seconds", "histogram", waited, times)
    return generate_latest(metrics).decode()


class _Metrics(Collector):
    """The metrics of one model, with its labels on every sample."""

    def __init__(self, model: str) -> None:
        name, _, version = model.partition("/")
        self._labels = {"model_name": name, "model_version": version or "default"}
        self._metrics: list[Metric] = []

    def add(self, name: str, kind: str, documentation: str, samples: list[Sample]) -> None:
        metric = Metric(name, documentation, kind)
        for suffix, labels, value in samples:
            metric.add_sample(name + suffix, {**self._labels, **labels}, value)
        self._metrics.append(metric)

    def add_gauge(self, name: str, documentation: str, value: float) -> None:
        self.add(name, "gauge", documentation, [("", {}, value)])

    def collect(self) -> list[Metric]:
        return self._metrics
