"""What a worker counts and measures, told through its engine's metrics API; docs/monitoring.md says what each means.

In TorchServe every figure is a line in the worker's output that it parses and writes to its logs. Figures are therefore
gathered and told every few seconds, by a timer and not by the next batch, so that the last ones before a pause arrive
as well and no request waits for them.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from handler import drift
from handler.files import REFERENCE_FILE
from handler.identity import Identity
from handler.request import Answer

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
# Batches and answers that quantiles, mean confidence and drift are taken over.
WINDOW = 1000
FEWEST_ANSWERS_FOR_DRIFT = 200
# Batches of an interval whose times go into the histograms, drawn at random where there were more.
OBSERVED_BATCHES = 20
NAMED_CLASSES = 20
OTHER = "other"
STAGES = ("decode", "forward", "total")
QUANTILES = (0.5, 0.9, 0.99)
DECLARED = {
    "counter": (
        "classifier_batches_total",
        "classifier_requests_total",
        "classifier_refusals_total",
        "classifier_predictions_total",
        "classifier_accepted_total",
    ),
    "gauge": (
        "classifier_info",
        "classifier_stage_quantile_seconds",
        "classifier_confidence_mean",
        "classifier_confidence_psi",
        "classifier_classes_psi",
        "classifier_accepted_psi",
    ),
    "histogram": ("classifier_stage_seconds",),
}


class Metric(Protocol):
    """One figure of an engine's metrics API."""

    def add_or_update(self, value: float, dimension_values: list[str]) -> object:
        """Count, set or observe it; the dimensions are in the order of metrics.yaml."""


class Metrics:
    """Gathers the figures of one worker. Where its engine takes none, it does nothing."""

    def __init__(
        self,
        declared: Mapping[str, Metric],
        model_name: str,
        version: str,
        class_names: Sequence[str],
        reference: drift.Reference | None = None,
        interval_s: float = INTERVAL_S,
        accepted: Sequence[int] | None = None,
    ) -> None:
        """Args:
        declared: each name of `DECLARED` → the engine's metric, or nothing.
        class_names: in the order of the model's outputs.
        reference: what training measured; None gives no drift figures.
        accepted: how many of the images that chose the thresholds are accepted, and how many are not; None where
            nothing is marked.
        """
        self._metrics = declared
        self._model = (model_name, version)
        self._groups = class_groups(class_names, reference)
        self._reference, self._accepted = reference, accepted
        self._reference_mix: Counter[str] = Counter()
        for name, group in zip(class_names, self._groups, strict=True):
            self._reference_mix[group] += reference.classes[name] if reference else 0
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._times: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self._answers: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._marks: deque[bool] = deque(maxlen=WINDOW)

    @classmethod
    def of_worker(
        cls,
        declared: Mapping[str, Metric],
        folder: Path,
        identity: Identity,
        class_names: Sequence[str],
        variant: str,
        accepted: Sequence[int] | None = None,
    ) -> Metrics:
        """The metrics of the worker that serves the model in `folder`; tells at once which model and variant it is.

        Raises:
            InvalidReference: the archive's `reference.json` is not this model's.
        """
        reference = drift.Reference.read(folder / REFERENCE_FILE, class_names)
        metrics = cls(declared, identity.name, identity.version, class_names, reference, accepted=accepted)
        metrics._tell("classifier_info", 1, identity.digest, variant)
        return metrics

    def batch(
        self, answers: Sequence[Answer], probabilities: torch.Tensor, started: float, decoded: float, forwarded: float
    ) -> None:
        """Count a batch that has just been answered.

        Args:
            probabilities: float32[N,K] on the CPU, for the images of all requests.
            started, decoded, forwarded: `time.perf_counter()` before decoding, after it, and after the model.
        """
        if not self._metrics:
            return
        seconds = (decoded - started, forwarded - decoded, time.perf_counter() - started)
        # NumPy: torch would wake its threads for this little.
        predicted = probabilities.numpy()
        indices, confidence = predicted.argmax(1).tolist(), predicted.max(1).tolist()
        with self._lock:
            self._counts["classifier_batches_total",] += 1
            self._counts["classifier_requests_total",] += len(answers)
            errors = (error for answer in answers for error in answer.errors)
            self._counts.update(("classifier_refusals_total", str(error.code)) for error in errors)
            self._counts.update(("classifier_predictions_total", self._groups[index]) for index in indices)
            marks = [mark for answer in answers for mark in answer.accepted if mark is not None]
            self._counts.update(("classifier_accepted_total", str(mark).lower()) for mark in marks)
            self._marks.extend(marks)
            self._times.append(seconds)
            self._answers.extend(zip(indices, confidence, strict=True))
            if self._timer is None:
                self._timer = threading.Timer(self._interval_s, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Tell what has been gathered since the last time."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            counts, self._counts = self._counts, Counter()
            times, answers, marks = list(self._times), list(self._answers), list(self._marks)
        self._tell_times(times, counts["classifier_batches_total",])
        self._tell_answers(answers)
        if self._accepted is not None and len(marks) >= FEWEST_ANSWERS_FOR_DRIFT:
            counts_now = (marks.count(True), marks.count(False))
            self._tell("classifier_accepted_psi", drift.population_stability_index(self._accepted, counts_now))
        for (name, *dimensions), count in counts.items():
            self._tell(name, count, *dimensions)

    def _tell_times(self, times: list[tuple[float, ...]], fresh: int) -> None:
        """Histograms of the last `fresh` of `times`, or of a sample of them, and quantiles of all."""
        recent = times[max(0, len(times) - fresh) :]
        for seconds in random.sample(recent, min(len(recent), OBSERVED_BATCHES)):
            for stage, value in zip(STAGES, seconds, strict=True):
                self._tell("classifier_stage_seconds", value, stage)
        if times:
            for quantile, of_stages in zip(QUANTILES, np.quantile(times, QUANTILES, axis=0).tolist(), strict=True):
                for stage, value in zip(STAGES, of_stages, strict=True):
                    self._tell("classifier_stage_quantile_seconds", value, stage, str(quantile))

    def _tell_answers(self, answers: list[tuple[int, float]]) -> None:
        if not answers:
            return
        confidence = np.nan_to_num([value for _, value in answers])
        self._tell("classifier_confidence_mean", float(confidence.mean()))
        if self._reference is None or len(answers) < FEWEST_ANSWERS_FOR_DRIFT:
            return
        moved = drift.population_stability_index(self._reference.confidence, drift.confidence_counts(confidence))
        self._tell("classifier_confidence_psi", moved)
        mix = Counter(self._groups[index] for index, _ in answers)
        expected, actual = zip(*((count, mix[group]) for group, count in self._reference_mix.items()), strict=True)
        self._tell("classifier_classes_psi", drift.population_stability_index(expected, actual))

    def _tell(self, name: str, value: float, *dimensions: str) -> None:
        """`dimensions` are those that metrics.yaml lists after model and version."""
        if self._metrics:
            self._metrics[name].add_or_update(round(value, 6), [_label(d) for d in (*self._model, *dimensions)])


def class_groups(class_names: Sequence[str], reference: drift.Reference | None) -> list[str]:
    """For each class what it is counted as: itself if it is among the most frequent, or else `other`.

    Frequency is that of the reference; without one, or where it ties, the order of the model's outputs decides.
    """
    if len(class_names) <= NAMED_CLASSES:
        return list(class_names)
    counts = reference.classes if reference else {}
    named = set(sorted(class_names, key=lambda name: -counts.get(name, 0))[:NAMED_CLASSES])
    return [name if name in named else OTHER for name in class_names]


def _label(text: str) -> str:
    """What TorchServe can read back from a line of its log: it splits at these characters and drops empty values."""
    return re.sub(r"[|,:]|[^\S ]", "_", text) or "_"
