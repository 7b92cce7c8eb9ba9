"""Mends what TorchServe makes of a request with several fields, before it does.

Its worker puts the fields of a request into a dict: of equal names, as `curl -F image=@a -F image=@b` sends them, the
last would stay alone. And text of a form and what stands behind the `?` of a URL come as files do, but for the content
type: the frontend gives every file one, and these none.
"""

from __future__ import annotations

from typing import Any

from ts.service import Service

from handler.rows import TOP_K_FIELD

_RAW_BODY = "body"


def mend() -> None:
    """Let this process's TorchServe see every image of a request, and nothing else in the place of one."""
    retrieve = Service.retrieve_data_for_inference

    def mended(batch: list[dict[str, Any]]) -> Any:
        for request in batch:
            if len(request["parameters"]) > 1:
                request["parameters"] = _told_apart(_images(request["parameters"]))
        return retrieve(batch)

    Service.retrieve_data_for_inference = staticmethod(mended)


def _images(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files, the raw body and `top_k`; where there is neither file nor body, as from gRPC, all that was sent."""
    images = [each for each in parameters if each["contentType"] or each["name"] in (_RAW_BODY, TOP_K_FIELD)]
    return images if any(each["name"] != TOP_K_FIELD for each in images) else parameters


def _told_apart(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names that came before get the number of their place, but for `top_k`, whose last value counts."""
    seen: set[str] = set()
    for place, parameter in enumerate(parameters):
        while parameter["name"] in seen:
            parameter["name"] += f" {place}"
        if parameter["name"] != TOP_K_FIELD:
            seen.add(parameter["name"])
    return parameters
