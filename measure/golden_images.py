"""The golden images of a run: which held-out images travel in the archive, and as which bytes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from archive.run_folder import RunFolder
from dataset.decoding import open_image
from dataset.labelled_images import Dataset, LabelledImages
from handler import golden, variants
from handler.decoding import decode
from handler.errors import RequestError
from handler.settings import HandlerSettings
from measure import evaluation

COUNT = 16
_LEAST_SURE = 6
"""Of them: an answer near a half moves with what another precision adds, one near 1 hides it."""
_MOST_BYTES = 1 << 18
"""Of one image: all of them travel in every archive, and `ready --golden` sends them to a server."""


def write(
    folder: RunFolder,
    settings: HandlerSettings,
    data: Dataset,
    probabilities: torch.Tensor,
    answered: Callable[[Sequence[bytes]], torch.Tensor] | None = None,
) -> str:
    """A few held-out images and what the exported model gives for them: of many classes, then the least sure ones.

    Args:
        probabilities: float32[N,K] of all held-out images.
        answered: gives the answers, float32[M,K] for M encoded images, in place of the exported model.

    Returns:
        The file name of the first.
    """
    seen: Counter[int] = Counter()
    turns = []  # the first image of every class before the second of any
    for index, label in enumerate(data.test.labels.tolist()):
        turns.append((seen[label], index))
        seen[label] += 1
    of_classes = [index for _, index in sorted(turns)[: COUNT - _LEAST_SURE]]
    by_confidence = probabilities.max(1).values.argsort(stable=True).tolist()
    least_sure = [index for index in by_confidence if index not in of_classes][:_LEAST_SURE]
    chosen = of_classes + least_sure
    sent = [sendable(data.test.encoded[index], settings) for index in chosen]
    names = [f"{number:02}{suffix}" for number, (suffix, _) in enumerate(sent)]
    images = LabelledImages(names, [image for _, image in sent], data.test.labels[chosen])
    answers = (
        evaluation.predict(variants.load(folder.exact, variants.tells_nearness(folder.exact)), images, settings)
        if answered is None
        else answered(images.encoded)
    )
    golden.write(folder.golden, list(zip(names, images.encoded, strict=True)), answers, data.class_names)
    return names[0]


def sendable(data: bytes, settings: HandlerSettings) -> tuple[str, bytes]:
    """A file's suffix and bytes: the image itself, or smaller, so that the archive stays small and a server takes it.

    The suffix is that of what the image is: a user's file name may hold what no archive or locale takes.
    """
    try:
        decode(data, settings)
        small = len(data) <= _MOST_BYTES
    except RequestError:
        small = False
    if not small:
        image = open_image(data, settings)
        scale = min(1, 2 * settings.resize_size / min(image.size))  # as a JPEG of a photograph is decoded
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": ".jpg", "TIFF": ".tif"}.get(str(image.format), f".{image.format}".lower()), data
