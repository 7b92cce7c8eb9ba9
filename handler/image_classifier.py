"""TorchServe handler: what a worker is handed and answers, around the classifier of `handler.classifier`.

TorchServe loads the one class that this module defines; keep it the only one.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

from handler import torchserve_patches
from handler.classifier import Classifier
from handler.identity import Identity
from handler.metrics import DECLARED
from handler.request import Answer, Request

logger = logging.getLogger(__name__)

torchserve_patches.install()


class ImageClassifier(Classifier, BaseHandler):  # type: ignore[misc]  # torchserve ships no types
    """A worker of TorchServe."""

    def initialize(self, context: Any) -> None:
        """Load the model, which must be what was measured.

        Raises:
            SettingsError, GoldenMismatch, ValueError: the archive may not serve; TorchServe logs the reason.
        """
        config, gpu = context.model_yaml_config, context.system_properties.get("gpu_id")
        self.manifest = context.manifest
        model = self.manifest["model"]
        # The base class would load by suffix, and knows none of torch.export.
        model_file = Path(context.system_properties["model_dir"], model["serializedFile"])
        self.load(
            model_file,
            config,
            Identity.of(str(context.model_name), str(model.get("modelVersion", "")), model_file),
            declared_metrics(context.metrics),
            workers=config.get("maxWorkers") or (torch.cuda.device_count() if gpu is not None else None),
            gpu=None if gpu is None else int(gpu),
        )

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one body and one status for each request, in order."""
        started = time.perf_counter()
        requests = self.preprocess(data, context)
        answers, predictions = self.answer_all(requests, started)
        bodies = self.postprocess(answers, context)
        torchserve_patches.end_streams([index for index, request in enumerate(requests) if request.by_grpc], context)
        to_explain = [index for index, request in enumerate(requests) if request.wants == "explanation"]
        time_s = self.settings.explanation_time_s / max(1, len(to_explain))
        if 0 < len(to_explain) < len(requests):
            torchserve_patches.send_finished(bodies, to_explain, context)
        for index in to_explain:
            answer = self.explained(requests[index], predictions[index], time_s)
            bodies[index] = answer.body
            if answer.refusal is not None:
                # Without effect where the head of the answer went out with the finished requests.
                self.set_status(answer, index, context)
        return bodies

    def preprocess(self, data: list[dict[str, Any]], context: Any) -> list[Request]:
        """Decode every image of every request; a refused image is part of its request."""
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        return self.read(data, headers, [context.get_request_id(index) for index in range(len(data))])

    def postprocess(self, data: list[Answer], context: Any) -> list[bytes]:
        """Set each answer's status and headers, and return the bodies."""
        for index, answer in enumerate(data):
            for name, value in self.headers(answer).items():
                context.set_response_header(index, name, value)
            self.set_status(answer, index, context)
        return [answer.body for answer in data]

    def set_status(self, answer: Answer, index: int, context: Any) -> None:
        """Of one request of a batch, with the content type that belongs to it."""
        context.set_response_content_type(index, answer.content_type)
        if answer.refusal is not None:
            context.set_response_status(code=answer.refusal.code, phrase=answer.refusal.phrase, idx=index)


def declared_metrics(cache: Any) -> dict[str, Any]:
    """Name → metric of TorchServe's `context.metrics`; nothing, with a warning, where its metrics.yaml is not ours."""
    if cache is None:
        return {}
    try:
        return {name: cache.get_metric(name, MetricTypes(kind)) for kind, names in DECLARED.items() for name in names}
    except MetricsCacheKeyError as error:
        logger.warning("No metrics of the classifier: set metrics_config to this project's metrics.yaml (%s)", error)
        return {}
