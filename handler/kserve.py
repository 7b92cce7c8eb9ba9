"""The JSON of KServe's protocols: v1 (`instances`) and v2, the Open Inference Protocol (`inputs`).

Images travel as base64. v2 takes decoded pixels as well: a UINT8 tensor of the model's own input shape.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from handler.errors import InvalidRequest, RequestError
from handler.identity import Identity
from handler.settings import HandlerSettings

# The first is KServe's for bytes, the others are what TorchServe's image_classifier reads.
_KEYS = ("b64", "data", "body")


def v1_images(document: Mapping[str, Any]) -> list[bytes | RequestError]:
    """The encoded images of `{"instances": [{"b64": "..."}, ...]}`.

    `data` and `body` are taken as well as `b64`, and plain base64 strings.

    Raises:
        InvalidRequest: there is no list of instances. One bad instance is an error in its own place.
    """
    instances = document["instances"]
    if not isinstance(instances, list) or not instances:
        raise InvalidRequest('"instances" must be a list of at least one {"b64": "..."}')
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
    if not isinstance(data, list) or not data:
        raise InvalidRequest('"inputs[0].data" must be a list with something in it')
    if datatype == "BYTES":
        return [_from_base64(value) for value in _flat(data)]
    if datatype == "UINT8":
        return _pixels(data, shape, settings)
    raise InvalidRequest(f'"inputs[0].datatype" must be "BYTES" or "UINT8", found {datatype!r}')


def v2_id(document: Mapping[str, Any]) -> str | None:
    """The request's own identifier, which the answer repeats."""
    identifier = document.get("id")
    return identifier if isinstance(identifier, str) else None


def v2_response(answers: Sequence[Mapping[str, float]], identity: Identity, request_id: str | None) -> dict[str, Any]:
    """Labels and probabilities as two tensors of shape [images, classes named]."""
    shape = [len(answers), len(answers[0])]
    labels = [label for answer in answers for label in answer]
    probabilities = [probability for answer in answers for probability in answer.values()]
    response: dict[str, Any] = {
        "model_name": identity.name,
        "model_version": identity.version,
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": shape, "data": labels},
            {"name": "probability", "datatype": "FP32", "shape": shape, "data": probabilities},
        ],
    }
    return {"id": request_id, **response} if request_id is not None else response


def _encoded(instance: Any) -> Any:
    """What should be base64."""
    if not isinstance(instance, dict):
        return instance
    return next((instance[key] for key in _KEYS if key in instance), None)


def _from_base64(value: Any) -> bytes | RequestError:
    if not isinstance(value, str):
        return InvalidRequest(f"expected a base64 string, found {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidRequest(f"not base64: {error}")


def _flat(data: list[Any]) -> list[Any]:
    """`[[a], [b]]` and `[a, b]` alike: BYTES come with shape [n] or [n, 1]."""
    return [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]


def _pixels(data: list[Any], shape: Any, settings: HandlerSettings) -> list[torch.Tensor]:
    wanted = [settings.channels, settings.crop_size, settings.crop_size]
    if not isinstance(shape, list) or any(type(size) is not int for size in shape) or shape[1:] != wanted:
        raise InvalidRequest(f'"inputs[0].shape" must be {["N", *wanted]}, found {shape}')
    try:
        pixels = np.asarray(data).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f'"inputs[0].data" does not have the shape {shape}: {error}') from None
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise InvalidRequest('"inputs[0].data" must be whole numbers from 0 to 255')
    return list(torch.from_numpy(pixels.astype(np.uint8)))
