"""What a Ray worker does: answer shards of images with the archive's own code, as a TorchServe worker would.

Nothing here imports `handler`: what is imported under that name must come from the unpacked archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archive.errors import ScoringRefused
from archive.members import HANDLER_FILE
from archive.verify import opened

DIGEST_KEY = b"archive_digest"
"""Of a shard's metadata."""
UNREADABLE = 0
"""The `error_code` of a file that cannot be read."""
_BATCH_IMAGES = 32


class Worker:
    """One process that answers as a TorchServe worker does: with the code of the archive, and with no other."""

    def __init__(self, archive: Path, digest: str, folder: Path, out: Path) -> None:
        import torch
        from ts.model_loader import ModelLoaderFactory

        self.folder, self.out, self.digest = folder, out, digest
        self._unpacked = tempfile.TemporaryDirectory(prefix="score-")
        with opened(archive) as (verified, content):
            if verified.digest != digest:
                raise ScoringRefused(f"{archive} is not the same on every machine, or was changed meanwhile")
            content.extract(Path(self._unpacked.name))
        sys.path.insert(0, self._unpacked.name)
        logging.getLogger().setLevel(logging.WARNING)
        self.service = ModelLoaderFactory.get_model_loader().load(
            "score", self._unpacked.name, HANDLER_FILE, None, _BATCH_IMAGES, None, True, None
        )
        torch.set_num_threads(1)

    def __call__(self, shard: Any) -> Any:
        """A table with the column `file` → one row that counts; the answers go into the shard's own file."""
        import pyarrow

        files = [os.fsdecode(file) for file in shard.column("file").to_pylist()]
        rows = [
            row
            for start in range(0, len(files), _BATCH_IMAGES)
            for row in self._answer(files[start : start + _BATCH_IMAGES])
        ]
        write_shard(self.out, rows, self.digest)
        refused = sum("error_code" in row for row in rows)
        return pyarrow.table({"images": [len(rows)], "refused": [refused]})

    def _answer(self, files: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each file, in order."""
        rows: dict[str, dict[str, Any]] = {}
        images: dict[str, bytes] = {}
        for file in files:
            try:
                images[file] = (self.folder / file).read_bytes()
            except OSError as error:
                rows[file] = _refused(file, UNREADABLE, error.strerror or str(error))
        for file, status, answer, mark in zip(images, *self._ask(list(images.values())), strict=True):
            rows[file] = _answered(file, answer, mark) if status == 200 else _refused(file, status, answer["message"])
        return [rows[file] for file in files]

    def _ask(self, images: Sequence[bytes]) -> tuple[list[int], list[dict[str, Any]], list[bool | None]]:
        """Statuses, answers and marks of a batch with an image in each row, as TorchServe would send them."""
        from ts.context import RequestProcessor

        context = self.service.context
        context.request_processor = [RequestProcessor({}) for _ in images]
        answers = self.service._entry_point([{"body": image} for image in images], context) if images else []
        statuses = [context.get_response_status(index)[0] or 200 for index in range(len(images))]
        marks = [context.get_response_headers(index).get("x-accepted") for index in range(len(images))]
        return statuses, [json.loads(answer) for answer in answers], [mark and json.loads(mark) for mark in marks]


def write_shard(out: Path, rows: Sequence[dict[str, Any]], digest: str) -> Path:
    """Write `rows` under a name that follows from their paths, so that a shard done twice is there once.

    A column that a row lacks is null there.
    """
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.float32()
    schema = pyarrow.schema(
        {
            "path": text, "label": text, "probability": number, "labels": pyarrow.list_(text),
            "probabilities": pyarrow.list_(number), "accepted": pyarrow.bool_(),
            "error_code": pyarrow.int16(), "error_message": text,
        },
        metadata={DIGEST_KEY: digest.encode()},
    )  # fmt: skip
    key = hashlib.sha256("\0".join(row["path"] for row in rows).encode()).hexdigest()[:16]
    target = out / f"part-{key}.parquet"
    partial = out / f".part-{key}.{uuid.uuid4().hex}.partial"
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), partial)
    return partial.replace(target)


def _answered(file: str, answer: dict[str, float], accepted: bool | None) -> dict[str, Any]:
    labels, probabilities = list(answer), list(answer.values())
    return {
        "path": readable_name(file), "label": labels[0], "probability": probabilities[0],
        "labels": labels, "probabilities": probabilities, "accepted": accepted,
    }  # fmt: skip


def _refused(file: str, code: int, message: str) -> dict[str, Any]:
    return {"path": readable_name(file), "error_code": code, "error_message": message}


def readable_name(path: str) -> str:
    """`path` as the column `path` has it."""
    return os.fsencode(path).decode(errors="backslashreplace")
