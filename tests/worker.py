"""A worker without Java: the handler with a context that behaves as TorchServe's own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from ts.context import Context, RequestProcessor

from handler.image_classifier import ImageClassifier


def make_context(model_dir: Path, requests: int = 0, model_file: str = "model.pt") -> Context:
    """TorchServe's own context of a worker that loads `model_dir`, for a batch of `requests`."""
    context = Context(
        model_name="lenet5-digits",
        model_dir=str(model_dir),
        manifest={"model": {"serializedFile": model_file, "modelVersion": "1.0"}},
        batch_size=32,
        gpu=None,
        mms_version="0.12.0",
        model_yaml_config=yaml.safe_load((model_dir / "model-config.yaml").read_text()),
    )
    context.request_processor = [RequestProcessor({}) for _ in range(requests)]
    return context


def load(model_dir: Path, model_file: str = "model.pt") -> ImageClassifier:
    classifier = ImageClassifier()
    threads = torch.get_num_threads()
    try:
        classifier.initialize(make_context(model_dir, model_file=model_file))
    finally:
        torch.set_num_threads(threads)
    return classifier


def ask(
    classifier: ImageClassifier, model_dir: Path, bodies: list[Any], headers: dict[int, dict[str, str]] | None = None
) -> tuple[list[Any], list[int]]:
    """Answers and statuses of one batch with a raw body in each request; `headers` by the number of the request."""
    context = make_context(model_dir, len(bodies))
    context.request_processor = [
        RequestProcessor({"Host": "localhost", **(headers or {}).get(index, {})}) for index in range(len(bodies))
    ]
    answers = classifier.handle([body if isinstance(body, dict) else {"body": body} for body in bodies], context)
    assert isinstance(answers, list)
    for index in range(len(bodies)):
        headers = dict(context.get_response_headers(index))
        assert headers.pop("traceresponse").startswith("00-")
        assert headers == {
            "content-type": "application/json", "x-model-name": "lenet5-digits", "x-model-version": "1.0",
            "x-model-digest": hashlib.sha256((model_dir / "model.pt").read_bytes()).hexdigest()[:12],
        }  # fmt: skip
    return [json.loads(answer) for answer in answers], [context.get_response_status(i)[0] for i in range(len(bodies))]
