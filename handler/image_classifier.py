"""TorchServe handler: encoded images in, `{class name: probability}` out, each row of a batch with its own fate.

TorchServe loads the one class that this module defines; keep it the only one. What a row may hold and how it is
answered is in `handler.rows`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler

from handler import early_answers, explanation, fields, golden, protocol, runtime, variants
from handler.decoding import FORMATS, decode
from handler.errors import InternalError, RequestError
from handler.identity import Identity
from handler.metrics import Metrics
from handler.rows import Answer, Row
from handler.settings import TORCHSERVES_TIMEOUT_S, HandlerSettings

logger = logging.getLogger(__name__)

runtime.keep_freed_memory()
fields.mend()
protocol.read_in_large_pieces()


class ImageClassifier(BaseHandler):  # type: ignore[misc]  # torchserve ships no types
    """Serves a TorchScript `forward(uint8[N,C,H,W]) -> float32[N,K]` of probabilities."""

    def initialize(self, context: Any) -> None:
        """Load model, labels and settings, then prove by the golden check that they are what was measured.

        Raises:
            SettingsError, GoldenMismatch, ValueError: the archive may not serve; TorchServe logs the reason.
        """
        config = context.model_yaml_config
        self.settings = HandlerSettings.parse(config.get("handler"), "model-config.yaml, section handler")
        given = config.get("responseTimeout")  # TorchServe drops a value of another type in silence
        self.settings.check_time(given if isinstance(given, int) else TORCHSERVES_TIMEOUT_S, "model-config.yaml")
        on_gpu = context.system_properties.get("gpu_id") is not None
        workers = config.get("maxWorkers") or (torch.cuda.device_count() if on_gpu else None)
        decoders = runtime.share_cores(workers, self.settings.threads)
        super().initialize(context)
        self.class_names = _class_names(self.mapping)
        self.identity = Identity.of(context)
        self.map: Callable[..., Any] = map
        model_file = Path(context.system_properties["model_dir"]) / self.manifest["model"]["serializedFile"]
        self.variant = variants.choose(
            model_file, self.device, self.settings.precision, self.decode, self.class_names,
            settle_threads=self.settings.threads is None,
        )  # fmt: skip
        self.map = self._fastest_map(decoders, model_file.parent / "golden")
        self.metrics = Metrics.of_worker(context, self.identity, self.class_names, self.variant.name)
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

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one body and one status for each row, in order."""
        started = time.perf_counter()
        rows = self.preprocess(data, context)
        decoded = time.perf_counter()
        probabilities = self.inference([image for row in rows for image in row.tensors])
        forwarded = time.perf_counter()
        answers = self.label(rows, probabilities)
        bodies = self.postprocess(rows, answers, context)
        self.metrics.batch(rows, probabilities, started, decoded, forwarded)
        to_explain = [index for index, row in enumerate(rows) if row.wants == "explanation"]
        time_s = self.settings.explanation_time_s / max(1, len(to_explain))
        if 0 < len(to_explain) < len(rows):
            early_answers.send(bodies, to_explain, context)
        for index in to_explain:
            try:
                bodies[index] = self.explain_row(rows[index], answers[index][0], time_s)
            except Exception:  # the other rows may have their answers, and TorchServe would send them an error as well
                logger.exception("A row could not be explained")
                failure = InternalError("the explanation failed: see the worker's log")
                bodies[index] = failure.encode()
                # Without effect where the head of the answer went out with the other rows.
                context.set_response_status(code=failure.code, phrase=failure.phrase, idx=index)
                context.set_response_content_type(index, "application/json")
        return bodies

    def preprocess(self, data: list[dict[str, Any]], context: Any) -> list[Row]:
        """Decode every image of every row; a refused image is part of its row."""
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        return list(self.map(lambda sent, header: Row.read(sent, header, self.settings), data, headers))

    def inference(self, data: list[torch.Tensor]) -> torch.Tensor:
        """N tensors uint8[C,H,W] → float32[N,K] probabilities on the CPU; N may be 0."""
        if not data:
            return torch.empty(0, len(self.class_names))
        with torch.inference_mode():
            return self.variant.predict(torch.stack(data))

    def label(self, rows: list[Row], probabilities: torch.Tensor) -> list[list[Answer]]:
        """float32[N,K] → for each image of each row its best classes, falling, as many as any row asks for."""
        top_k = max((row.top_k for row in rows), default=1)
        best = probabilities.topk(min(top_k, len(self.class_names)))
        answers = (
            {self.class_names[index]: value for index, value in zip(indices, values, strict=True)}
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        return [list(islice(answers, len(row.tensors))) for row in rows]

    def postprocess(self, rows: list[Row], answers: list[list[Answer]], context: Any) -> list[bytes]:
        """Each row's body, which is still to come where an explanation is wanted, and its status and headers.

        A row whose answer is too long becomes a refused one in `rows`.
        """
        bodies = []
        for index, (row, row_answers) in enumerate(zip(rows, answers, strict=True)):
            context.set_response_content_type(index, "image/png" if row.as_png else "application/json")
            for name, value in self.identity.headers.items():
                context.set_response_header(index, name, value)
            try:
                bodies.append(self.body(row, row_answers))
            except RequestError as too_long:
                rows[index] = replace(row, refusal=too_long)
                bodies.append(too_long.encode())
            if refusal := rows[index].refusal:
                context.set_response_status(code=refusal.code, phrase=refusal.phrase, idx=index)
        return bodies

    def body(self, row: Row, answers: list[Answer]) -> bytes:
        """What the row wanted.

        Raises:
            RequestError: that is more than TorchServe can send.
        """
        if row.wants == "description":
            return self.describe()
        if row.wants == "explanation":
            return b""
        return row.body(answers, self.identity)

    def explain_row(self, row: Row, answer: Answer, time_s: float) -> bytes:
        """What spoke for the best class of the row's one image, by the fp32 model; as JSON or PNG.

        Args:
            time_s: about how long it may take.
        """
        [pixels] = row.tensors
        target = self.class_names.index(next(iter(answer)))
        explained = explanation.explain(self.model.logits, pixels.to(self.device), target, time_s)
        if row.as_png:
            return explained.png(pixels)
        document = explained.document(answer)
        return json.dumps({"explanations": [document]} if row.protocol == "v1" else document).encode()

    def describe(self) -> bytes:
        """What `GET /models/NAME?customized=true` shows beside TorchServe's own description."""
        return json.dumps(
            {
                "digest": self.identity.digest,
                "class_names": self.class_names,
                "variant": self.variant.name,
                "threads": torch.get_num_threads(),
                "formats": FORMATS,
                "handler": self.settings.model_dump(mode="json"),
            }
        ).encode()

    def decode(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded images → uint8[N,C,H,W].

        Raises:
            RequestError: an image cannot be decoded.
        """
        return torch.stack(list(self.map(lambda image: decode(image, self.settings), images)))


def _class_names(mapping: dict[str, str] | None) -> list[str]:
    """`index_to_name.json` as a list in the order of the model's outputs.

    Raises:
        ValueError: the file is missing, an index is missing, or two classes share a name.
    """
    if not mapping:
        raise ValueError("index_to_name.json is missing or empty: the archive has no labels")
    if set(mapping) != {str(index) for index in range(len(mapping))}:
        raise ValueError(f"index_to_name.json must number its classes 0..{len(mapping) - 1}, found {sorted(mapping)}")
    names = [mapping[str(index)] for index in range(len(mapping))]
    if len(set(names)) != len(names):
        raise ValueError(f"index_to_name.json names two classes alike: {sorted(names)}")
    return names
