"""The JSON of KServe's protocols: v1 (`instances`) and v2, the Open Inference Protocol (`inputs`).

Images travel as base64, or in v2 behind the JSON as they are. v2 takes decoded pixels as well: a UINT8 tensor of the
model's own input shape.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any
from urllib.parse import unquote

import torch

from handler.errors import InvalidRequest, RequestError
from handler.identity import Identity
from handler.settings import HandlerSettings

# The first is KServe's for bytes, the others are what TorchServe's image_classifier reads.
_KEYS = ("b64", "data", "body")
_DATA_URL = re.compile(r"data:[^,]{0,300};\s*base64\s*,", re.IGNORECASE)
BINARY_HEADER = "inference-header-content-length"
"""How many bytes of a v2 request are JSON; its tensor lies behind them, as Triton's clients send it."""
_URL_ALPHABET = str.maketrans("-_", "+/")
_MOST_ID_CHARACTERS = 500
# Pixels of 64 images, nested by rows, are 43,000 lists.
_MOST_PIECES = 100_000


def v1_images(document: Mapping[str, Any], settings: HandlerSettings) -> list[bytes | RequestError]:
    """The encoded images of `{"instances": [{"b64": "..."}, ...]}`.

    `data` and `body` are taken as well as `b64`, the one key of an instance that holds such an object, and plain base64
    strings.

    Raises:
        InvalidRequest: there is no list of instances, or too many. One bad instance is an error in its own place.
    """
    instances = document["instances"]
    if not isinstance(instances, list) or not instances:
        raise InvalidRequest('"instances" must be a list of at least one {"b64": "..."}')
    check_count(len(instances), settings)
    return [_from_base64(_encoded(instance)) for instance in instances]


def v2_images(document: Mapping[str, Any], settings: HandlerSettings) -> Sequence[bytes | torch.Tensor | RequestError]:
    """The images of the one input of an Open Inference request.

    Returns:
        Encoded bytes for BYTES (base64 strings), uint8[C,H,W] for UINT8.

    Raises:
        InvalidRequest: the request is not of that form.
    """
    inputs = document["inputs"]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise InvalidRequest('"inputs" must be a list of one tensor')
    datatype, shape, data = (inputs[0].get(key) for key in ("datatype", "shape", "data"))
    if not isinstance(data, (list, bytes)) or not data:
        raise InvalidRequest(
            '"inputs[0].data" must be a list with something in it; over gRPC it is the field "contents", since '
            'TorchServe does not read "raw_input_contents"'
        )
    if datatype == "BYTES":
        images = _elements(data, settings) if isinstance(data, bytes) else _flat(data)
        check_count(len(images), settings)
        return [_from_base64(_encoded(image)) for image in images]
    if datatype == "UINT8":
        return _pixels(data, shape, settings)
    raise InvalidRequest(f'"inputs[0].datatype" must be "BYTES" or "UINT8", found {_shown(datatype)}')


def v2_with_binary_data(body: bytes, json_bytes: str) -> Any:
    """The JSON of a v2 request whose tensor lies behind it, with those bytes as its `data`.

    Raises:
        InvalidRequest: they cannot be told apart; the JSON has too many pieces or another number of tensors than one.
    """
    try:
        length = int(json_bytes)
        text, tensor = body[:length], body[length:]
        check_pieces(text)
        document = json.loads(text)
        [described] = document["inputs"]
        size = described["parameters"]["binary_data_size"]
        if size != len(tensor):
            raise ValueError(f"binary_data_size is {_shown(size)}, and {len(tensor)} bytes follow the JSON")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            f"{BINARY_HEADER}: expected the length of the JSON, which describes one input with "
            f'"parameters": {{"binary_data_size": ...}} ({type(error).__name__}: {error})'
        ) from None
    described["data"] = bytes(tensor)
    return document


def check_pieces(text: bytes | bytearray | str) -> None:
    """Call it before JSON is read: a list within another takes 60 times its text.

    Raises:
        InvalidRequest: it has more lists and objects than any request.
    """
    pieces = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if pieces > _MOST_PIECES:
        raise InvalidRequest(f"the JSON has more than {_MOST_PIECES} lists and objects")


def check_count(images: int, settings: HandlerSettings) -> None:
    """Raises:
    InvalidRequest: one request may not hold as many images.
    """
    if images > settings.max_images:
        raise InvalidRequest(f"{images} images in one request are more than the {settings.max_images} allowed")


def v2_id(document: Mapping[str, Any]) -> str | None:
    """The request's own identifier, which the answer repeats.

    Raises:
        InvalidRequest: it is so long that the answer could become longer than TorchServe can send.
    """
    identifier = document.get("id")
    if not isinstance(identifier, str):
        return None
    if len(identifier) > _MOST_ID_CHARACTERS:
        raise InvalidRequest(f'"id" has more than {_MOST_ID_CHARACTERS} characters')
    return identifier


def v2_response(
    predictions: Sequence[Mapping[str, float]],
    identity: Identity,
    request_id: str | None,
    accepted: Sequence[bool | None] = (),
) -> dict[str, Any]:
    """Labels and probabilities as two tensors of shape [images, classes named], and marks as one of shape [images]."""
    shape = [len(predictions), len(predictions[0])]
    labels = [label for prediction in predictions for label in prediction]
    probabilities = [probability for prediction in predictions for probability in prediction.values()]
    outputs = [
        {"name": "label", "datatype": "BYTES", "shape": shape, "data": labels},
        {"name": "probability", "datatype": "FP32", "shape": shape, "data": probabilities},
    ]
    if accepted:
        outputs.append({"name": "accepted", "datatype": "BOOL", "shape": [len(accepted)], "data": list(accepted)})
    response = {"model_name": identity.name, "model_version": identity.version, "outputs": outputs}
    return {"id": request_id, **response} if request_id is not None else response


def v2_refusal(refusal: RequestError, identity: Identity, request_id: str | None) -> bytes:
    """The error in TorchServe's shape, and what its gRPC reads of every answer.

    It ends the worker where one of these fields is missing, and passes on nothing else: the tensor `error` holds the
    message.
    """
    message = refusal.document()["message"]
    return refusal.encode(
        id=request_id or "",
        model_name=identity.name,
        model_version=identity.version,
        outputs=[{"name": "error", "datatype": "BYTES", "shape": [1], "data": [message]}],
    )


def _encoded(instance: Any) -> Any:
    """What should be base64."""
    if not isinstance(instance, dict):
        return instance
    found = _held(instance)
    if found is None:
        deeper = [held for value in instance.values() if isinstance(value, dict) and (held := _held(value)) is not None]
        found = deeper[0] if len(deeper) == 1 else None
    elif isinstance(found, dict):
        found = _held(found)
    if found is None:
        return InvalidRequest(f'an instance holds one image as {{"b64": "..."}}; {", ".join(_KEYS)} are read')
    return found


def _held(instance: Mapping[str, Any]) -> Any:
    return next((instance[key] for key in _KEYS if instance.get(key) is not None), None)


def _elements(data: bytes, settings: HandlerSettings) -> list[bytes]:
    """Those of a BYTES tensor in binary form: each after its length, four bytes with the lowest first."""
    elements, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or at + 4 > len(data):
            raise InvalidRequest("the binary data ends within an element: each is its length in four bytes, and itself")
        elements.append(data[at + 4 : end])
        check_count(len(elements), settings)
        at = end
    return elements


def _from_base64(value: Any) -> bytes | RequestError:
    """Line breaks, the alphabet of URLs, a missing padding and a `data:` URL are taken as well; bytes stay."""
    if isinstance(value, (RequestError, bytes)):
        return value
    if not isinstance(value, str):
        return InvalidRequest(f"expected a base64 string, found {type(value).__name__}")
    value = value.strip("\ufeff \t\r\n")
    if value[:5].lower() == "data:":
        prefix = _DATA_URL.match(value)
        if prefix is None:
            return InvalidRequest("expected data:image/...;base64,... or base64 alone")
        value = unquote(value[prefix.end() :])
    if value.startswith(("b'", 'b"')):
        return InvalidRequest("not base64, but how Python shows bytes: send base64.b64encode(image).decode()")
    value = "".join(value.split()).translate(_URL_ALPHABET).rstrip("=")
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidRequest(f"not base64: {error}")


def _flat(data: list[Any]) -> list[Any]:
    """`[[a], [b]]` and `[a, b]` alike: BYTES come with shape [n] or [n, 1]."""
    return [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]


def _pixels(data: list[Any] | bytes, shape: Any, settings: HandlerSettings) -> list[torch.Tensor]:
    wanted = [settings.channels, settings.crop_size, settings.crop_size]
    if (
        not isinstance(shape, list)
        or any(type(size) is not int for size in shape)
        or shape[1:] != wanted
        or shape[0] < 1
    ):
        raise InvalidRequest(f'"inputs[0].shape" must be {["N", *wanted]}, found {_shown(shape)}')
    check_count(shape[0], settings)
    try:
        if isinstance(data, list) and type(data[0]) is list:
            data = _unnested(data, shape)
        if len(data) != prod(shape):
            raise ValueError(f"{len(data)} numbers")
        if not isinstance(data, bytes) and set(map(type, data)) != {int}:  # a bool would pass for one
            raise TypeError
        values = bytearray(data)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(f'"inputs[0].data" must be {prod(shape)} whole numbers from 0 to 255') from None
    return list(torch.frombuffer(values, dtype=torch.uint8).reshape(shape))


def _unnested(data: list[Any], shape: list[int]) -> list[Any]:
    """The numbers of lists in lists, which must have exactly the shape."""
    level: list[Any] = [data]
    for size in shape:
        if any(type(each) is not list or len(each) != size for each in level):
            raise ValueError("another shape")
        level = list(chain.from_iterable(level))
    return level


def _shown(value: Any) -> str:
    """A value as a message names it: short, and lists in lists as their type alone."""
    simple = isinstance(value, list) and len(value) < 10 and not any(isinstance(each, (dict, list)) for each in value)
    return f"{value!r:.100}" if simple or not isinstance(value, (dict, list)) else type(value).__name__
