"""What serves one model, whichever engine hands it the requests: images in, `{class name: probability}` out.

`handler.request` says what a request may hold and how it is answered. An engine loads the model; then it calls `read`
and `answer_all` for each batch, and `explained` for each request that wants it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch

from handler import acceptance, explanation, golden, labels, runtime, torchserve_defaults, variants
from handler.acceptance import Scores
from handler.arrival import TRACE_HEADER, Arrival
from handler.capture import Capture
from handler.deadline import Deadlines
from handler.decoding import decode
from handler.errors import InternalError
from handler.files import ACCEPTANCE_FILE, CONFIG_FILE, GOLDEN, LABELS_FILE
from handler.formats import FORMATS
from handler.identity import Identity
from handler.metrics import Metric, Metrics
from handler.request import Answer, Prediction, Request
from handler.settings import HandlerSettings
from handler.spans import Spans
from handler.trail import Trail

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")

runtime.keep_freed_memory()


class Classifier:
    """Serves `forward(uint8[N,C,H,W]) -> float32[N,K]` of probabilities: TorchScript, torch.export or ONNX."""

    def load(
        self,
        model_file: Path,
        config: Mapping[str, Any],
        identity: Identity,
        metrics: Mapping[str, Metric],
        *,
        workers: int | None,
        gpu: int | None,
    ) -> None:
        """Load model, labels and settings, then prove by the golden check that they are what was measured.

        Args:
            model_file: what belongs to it lies beside it.
            config: of model-config.yaml.
            metrics: the engine's, as `handler.metrics.Metrics` takes them.
            workers: how many processes share the cores; None is one for each.
            gpu: its number.

        Raises:
            SettingsError, GoldenMismatch, ValueError: the model may not serve.
        """
        folder = model_file.parent
        self.settings = HandlerSettings.parse(config.get("handler"), f"{CONFIG_FILE}, section handler")
        given = config.get("responseTimeout")  # TorchServe drops a value of another type in silence
        self.settings.check_time(given if isinstance(given, int) else torchserve_defaults.TIMEOUT_S, CONFIG_FILE)
        decoders = runtime.share_cores(workers, self.settings.threads)
        is_onnx = model_file.suffix == ".onnx"
        if is_onnx or not torch.cuda.is_available():
            gpu = None
        self.device = _CPU if gpu is None else torch.device("cuda", gpu)
        self.class_names = labels.read(folder / LABELS_FILE)
        self.identity = identity
        self.map: Callable[..., Any] = map
        wanted = self.settings.accept
        scores = Scores.read(folder / ACCEPTANCE_FILE) if wanted.is_on else None
        self.acceptance = scores.choose(wanted) if scores else None
        self.variant = variants.choose(
            model_file, self.device, self.settings.precision, self.decode, self.class_names,
            settle_threads=self.settings.threads is None, with_nearness=wanted.needs_nearness,
        )  # fmt: skip
        self.network = None if is_onnx else variants.load_network(model_file, self.device)[0]
        self.map = self._fastest_map(decoders, folder / GOLDEN)
        accepted = self.acceptance.counts(scores) if self.acceptance and scores else None
        self.metrics = Metrics.of_worker(metrics, folder, identity, self.class_names, self.variant.name, accepted)
        self.capture = Capture(self.settings.capture, identity, golden.images(folder / GOLDEN))
        self.deadlines = Deadlines(self.settings.max_wait_s)
        self.trail = Trail(identity, self.settings.log_slower_s, Spans.of_environment(identity.name))
        logger.info(
            "%d classes, device %s, %d threads, decoding by %s",
            len(self.class_names), self.device, torch.get_num_threads(), "one" if self.map is map else decoders,
        )  # fmt: skip

    def _fastest_map(self, decoders: int, golden_folder: Path) -> Callable[..., Any]:
        """Decoding releases Python's lock, so threads share it out, unless images are so small that this costs more."""
        if decoders == 1:
            return map
        images = golden.images(golden_folder)

        def decode_all(each: Callable[..., Any]) -> float:
            return runtime.seconds(lambda: list(each(lambda image: decode(image, self.settings), images)))

        together = ThreadPoolExecutor(decoders, thread_name_prefix="decode").map
        return together if runtime.is_worth_threads(decode_all(map), lambda: decode_all(together)) else map

    def read(
        self, fields: Sequence[Mapping[str, Any]], headers: Sequence[Mapping[str, Any]], ids: Sequence[str | None]
    ) -> list[Request]:
        """Decode every image of every request; a refused image is part of its request.

        Args:
            ids: the engine's own of each request.
        """
        lowered = [{name.lower(): value for name, value in each.items()} for each in headers]
        arrivals = [Arrival.of(*each) for each in zip(lowered, ids, strict=True)]
        refusals = self.deadlines.refusals(arrivals, lowered, time.time())
        requests = list(self.map(Request.read, fields, lowered, repeat(self.settings), arrivals, refusals))
        return requests if self.network is not None else [request.without_explanation() for request in requests]

    def answer_all(self, requests: list[Request], started: float) -> tuple[list[Answer], list[list[Prediction]]]:
        """Answer a batch, the body of explanations left out; returns what was predicted for each request as well.

        Args:
            started: `time.perf_counter()` before its images were decoded.
        """
        decoded = time.perf_counter()
        answered = self.inference([image for request in requests for image in request.tensors])
        forwarded = time.perf_counter()
        probabilities = answered[:, : len(self.class_names)]
        predictions, marks = self.label(requests, probabilities), self.mark(requests, answered)
        answers = [self.answer(*each) for each in zip(requests, predictions, marks, strict=True)]
        self.metrics.batch(answers, probabilities, started, decoded, forwarded)
        self.trail.batch(requests, answers, started, decoded, forwarded)
        self.capture.batch(requests, predictions, marks)
        self.deadlines.computed(len(answered), time.perf_counter() - started)
        return answers, predictions

    def inference(self, data: list[torch.Tensor]) -> torch.Tensor:
        """N tensors uint8[C,H,W] → float32[N,K] probabilities on the CPU; N may be 0.

        With `serving.accept.known` a further column is the nearness to the nearest training image.
        """
        if not data:
            return torch.empty(0, len(self.class_names) + self.settings.accept.needs_nearness)
        with torch.inference_mode():
            return self.variant.predict(torch.stack(data))

    def label(self, requests: list[Request], probabilities: torch.Tensor) -> list[list[Prediction]]:
        """float32[N,K] → for each image of each request its best classes, as many as any request asks for."""
        top_k = max((request.top_k for request in requests), default=1)
        best = probabilities.topk(min(top_k, len(self.class_names)))
        predictions = (
            {self.class_names[index]: value for index, value in zip(indices, values, strict=True)}
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        return [list(islice(predictions, len(request.tensors))) for request in requests]

    def mark(self, requests: list[Request], answered: torch.Tensor) -> list[list[bool] | None]:
        """What `inference` gave → for each image of each request whether it is accepted; None where none is marked."""
        if self.acceptance is None:
            return [None] * len(requests)
        marks = iter(self.acceptance.marks(answered, len(self.class_names)))
        return [list(islice(marks, len(request.tensors))) for request in requests]

    def answer(self, request: Request, predictions: list[Prediction], accepted: list[bool] | None) -> Answer:
        """What the request wants; the body of an explanation is still to come."""
        if request.wants == "description":
            return Answer(json.dumps(self.describe()).encode(), arrival=request.arrival)
        if request.wants == "explanation":
            return Answer(b"", "image/png" if request.as_png else "application/json", arrival=request.arrival)
        return request.answer(predictions, self.identity, accepted)

    def headers(self, answer: Answer) -> dict[str, str]:
        """What an answer says of itself beside its content type."""
        marks = {acceptance.HEADER: acceptance.shown(answer.accepted)} if answer.accepted else {}
        return {**self.identity.headers, **marks, TRACE_HEADER: answer.arrival.traceresponse}

    def explained(self, request: Request, predictions: list[Prediction], time_s: float) -> Answer:
        """Which parts of the request's one image support its best class; where that fails, the error.

        Args:
            time_s: about how long it may take.
        """
        try:
            content_type = "image/png" if request.as_png else "application/json"
            body = self.explain_request(request, predictions[0], time_s)
            answer = Answer(body, content_type, arrival=request.arrival)
        except Exception:  # the other requests of the batch have their answers
            logger.exception("A request could not be explained")
            failure = InternalError("the explanation failed: see the worker's log")
            answer = Answer(failure.encode(), refusal=failure, arrival=request.arrival)
        self.trail.explained(request, answer)
        return answer

    def explain_request(self, request: Request, prediction: Prediction, time_s: float) -> bytes:
        """The explanation of its best class by the fp32 model, as JSON or PNG."""
        [pixels] = request.tensors
        target = self.class_names.index(next(iter(prediction)))
        assert self.network is not None  # `read` has refused it
        explained = explanation.explain(self.network, pixels.to(self.device), target, time_s)
        if request.as_png:
            return explained.png(pixels)
        document = explained.document(prediction)
        return json.dumps({"explanations": [document]} if request.protocol == "v1" else document).encode()

    def describe(self) -> dict[str, Any]:
        """What `GET /models/NAME?customized=true` shows beside TorchServe's own description."""
        return {
            "digest": self.identity.digest,
            "class_names": self.class_names,
            "variant": self.variant.name,
            "threads": torch.get_num_threads(),
            "formats": self.settings.formats or FORMATS,
            "handler": self.settings.model_dump(mode="json"),
        }

    def decode(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded images → uint8[N,C,H,W].

        Raises:
            RequestError: an image cannot be decoded.
        """
        return torch.stack(list(self.map(lambda image: decode(image, self.settings), images)))
