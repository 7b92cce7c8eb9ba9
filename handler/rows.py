"""One HTTP request of a batch: which images it holds, what it asks for, and how its answer is put together.

| request | answer |
|---|---|
| an encoded image, raw or as the one file of a form | `{label: probability}`, the best first |
| a form with several files | a list of these, with an error object in the place of a refused image |
| KServe v1: `{"instances": [{"b64": "..."}]}` | `{"predictions": [...]}`, the same list |
| Open Inference v2: `{"inputs": [{"datatype": "BYTES" or "UINT8", ...}]}` | `{"outputs": [label, probability]}` |
| any of these with one image, under `/explanations` | `handler.explanation` as JSON, or a PNG for `Accept: image/png` |

Beside a file or a raw body, a form's text and a URL's parameters are no images (`handler.fields`); `top_k` is heard.
What each row asks for follows from its own headers and fields alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch

from handler import kserve
from handler.decoding import decode
from handler.errors import InternalError, InvalidRequest, RequestError, UnsupportedImage
from handler.identity import Identity
from handler.settings import HandlerSettings

logger = logging.getLogger(__name__)

# TorchServe makes fields of a query string for /invocations and /models/NAME/invoke, and drops it for /predictions.
TOP_K_HEADER = "x-top-k"
TOP_K_FIELD = "top_k"
# TorchServe ends a worker whose answer is longer than max_response_size, by default 6,553,500 bytes.
_MOST_BYTES = 6_500_000
_MOST_DIGITS = 9
# Set by TorchServe for /explanations/NAME and /v1/models/NAME:explain, and for a description of the model.
_EXPLAIN_HEADER, _DESCRIBE_HEADER = "explain", "describe"

Image = torch.Tensor | RequestError
Answer = dict[str, float]


@dataclass(frozen=True)
class Row:
    """The images of one request, each decoded to uint8[C,H,W] or refused."""

    images: list[Image]
    top_k: int
    protocol: str = "image"
    """`image`, `form` (several files), `v1` or `v2`."""
    refusal: RequestError | None = None
    """Why the whole request is refused, if it is."""
    request_id: str | None = None
    """Open Inference v2 gives it back."""
    wants: Literal["prediction", "explanation", "description"] = "prediction"
    as_png: bool = False
    """The client asks for a picture of the explanation."""

    @classmethod
    def read(cls, fields: Mapping[str, Any], headers: Mapping[str, Any], settings: HandlerSettings) -> Row:
        """Read a request as TorchServe hands it over: a value for each field of a form, or the field `body`."""
        asked = {name.lower(): value for name, value in headers.items()}
        if asked.get(_DESCRIBE_HEADER) == "True":
            return cls([], settings.top_k, wants="description")
        try:
            row = cls._read(fields, asked, settings)
        except Exception:  # the other rows of the batch shall not pay for a mistake of ours
            logger.exception("A row could not be read")
            failure = InternalError("the request could not be read: see the worker's log")
            row = cls([failure], settings.top_k, refusal=failure)
        if asked.get(_EXPLAIN_HEADER) != "True" or row.refusal is not None:
            return row
        if len(row.images) != 1:
            too_many = InvalidRequest(f"one image can be explained in a request, found {len(row.images)}")
            return replace(row, refusal=too_many)
        return replace(row, wants="explanation", as_png="image/png" in str(asked.get("accept")))

    @classmethod
    def _read(cls, fields: Mapping[str, Any], headers: Mapping[str, Any], settings: HandlerSettings) -> Row:
        """The images; `headers` by their names in lower case."""
        try:
            top_k = _top_k(fields, headers, settings)
            document = _json_body(fields)
            if document is not None:
                return _read_json(document, top_k, settings)
            bodies = [value for name, value in fields.items() if name != TOP_K_FIELD] or [b""]
            images = _decode_all(bodies, settings)
            if len(images) > 1:
                return cls(images, top_k, "form")
            if isinstance(images[0], UnsupportedImage) and "json" in str(headers.get("content-type")):
                raise InvalidRequest("the body is neither valid JSON nor an image")
            return cls(images, top_k, refusal=_first_refusal(images))
        except RequestError as refusal:
            return cls([refusal], settings.top_k, refusal=refusal)

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """The images to classify; none where the whole request is refused."""
        if self.refusal is not None:
            return []
        return [image for image in self.images if isinstance(image, torch.Tensor)]

    def body(self, answers: Sequence[Answer], identity: Identity) -> bytes:
        """The JSON body of a prediction or a refusal; `answers` are those of `tensors`, the best class first.

        Raises:
            InvalidRequest: it is longer than TorchServe can send.
        """
        if self.refusal is not None:
            return self.refusal.encode()
        body = self._body(answers, identity)
        if len(body) > _MOST_BYTES:
            raise InvalidRequest(f"the answer has {len(body)} bytes, too many: ask for fewer images or classes")
        return body

    def _body(self, answers: Sequence[Answer], identity: Identity) -> bytes:
        remaining = iter(answers)
        entries: list[Any] = []
        for image in self.images:
            if isinstance(image, RequestError):
                entries.append(image.body())
            else:
                answer = next(remaining)
                entries.append(answer if len(answer) <= self.top_k else dict(islice(answer.items(), self.top_k)))
        if self.protocol == "v1":
            document: Any = {"predictions": entries}
        elif self.protocol == "v2":
            document = kserve.v2_response(entries, identity, self.request_id)
        else:
            document = entries if self.protocol == "form" else entries[0]
        return json.dumps(document).encode()


def _top_k(fields: Mapping[str, Any], headers: Mapping[str, Any], settings: HandlerSettings) -> int:
    """From a form's field or the request's header, or else the settings."""
    value = fields.get(TOP_K_FIELD, headers.get(TOP_K_HEADER))
    if value is None:
        return settings.top_k
    text = bytes(value).decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise InvalidRequest(f"{TOP_K_FIELD}: expected a whole number from 1, found {text[:20]!r}")
    return int(text)


def _json_body(fields: Mapping[str, Any]) -> Any:
    """What TorchServe parsed from an `application/json` body; None for every other request."""
    body = fields.get("body")
    if isinstance(body, (dict, list, int, float)) and not isinstance(body, bool):
        return body
    return None


def _read_json(document: Any, top_k: int, settings: HandlerSettings) -> Row:
    if isinstance(document, dict) and "instances" in document:
        images = _decode_all(kserve.v1_images(document), settings)
        return Row(images, top_k, "v1", _first_refusal(images) if len(images) == 1 else None)
    if isinstance(document, dict) and "inputs" in document:
        images = _decode_all(kserve.v2_images(document, settings), settings)
        return Row(images, top_k, "v2", _first_refusal(images), kserve.v2_id(document))
    raise InvalidRequest('JSON must be {"instances": [{"b64": "..."}]} (KServe v1) or {"inputs": [...]} (v2)')


def _first_refusal(images: list[Image]) -> RequestError | None:
    return next((image for image in images if isinstance(image, RequestError)), None)


def _decode_all(values: Sequence[Any], settings: HandlerSettings) -> list[Image]:
    if len(values) > settings.max_images:
        raise InvalidRequest(f"{len(values)} images in one request are more than the {settings.max_images} allowed")
    return [_decode(value, settings) for value in values]


def _decode(value: Any, settings: HandlerSettings) -> Image:
    try:
        if isinstance(value, (torch.Tensor, RequestError)):
            return value
        if isinstance(value, str):  # TorchServe decodes text/* bodies
            value = value.encode(errors="replace")
        if not isinstance(value, (bytes, bytearray)):
            raise InvalidRequest(f"expected an encoded image, found {type(value).__name__}")
        return decode(value, settings)
    except RequestError as refusal:
        return refusal
