"""TorchServe's own classifier for small grey images, changed as its MNIST example changes it."""

from __future__ import annotations

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class GreyClassifier(ImageClassifier):  # type: ignore[misc]  # torchserve ships no types
    image_processing = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.305], [0.325]),
        ]
    )
