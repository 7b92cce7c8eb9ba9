"""One HTTP request of a batch: which images it holds, what it asks for, and how its answer is put together.

| request | answer |
|---|---|
| an encoded image, raw or as the one file of a form | `{label: probability}`, the best first |
| a form with several files | a list of these, with an error object in the place of a refused image |
| KServe v1: `{"instances": [{"b64": "..."}]}` | `{"predictions": [...]}`, the same list |
| Open Inference v2: `{"inputs": [{"datatype": "BYTES" or "UINT8", ...}]}` | `{"outputs": [label, probability]}` |
| any of these with one image, under `/explanations` | `handler.explanation` as JSON, or a PNG for `Accept: image/png` |

With `serving.accept` in the recipe the header `x-accepted` says `true` or `false` of each image (`handler.acceptance`).
KServe's forms say it in the body as well: v1 in `accepted` beside `predictions`, v2 in a third output of that name.

Beside a file or a raw body, only `top_k` is read of a form's text and a URL's parameters
(`handler.fields`). What a request asks for follows from its own headers and fields alone.
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

from handler import kserve, runtime
from handler.arrival import UNKNOWN, Arrival
from handler.budget import Budget
from handler.decoding import decode
from handler.errors import InternalError, InvalidRequest, RequestError, UnsupportedImage
from handler.fields import RAW_BODY, TOP_K_FIELD
from handler.identity import Identity
from handler.settings import HandlerSettings

logger = logging.getLogger(__name__)

# TorchServe makes fields of a query string for /invocations and /models/NAME/invoke, and drops it for /predictions.
TOP_K_HEADER = "x-top-k"
# TorchServe ends a worker whose answer is longer than max_response_size, by default 6,553,500 bytes.
_MOST_BYTES = 6_500_000
_MOST_DIGITS = 9
_MOST_BLANKS = 1000
# Set by TorchServe for /explanations/NAME and /v1/models/NAME:explain, and for a description of the model.
_EXPLAIN_HEADER, _DESCRIBE_HEADER = "explain", "describe"

Image = torch.Tensor | RequestError
Prediction = dict[str, float]
"""Class name → probability for one image, the best first."""


@dataclass(frozen=True)
class Answer:
    """What goes back for one request."""

    body: bytes
    content_type: str = "application/json"
    refusal: RequestError | None = None
    """Why the whole request is refused, if it is: the answer's status."""
    errors: Sequence[RequestError] = ()
    """Every refusal in the body: of the whole request, or of single images."""
    accepted: Sequence[bool | None] = ()
    """Of each image, None where it is refused; nothing where the recipe has no `serving.accept`."""
    arrival: Arrival = UNKNOWN
    """Of the request."""


@dataclass(frozen=True)
class Request:
    """The images of one request, each decoded to uint8[C,H,W] or refused."""

    images: list[Image]
    top_k: int
    protocol: str = "image"
    """`image`, `form` (several files), `v1` or `v2`."""
    refusal: RequestError | None = None
    """Why the whole request is refused, if it is."""
    request_id: str | None = None
    """Open Inference v2 gives it back."""
    by_grpc: bool = False
    wants: Literal["prediction", "explanation", "description"] = "prediction"
    as_png: bool = False
    """The client asks for a picture of the explanation."""
    arrival: Arrival = UNKNOWN
    encoded: Sequence[Any] = ()
    """The images as they came, for `handler.capture`; nothing where none are kept."""

    @classmethod
    def read(
        cls,
        fields: Mapping[str, Any],
        headers: Mapping[str, Any],
        settings: HandlerSettings,
        arrival: Arrival = UNKNOWN,
        refusal: RequestError | None = None,
    ) -> Request:
        """Read a request as TorchServe hands it over: a value for each field of a form, or the field `body`.

        Args:
            headers: with their names in lower case.
            refusal: why it is not to be computed, if it is not.
        """
        # TorchServe adds the content type of each field, as a dict.
        by_grpc = not any(isinstance(value, str) for value in headers.values())
        if headers.get(_DESCRIBE_HEADER) == "True":
            return cls([], settings.top_k, wants="description", arrival=arrival)
        protocol = "image"
        try:
            if refusal is not None:
                raise refusal
            document = _json_document(fields, headers)
            if isinstance(document, dict) and "inputs" in document and "instances" not in document:
                protocol = "v2"
            request = replace(cls._read(fields, document, headers, settings), by_grpc=by_grpc, arrival=arrival)
        except RequestError as error:
            request = cls([error], settings.top_k, protocol, error, by_grpc=by_grpc, arrival=arrival)
        except Exception:  # a mistake of ours must not cost the other requests of the batch their answers
            logger.exception("A request could not be read")
            failure = InternalError("the request could not be read: see the worker's log")
            request = cls([failure], settings.top_k, protocol, failure, by_grpc=by_grpc, arrival=arrival)
        if headers.get(_EXPLAIN_HEADER) != "True" or request.refusal is not None:
            return request
        if len(request.images) != 1:
            too_many = InvalidRequest(f"one image can be explained in a request, found {len(request.images)}")
            return replace(request, refusal=too_many)
        return replace(request, wants="explanation", as_png="image/png" in str(headers.get("accept")))

    @classmethod
    def _read(
        cls, fields: Mapping[str, Any], document: Any, headers: Mapping[str, Any], settings: HandlerSettings
    ) -> Request:
        """The images; `document` is the JSON, if it is that, and `headers` have their names in lower case."""
        top_k = _top_k(fields, headers, settings)
        if document is not None:
            return _read_json(document, top_k, settings)
        encoded = [value for name, value in fields.items() if name != TOP_K_FIELD] or [b""]
        images = _decode_all(encoded, settings)
        kept = _kept(encoded, settings)
        if len(images) > 1:
            return cls(images, top_k, "form", encoded=kept)
        if isinstance(images[0], UnsupportedImage) and "json" in str(headers.get("content-type")).lower():
            raise InvalidRequest("the body is neither valid JSON nor an image")
        return cls(images, top_k, refusal=_first_refusal(images), encoded=kept)

    def without_explanation(self) -> Request:
        """The same, refused where an explanation is asked for."""
        if self.wants != "explanation":
            return self
        none = InvalidRequest(
            "this model is served as ONNX, which has no gradients to explain by: ask for a prediction"
        )
        return replace(self, wants="prediction", refusal=none)

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """The images to classify; none where the whole request is refused."""
        if self.refusal is not None:
            return []
        return [image for image in self.images if isinstance(image, torch.Tensor)]

    def answer(
        self, predictions: Sequence[Prediction], identity: Identity, accepted: Sequence[bool] | None = None
    ) -> Answer:
        """The refusal, or the predictions for `tensors` in the request's protocol.

        An answer that is longer than TorchServe can send becomes a refusal.

        Args:
            accepted: of each of `tensors`; None where nothing is marked.
        """
        if self.refusal is not None:
            return self._refused(self.refusal, identity)
        marks = self._marks(accepted)
        body = json.dumps(self._document(predictions, identity, marks)).encode()
        if len(body) > _MOST_BYTES:
            too_long = InvalidRequest(f"the answer has {len(body)} bytes, too many: ask for fewer images or classes")
            return self._refused(too_long, identity)
        errors = [image for image in self.images if isinstance(image, RequestError)]
        return Answer(body, errors=errors, accepted=marks, arrival=self.arrival)

    def _marks(self, accepted: Sequence[bool] | None) -> list[bool | None]:
        """A mark for each image; nothing where nothing is marked."""
        if accepted is None:
            return []
        remaining = iter(accepted)
        return [next(remaining) if isinstance(image, torch.Tensor) else None for image in self.images]

    def _refused(self, refusal: RequestError, identity: Identity) -> Answer:
        is_v2 = self.protocol == "v2"
        body = kserve.v2_refusal(refusal, identity, self.request_id) if is_v2 else refusal.encode()
        return Answer(body, refusal=refusal, errors=[refusal], arrival=self.arrival)

    def _document(self, predictions: Sequence[Prediction], identity: Identity, marks: Sequence[bool | None]) -> Any:
        remaining = iter(predictions)
        entries: list[Any] = []
        for image in self.images:
            if isinstance(image, RequestError):
                entries.append(image.document())
            else:
                best = next(remaining)
                entries.append(best if len(best) <= self.top_k else dict(islice(best.items(), self.top_k)))
        if self.protocol == "v1":
            return {"predictions": entries, **({"accepted": marks} if marks else {})}
        if self.protocol == "v2":
            return kserve.v2_response(entries, identity, self.request_id, marks)
        return entries if self.protocol == "form" else entries[0]


def _top_k(fields: Mapping[str, Any], headers: Mapping[str, Any], settings: HandlerSettings) -> int:
    """From a form's field or the request's header, or else the settings."""
    value = fields.get(TOP_K_FIELD, headers.get(TOP_K_HEADER))
    if value is None:
        return settings.top_k
    text = bytes(value).decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise InvalidRequest(f"{TOP_K_FIELD}: expected a whole number from 1, found {text[:20]!r}")
    return int(text)


def _json_document(fields: Mapping[str, Any], headers: Mapping[str, Any]) -> Any:
    """What a JSON body holds: one that is sent as such, or that looks like it.

    Returns:
        None where the body is no JSON.

    Raises:
        InvalidRequest: JSON was sent as a form, which changes it, or has more lists and objects than any request.
    """
    if any(name.lstrip().startswith(("{", "[")) for name in fields):
        raise InvalidRequest("JSON was sent as a form: send it with the header Content-Type: application/json")
    body = fields.get(RAW_BODY)
    if fields.keys() - {RAW_BODY, TOP_K_FIELD}:  # the file of a form that is called so
        return None
    if not isinstance(body, (bytes, bytearray, str)):
        return body
    if kserve.BINARY_HEADER in headers and not isinstance(body, str):
        return kserve.v2_with_binary_data(bytes(body), str(headers[kserve.BINARY_HEADER]))
    is_json = str(headers.get("content-type")).lower().startswith("application/json")
    start = body[:_MOST_BLANKS] if isinstance(body, str) else body[:_MOST_BLANKS].decode(errors="replace")
    if not is_json and start.lstrip("\ufeff \t\r\n")[:1] not in ("{", "["):
        return None
    if isinstance(body, str):
        body = body.lstrip("\ufeff")
    kserve.check_pieces(body)
    try:
        with runtime.without_collecting():
            document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if is_json or (isinstance(document, dict) and document.keys() & {"instances", "inputs"}):
        return document
    raise InvalidRequest(
        'the body looks like JSON: send {"instances": [{"b64": "..."}]} or {"inputs": [...]} with the header '
        "Content-Type: application/json"
    )


def _read_json(document: Any, top_k: int, settings: HandlerSettings) -> Request:
    if isinstance(document, dict) and "instances" in document:
        values: Sequence[Any] = kserve.v1_images(document, settings)
        images = _decode_all(values, settings)
        refusal = _first_refusal(images) if len(images) == 1 else None
        return Request(images, top_k, "v1", refusal, encoded=_kept(values, settings))
    if isinstance(document, dict) and "inputs" in document:
        request_id = kserve.v2_id(document)
        values = ()
        try:
            values = kserve.v2_images(document, settings)
            images = _decode_all(values, settings)
        except RequestError as error:
            images = [error]
        return Request(images, top_k, "v2", _first_refusal(images), request_id, encoded=_kept(values, settings))
    raise InvalidRequest('JSON must be {"instances": [{"b64": "..."}]} (KServe v1) or {"inputs": [...]} (v2)')


def _kept(encoded: Sequence[Any], settings: HandlerSettings) -> Sequence[Any]:
    """Nothing, unless requests are captured: it would stay in memory until its batch is answered."""
    return encoded if settings.capture.folder is not None else ()


def _first_refusal(images: list[Image]) -> RequestError | None:
    return next((image for image in images if isinstance(image, RequestError)), None)


def _decode_all(values: Sequence[Any], settings: HandlerSettings) -> list[Image]:
    kserve.check_count(len(values), settings)
    budget = Budget(settings)
    return [_decode(value, settings, budget) for value in values]


def _decode(value: Any, settings: HandlerSettings, budget: Budget) -> Image:
    try:
        if isinstance(value, (torch.Tensor, RequestError)):
            return value
        if isinstance(value, str):  # TorchServe decodes text/* bodies
            value = value.encode(errors="replace")
        if not isinstance(value, (bytes, bytearray)):
            raise InvalidRequest(f"expected an encoded image, found {type(value).__name__}")
        return decode(value, settings, budget)
    except RequestError as refusal:
        return refusal
