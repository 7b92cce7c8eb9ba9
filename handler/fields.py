"""The fields of one request that count, under names of their own: its images, and `top_k`.

A parameter is what an engine made of a form's part, of a URL's parameter or of the raw body:
`{"name": ..., "value": ..., "contentType": ...}`. A file has a content type; text has none.
"""

from __future__ import annotations

from typing import Any

RAW_BODY = "body"
"""TorchServe's name for the one field of a request that is no form."""
TOP_K_FIELD = "top_k"

Parameters = list[dict[str, Any]]


def chosen(parameters: Parameters) -> Parameters:
    """Of several, every image of the request, each under a name of its own, and `top_k`."""
    return _with_unique_names(_images(parameters)) if len(parameters) > 1 else parameters


def _images(parameters: Parameters) -> Parameters:
    """Files, the raw body and `top_k`; where there is neither file nor body, as from gRPC, all that was sent."""
    images = [each for each in parameters if each["contentType"] or each["name"] in (RAW_BODY, TOP_K_FIELD)]
    return images if any(each["name"] != TOP_K_FIELD for each in images) else parameters


def _with_unique_names(parameters: Parameters) -> Parameters:
    """Append its position to a name that came before; of `top_k` the last value counts."""
    seen: set[str] = set()
    for position, parameter in enumerate(parameters):
        while parameter["name"] in seen:
            parameter["name"] += f" {position}"
        if parameter["name"] != TOP_K_FIELD:
            seen.add(parameter["name"])
    return parameters
