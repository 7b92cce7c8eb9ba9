"""Labelled images, kept as encoded bytes: what a client would send is what training and evaluation decode."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from handler.decoding import decode
from handler.settings import HandlerSettings
from train.recipe import DataSection


@dataclass(frozen=True)
class LabelledImages:
    """Encoded images with their labels."""

    names: Sequence[str]
    """A file name for each image."""
    encoded: Sequence[bytes]
    labels: torch.Tensor
    """int64[N], indices into the class names."""

    def __len__(self) -> int:
        return len(self.encoded)

    def decode(self, settings: HandlerSettings) -> torch.Tensor:
        """uint8[N,C,H,W], by the decoding that serves."""
        return torch.stack([decode(data, settings) for data in self.encoded])

    def subset(self, indices: Sequence[int]) -> LabelledImages:
        """The images at `indices`, in that order."""
        chosen = torch.as_tensor(indices)
        return LabelledImages([self.names[i] for i in indices], [self.encoded[i] for i in indices], self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """A data set, split."""

    class_names: Sequence[str]
    train: LabelledImages
    test: LabelledImages

    def fingerprint(self) -> str:
        """SHA-256 over every encoded image and label, splits in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for data, label in zip(split.encoded, split.labels.tolist(), strict=True):
                digest.update(hashlib.sha256(data).digest() + label.to_bytes(4, "big"))
        return digest.hexdigest()


def load(data: DataSection, seed: int) -> Dataset:
    """The data set that a recipe names, split by `seed` where it has no splits of its own."""
    return _LOADERS[data.dataset](data, seed)


def _digits(data: DataSection, seed: int) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn: 8×8 pixels in 0..16, white on black."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = LabelledImages(
        [f"digit-{index:04d}.png" for index in range(len(pixels))],
        [_encode_png(image) for image in pixels],
        torch.from_numpy(digits.target).long(),
    )
    train, test = train_test_split(
        range(len(images)), test_size=data.test_fraction, stratify=digits.target, random_state=seed
    )
    return Dataset([str(name) for name in digits.target_names], images.subset(train), images.subset(test))


def _encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


_LOADERS = {"digits": _digits}
