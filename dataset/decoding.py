"""Decoding of your own images: as it is served, without the limits that a request has."""

from __future__ import annotations

import torch
from PIL import Image

from handler import decoding
from handler.budget import Budget
from handler.settings import HandlerSettings


class _Unlimited(Budget):
    """Takes whatever it costs: the images are one's own, and a phone's may have 200 megapixels."""

    def check_time(self) -> None:
        pass

    def spend(self, image: Image.Image, full: tuple[int, int], data: bytes, colours: float = 0) -> None:
        pass

    def check_webp(self, data: bytes) -> None:
        pass


def decode(data: bytes, settings: HandlerSettings) -> torch.Tensor:
    """`handler.decoding.decode` of an image of any size.

    Raises:
        RequestError: it cannot be decoded.
    """
    return decoding.decode(data, settings, _Unlimited(settings))


def open_image(data: bytes, settings: HandlerSettings) -> Image.Image:
    """`handler.decoding.open_image` of an image of any size.

    Raises:
        RequestError: it cannot be decoded.
    """
    return decoding.open_image(data, settings, _Unlimited(settings))
