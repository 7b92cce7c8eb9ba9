"""A network as far as its last linear layer, and the features that it gives for images, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.feature_cache import FeatureCache
from dataset.labelled_images import LabelledImages
from handler.settings import HandlerSettings, PixelSettings
from networks.errors import ModelError
from networks.models import Classifier
from system import progress

CACHE = ".features"
"""Folder beside the runs."""
_KEPT_TOGETHER = 256
"""Images whose features are lost at most when the computation is interrupted."""
_PACKAGES = ("torch", "torchvision", "timm", "pillow")
"""Another version may decode or compute otherwise."""


class Backbone:
    """All but the last layer of a classifier, frozen.

    Args:
        classifier: ends in a linear layer, the head; used in place.
        average_mirror: features are the mean of those of an image and of its mirror image, as such a model serves.

    Raises:
        ModelError: something else than a linear layer gives the logits.
    """

    def __init__(self, classifier: Classifier, side: int, average_mirror: bool) -> None:
        self.classifier, self.average_mirror = classifier.eval(), average_mirror
        self.head = _last_linear(classifier, side)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Compute there within, in the memory format that convolutions prefer; afterwards all is as before."""
        self.classifier.to(device).to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            self.classifier.cpu().to(memory_format=torch.contiguous_format)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[N,C,H,W] → float32[N,D] on the CPU."""
        pixels = images.to(self.head.weight.device).float().contiguous(memory_format=torch.channels_last)
        views = [pixels, pixels.flip(3)] if self.average_mirror else [pixels]
        inputs: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            with torch.inference_mode():
                for view in views:
                    self.classifier(view)
        finally:
            hook.remove()
        return torch.stack(inputs).mean(0).float().cpu()

    def of_images(
        self,
        images: LabelledImages,
        settings: HandlerSettings,
        cache: Path,
        batch_size: int,
        each_batch: Callable[[int, int], None] = lambda done, of: None,
    ) -> tuple[torch.Tensor, int]:
        """The features float32[N,D] of encoded `images`, and how many of them had to be computed.

        Args:
            settings: by which they are decoded, as the exported model gets them.
            cache: where the features of all networks are kept, by content.
            batch_size: images that the network gets at once.
            each_batch: called with the images done and to do; what it raises ends the computation.

        Raises:
            ModelError: a feature is no number.
        """
        store = FeatureCache(cache / self.digest(settings))
        digests = [hashlib.sha256(data).digest() for data in images.encoded]
        known, _ = store.read()
        missing = list({digest: index for index, digest in enumerate(digests) if digest not in known}.values())
        with progress.bar("{task.completed:.0f}/{task.total:.0f} images") as bar:
            task = bar.add_task("features", total=len(missing))
            for start in range(0, len(missing), _KEPT_TOGETHER):
                part = missing[start : start + _KEPT_TOGETHER]
                computed: list[torch.Tensor] = []
                try:
                    for first in range(0, len(part), batch_size):
                        batch = part[first : first + batch_size]
                        each_batch(start + first, len(missing))
                        computed += self.features(images.subset(batch).decode(settings))
                        bar.advance(task, len(batch))
                finally:
                    if computed:
                        keys = [digests[index] for index in part[: len(computed)]]
                        known |= zip(keys, computed, strict=True)
                        store.add(keys, torch.stack(computed))
        features = torch.stack([known[digest] for digest in digests])
        if not features.isfinite().all():
            raise ModelError("the network gives features that are no numbers: its weights are broken")
        return features, len(missing)

    def digest(self, settings: HandlerSettings) -> str:
        """SHA-256 of all that decides on the features of an image: weights, input settings, packages."""
        pixels = settings.model_dump_json(include=set(PixelSettings.model_fields))
        found = hashlib.sha256(f"{self.classifier.network} {pixels} {self.average_mirror}".encode())
        for package in _PACKAGES:
            found.update(f"{package} {_version(package)}".encode())
        head = {id(value) for value in self.head.state_dict(keep_vars=True).values()}
        for name, value in self.classifier.state_dict(keep_vars=True).items():
            if id(value) not in head:
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _last_linear(classifier: Classifier, side: int) -> nn.Linear:
    """The linear layer whose output is the logits, found by giving it another one."""
    last = list(classifier.parameters())[-1]
    head = next((part for part in classifier.modules() if isinstance(part, nn.Linear) and part.bias is last), None)
    if head is None:
        raise _no_head(classifier)
    mark = torch.randn(2, head.out_features, generator=torch.Generator().manual_seed(0))
    widths: list[int] = []

    def answer(_: nn.Module, inputs: Any, __: Any) -> torch.Tensor:
        widths.append(inputs[0].ndim)
        return mark

    hook = head.register_forward_hook(answer)
    try:
        with torch.inference_mode():
            logits = classifier(torch.zeros(2, classifier.mean.shape[1], side, side))
    finally:
        hook.remove()
    if widths != [2] or not torch.equal(logits, mark):
        raise _no_head(classifier)
    return head


def _no_head(classifier: Classifier) -> ModelError:
    ends = list(classifier.network.modules())[-1]
    return ModelError(
        f"training.freeze: the network must end in a linear layer, which is then fitted; this one ends in {ends}: "
        "choose another model.architecture, or leave training.freeze out"
    )
