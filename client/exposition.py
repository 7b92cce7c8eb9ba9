"""What the readiness server tells Prometheus, in its text format; docs/metrics.md says what each metric means."""

from __future__ import annotations

from collections.abc import Mapping

from client.readiness import BOUNDS_S, GoldenAnswers, Readiness

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def text(model: str, readiness: Readiness, ended_at: float | None, golden: GoldenAnswers | None) -> str:
    """One model as it was found.

    Args:
        model: NAME or NAME/VERSION.
        ended_at: when the last check came to its end, in Unix time.
        golden: what became of the golden images, or None where there are none.

    What is not known has no sample, and so no value that could be taken for one.
    """
    name, _, version = model.partition("/")
    labels = {"model_name": name, "model_version": version or "default"}
    lines = _metric("torchserve_model_ready", "gauge", [("", labels, int(readiness.ready))])
    if (workers := readiness.workers) is not None:
        lines += _metric("torchserve_model_workers_ready", "gauge", [("", labels, workers.ready)])
        lines += _metric("torchserve_model_workers_declared", "gauge", [("", labels, workers.declared)])
    if ended_at is not None:
        lines += _metric("torchserve_model_look_timestamp_seconds", "gauge", [("", labels, ended_at)])
    if golden is not None:
        results = {"right": golden.right, "wrong": golden.wrong, "none": golden.none}
        lines += _metric(
            "torchserve_golden_answers_total",
            "counter",
            [("", {**labels, "result": result}, number) for result, number in results.items()],
        )
        buckets = [*zip(map(str, BOUNDS_S), golden.within, strict=True), ("+Inf", golden.asked)]
        lines += _metric(
            "torchserve_golden_seconds",
            "histogram",
            [
                *(("_bucket", {**labels, "le": bound}, number) for bound, number in buckets),
                ("_sum", labels, golden.seconds),
                ("_count", labels, golden.asked),
            ],
        )
    return "".join(f"{line}\n" for line in lines)


def _metric(name: str, kind: str, samples: list[tuple[str, Mapping[str, str], float]]) -> list[str]:
    """Its lines: the type, and each sample's suffix, labels and value."""
    lines = [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        shown = ",".join(f'{label}="{_escaped(content)}"' for label, content in labels.items())
        lines.append(f"{name}{suffix}{{{shown}}} {value!r}")
    return lines


def _escaped(content: str) -> str:
    return content.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


_HELP = {
    "torchserve_model_ready": "1 while /readyz says 200.",
    "torchserve_model_workers_ready": "Workers that have loaded the model.",
    "torchserve_model_workers_declared": "Workers that the model should have at least.",
    "torchserve_model_look_timestamp_seconds": "When the last look at the model came to its end.",
    "torchserve_golden_answers_total": "Golden images by what they were answered with.",
    "torchserve_golden_seconds": "Time from asking for a golden image to its answer.",
}
