"""One HTTP request of a batch: which images it holds, and how its answer is put together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from handler.decoding import decode
from handler.errors import InvalidRequest, RequestError
from handler.settings import HandlerSettings


@dataclass(frozen=True)
class Row:
    """The images of one request, each decoded to uint8[C,H,W] or refused."""

    images: list[torch.Tensor | RequestError]
    as_list: bool
    """Several images were sent, so the answer is a list with refusals in their own places."""

    @classmethod
    def read(cls, fields: Mapping[str, Any], settings: HandlerSettings) -> Row:
        """Decode a request as TorchServe hands it over: one value for each field, whatever the fields are called."""
        images = [_decode(value, settings) for value in fields.values()] or [_decode(b"", settings)]
        return cls(images, as_list=len(images) > 1)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [image for image in self.images if isinstance(image, torch.Tensor)]

    @property
    def refusal(self) -> RequestError | None:
        """Why the whole request is refused, if it is."""
        first = self.images[0]
        return first if isinstance(first, RequestError) and not self.as_list else None

    def body(self, answers: Iterator[dict[str, float]]) -> bytes:
        """The JSON body; takes one of `answers` for each of `tensors`, in order."""
        entries = [image.body() if isinstance(image, RequestError) else next(answers) for image in self.images]
        return json.dumps(entries if self.as_list else entries[0]).encode()


def _decode(value: Any, settings: HandlerSettings) -> torch.Tensor | RequestError:
    try:
        if isinstance(value, str):  # TorchServe decodes text/* bodies
            value = value.encode()
        if not isinstance(value, (bytes, bytearray)):
            raise InvalidRequest("the request holds JSON where an encoded image was expected")
        return decode(value, settings)
    except RequestError as refusal:
        return refusal
