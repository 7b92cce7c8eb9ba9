"""The same images in the form that each server takes, and the answers in one form."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BODIES = 32
"""Each another image first; the load generator sends them in turns."""
BOUNDARY = "benchmark-7d1f0a3c"
_MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
_TRITON_HEADER_BYTES = 160


@dataclass(frozen=True)
class Form:
    """How one request carries images.

    Args:
        encode: encoded images → body.
        decode: parsed JSON → the answer for the first image, `{class name: probability}`.
    """

    content_type: str
    encode: Callable[[Sequence[bytes]], bytes]
    decode: Callable[[Any], dict[str, float]] = lambda answer: answer
    headers: dict[str, str] = field(default_factory=dict)
    images: int = 1

    @property
    def all_headers(self) -> dict[str, str]:
        return {"Content-Type": self.content_type, **self.headers}


def write(folder: Path, form: Form, images: Sequence[bytes]) -> None:
    """Write `folder/00.bin` to `31.bin`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(BODIES):
        chosen = [images[(index + offset) % len(images)] for offset in range(form.images)]
        (folder / f"{index:02d}.bin").write_bytes(form.encode(chosen))


def _multipart(images: Sequence[bytes]) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="image.jpg"\r\n'
    parts = (head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n" for image in images)
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def _json(images: Sequence[bytes]) -> bytes:
    return json.dumps({"image": base64.b64encode(images[0]).decode()}).encode()


def _input(images: Sequence[bytes], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(images), 1], **more}]}


def _open_inference(images: Sequence[bytes]) -> bytes:
    data = [base64.b64encode(image).decode() for image in images]
    return json.dumps(_input(images, parameters={"content_type": "base64"}, data=data)).encode()


def _triton(images: Sequence[bytes]) -> bytes:
    """Triton's binary extension: JSON of a fixed length, then each image with its length before it."""
    raw = b"".join(struct.pack("<I", len(image)) + image for image in images)
    head = json.dumps(_input(images, parameters={"binary_data_size": len(raw)}))
    return head.ljust(_TRITON_HEADER_BYTES).encode() + raw


def _first(answers: Any) -> dict[str, float]:
    answer: dict[str, float] = answers[0]
    return answer


def _from_open_inference(answer: Any) -> dict[str, float]:
    first: dict[str, float] = json.loads(answer["outputs"][0]["data"][0])
    return first


FORMS = {
    "raw": Form("image/jpeg", lambda images: images[0]),
    "json": Form("application/json", _json),
    "multipart": Form(_MULTIPART, _multipart, _first),
    "multipart-32": Form(_MULTIPART, _multipart, _first, images=32),
    "open-inference": Form("application/json", _open_inference, _from_open_inference),
    "triton": Form(
        "application/octet-stream", _triton, _from_open_inference,
        {"Inference-Header-Content-Length": str(_TRITON_HEADER_BYTES)},
    ),
}  # fmt: skip
