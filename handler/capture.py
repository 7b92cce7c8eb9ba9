"""Keeps some of what is asked, with what was answered, to be labelled: `serving.capture` of the recipe.

Each image is a file of the folder as it came, `TIME-TRACE-NUMBER`, and the answer is the same name with `.json`. No
header is kept, but for id and trace. A thread writes; a request neither waits for it nor fails with it.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from handler.identity import Identity
from handler.request import Prediction, Request
from handler.settings import CaptureSettings
from system.files import write, write_json

logger = logging.getLogger(__name__)

SURE = 0.5
"""Probability of the best class from which an answer counts as sure, where nothing is marked as accepted."""
_MOST_WAITING = 64
_WARN_INTERVAL_S = 60.0
_RECOUNT_INTERVAL_S = 10.0
_BLOCK_BYTES = 4096
"""Of a disk, which a file takes at least."""


class _Item(NamedTuple):
    name: str
    image: bytes
    answer: dict[str, Any]


class Capture:
    """Keeps the images of one worker; other workers may write to the same folder."""

    def __init__(self, settings: CaptureSettings, identity: Identity, golden_images: Sequence[bytes] = ()) -> None:
        """Args:
        golden_images: which doctor, probes and edges send, and no client.
        """
        self._settings, self._identity = settings, identity
        self._golden = frozenset(golden_images) if settings.folder is not None else frozenset()
        self._waiting: queue.Queue[_Item] = queue.Queue(_MOST_WAITING)
        self._lost, self._told = 0, -_WARN_INTERVAL_S
        self._bytes, self._counted = 0, -_RECOUNT_INTERVAL_S
        self._folder = Path(settings.folder or "")
        self._is_started = False

    def batch(
        self, requests: Sequence[Request], predictions: Sequence[list[Prediction]], marks: Sequence[list[bool] | None]
    ) -> None:
        """Draw from a batch that has its answers."""
        if self._settings.folder is None:
            return
        for request, predicted, accepted in zip(requests, predictions, marks, strict=True):
            if request.refusal is not None or request.by_grpc:  # so comes what `archive score` asks
                continue
            decoded = [bytes(e) for e, i in zip(request.encoded, request.images, strict=False) if _is_kept(e, i)]
            if len(decoded) != len(predicted):  # pixels without a file
                continue
            for number, (image, prediction) in enumerate(zip(decoded, predicted, strict=True)):
                mark = accepted[number] if accepted is not None else None
                if image in self._golden:
                    continue
                if why := self._reason(prediction, mark):
                    self._put(request, number, image, prediction, mark, why)

    def flush(self) -> None:
        """Wait until what was drawn is written or lost."""
        self._waiting.join()

    def _reason(self, prediction: Prediction, accepted: bool | None) -> str | None:
        # The draw comes first: what is drawn is a fair sample, the unsure ones beside it are none.
        if random.random() < self._settings.share:
            return "random"
        is_sure = accepted if accepted is not None else next(iter(prediction.values()), 0.0) >= SURE
        return "unsure" if self._settings.unsure and not is_sure else None

    def _put(
        self, request: Request, number: int, image: bytes, prediction: Prediction, accepted: bool | None, why: str
    ) -> None:
        self._start()
        arrival, identity, now = request.arrival, self._identity, time.time()
        answer = {
            "time": round(now, 3), "id": arrival.request_id, "trace": arrival.trace_id, "why": why,
            "model": identity.name, "version": identity.version, "digest": identity.digest,
            "prediction": prediction, "accepted": accepted,
        }  # fmt: skip
        try:
            self._waiting.put_nowait(_Item(f"{1e3 * now:.0f}-{arrival.trace_id}-{number}", image, answer))
        except queue.Full:
            self._lose("the disk is slow")

    def _start(self) -> None:
        """With the first image: a worker that is only tried makes no folder."""
        if self._is_started:
            return
        self._is_started = True
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self._lose(error.strerror or str(error), 0)
        threading.Thread(target=self._write_all, name="capture", daemon=True).start()

    def _write_all(self) -> None:
        while True:
            item = self._waiting.get()
            try:
                self._write(item)
            except OSError as error:
                self._lose(error.strerror or str(error))
            except Exception:  # whatever it is, the next one is tried
                logger.exception("A request could not be kept")
            finally:
                self._waiting.task_done()

    def _write(self, item: _Item) -> None:
        """Raises: OSError: as the disk does; nothing is left of the item."""
        size = max(len(item.image), _BLOCK_BYTES) + _BLOCK_BYTES
        if time.monotonic() - self._counted > _RECOUNT_INTERVAL_S:
            with os.scandir(self._folder) as entries:
                self._bytes = sum(max(entry.stat().st_size, _BLOCK_BYTES) for entry in entries if entry.is_file())
            self._counted = time.monotonic()
        if self._bytes + size > self._settings.max_mb * 1e6:
            self._lose(f"it holds max_mb, {self._settings.max_mb:g} MB")
            return
        image = self._folder / item.name
        write(image, item.image, 0o600)
        try:
            write_json(image.with_name(f"{item.name}.json"), item.answer, 0o600)
        except OSError:
            image.unlink(missing_ok=True)
            raise
        self._bytes += size

    def _lose(self, why: str, count: int = 1) -> None:
        self._lost += count
        if time.monotonic() - self._told >= _WARN_INTERVAL_S:
            self._told = time.monotonic()
            logger.warning(
                "Requests are answered and %d not kept for labelling: %s: %s", self._lost, self._settings.folder, why
            )
            self._lost = 0


def _is_kept(encoded: Any, image: Any) -> bool:
    return isinstance(encoded, (bytes, bytearray)) and isinstance(image, torch.Tensor)
