"""What a server tells Prometheus, as rows that a person can read: no buckets, means instead of sums."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families
from requests.exceptions import SSLError

from client.connection import direct_session, no_tls
from client.errors import ClientError, ServerUnreachable

_OF_SERVER = ("ts_", "Requests", "QueueTime", "Memory", "GPU")
_OF_CLASSIFIER = "classifier_"
_OF_RAY = ("Component", "NodeAddress", "SessionName", "WorkerId", "otel_")
"""Labels that Ray adds."""
_TIMEOUT_S = 10.0
# A sum, and the count that makes a mean of it; of a histogram's series the ends of their names.
_MEANS = {
    "ts_inference_latency_microseconds": "ts_inference_requests_total",
    "ts_queue_latency_microseconds": "ts_inference_requests_total",
}


@dataclass(frozen=True)
class Sample:
    """One line of Prometheus' text format."""

    name: str
    labels: dict[str, str]
    value: float

    @property
    def model(self) -> str | None:
        return self.labels.get("ModelName") or self.labels.get("model_name")

    @property
    def shown_labels(self) -> str:
        """Without the host, which is the same for all, and the model, which has a column of its own."""
        hidden = ("Hostname", "hostname", "ModelName", "model_name", "Level", *_OF_RAY)
        shown = {name: value for name, value in self.labels.items() if not name.startswith(hidden)}
        return " ".join(f"{name}={value}" for name, value in shown.items())


def read(url: str, certificate_authority: Path | None = None) -> list[Sample]:
    """Every sample at the metrics address `url`; no token is needed.

    Args:
        certificate_authority: as `TorchServe` takes it.

    Raises:
        ServerUnreachable: nothing answers there, or not in TLS that can be trusted.
        ClientError: what answers has no metrics in Prometheus' format.
    """
    try:
        with direct_session(certificate_authority) as session:
            answer = session.get(f"{url}/metrics", timeout=_TIMEOUT_S)
    except SSLError as error:
        raise no_tls(url, error) from None
    except requests.RequestException:
        raise ServerUnreachable(f"no metrics answer at {url}: name the address with --metrics-url") from None
    if not answer.ok:
        raise ClientError(
            f"{url}/metrics answers {answer.status_code}: the server needs the line metrics_mode=prometheus in its "
            "configuration, as config/config.cpu.properties has it"
        )
    try:
        return parse(answer.text)
    except ValueError:
        raise ClientError(
            f"{url}/metrics answers, but not in Prometheus' format: name the address with --metrics-url"
        ) from None


def parse(text: str) -> list[Sample]:
    """The samples of Prometheus' text format, in their order, with the classifier's names as in TorchServe.

    Raises:
        ValueError: a line is none of it.
    """
    # By its type the parser would rename a counter such as TorchServe's Requests2XX to Requests2XX_total.
    untyped = re.sub(r"^#.*|^ray_(?=classifier_)", "", text, flags=re.MULTILINE)
    families = text_string_to_metric_families(untyped)
    return [Sample(sample.name, sample.labels, float(sample.value)) for family in families for sample in family.samples]


def interesting(samples: Iterable[Sample], model: str | None = None) -> list[Sample]:
    """The classifier's figures and TorchServe's own, of one model alone where it is named.

    Sums of times become means (`_mean`); buckets and the times at which series began are left out.
    """
    by_series = {(sample.name, tuple(sample.labels.items())): sample for sample in samples}
    rows = []
    for (name, labels), sample in by_series.items():
        if not name.startswith((_OF_CLASSIFIER, *_OF_SERVER)) or (model is not None and sample.model != model):
            continue
        if name.endswith(("_bucket", "_created", "_count")):
            continue
        count_name = _MEANS.get(name) or (f"{name.removesuffix('_sum')}_count" if name.endswith("_sum") else None)
        if count_name is None:
            rows.append(sample)
        elif (count := by_series.get((count_name, labels))) is not None and count.value > 0:
            rows.append(Sample(f"{name.removesuffix('_sum')}_mean", sample.labels, sample.value / count.value))
    return sorted(rows, key=lambda row: (not row.name.startswith(_OF_CLASSIFIER), row.name, row.shown_labels))
