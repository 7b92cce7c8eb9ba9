"""The golden check: a few encoded images and the answers that training measured for them travel in the archive.

A worker answers them through its own decoding and model before it takes a request, and refuses to load where an
answer has moved. The check is the worker's warm-up as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

GOLDEN_FILE = "golden.json"
# Another processor or thread count moves fp32 probabilities by about 1e-6; changed weights, labels, resizing or
# channel order move them by far more.
TOLERANCE = 1e-3


class GoldenMismatch(RuntimeError):
    """An answer differs from the one that training measured; the message names image, class and difference."""


def write(
    folder: Path, images: Sequence[tuple[str, bytes]], probabilities: torch.Tensor, class_names: Sequence[str]
) -> None:
    """Store encoded images and their answers.

    Args:
        folder: created if need be.
        images: file name and encoded bytes of each image.
        probabilities: float32[N,K], as the exported fp32 model gave them.
        class_names: the K names, in the order of the model's outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images:
        (folder / name).write_bytes(data)
    answers = {name: row.tolist() for (name, _), row in zip(images, probabilities, strict=True)}
    document = {"tolerance": TOLERANCE, "class_names": list(class_names), "probabilities": answers}
    (folder / GOLDEN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def check(
    folder: Path, predict: Callable[[Sequence[bytes]], torch.Tensor], class_names: Sequence[str]
) -> tuple[int, float]:
    """Answer the golden images with `predict` (encoded images → float[N,K]) and compare.

    Returns:
        How many images were answered, and the largest difference of a probability.

    Raises:
        GoldenMismatch: a label or a probability is not what training measured, or there is nothing to compare with.
    """
    try:
        document = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        expected: dict[str, list[float]] = document["probabilities"]
        golden_names: list[str] = document["class_names"]
        tolerance: float = document["tolerance"]
        images = [(folder / name).read_bytes() for name in expected]
    except (OSError, ValueError, KeyError) as error:
        raise GoldenMismatch(f"the golden answers cannot be read: {error!r}") from error
    if golden_names != list(class_names):
        raise GoldenMismatch(f"labels are {list(class_names)}, but training measured {golden_names}")
    if not images:
        raise GoldenMismatch(f"{folder / GOLDEN_FILE} lists no image")
    answered = predict(images).float().cpu()
    wanted = torch.tensor(list(expected.values()))
    if answered.shape != wanted.shape:
        raise GoldenMismatch(f"the model answers {list(answered.shape)}, training measured {list(wanted.shape)}")
    differences = (answered - wanted).abs()
    worst = float(differences.max())
    if not worst <= tolerance:  # also true for NaN
        image, label = divmod(int(differences.nan_to_num(torch.inf).argmax()), len(golden_names))
        raise GoldenMismatch(
            f"{list(expected)[image]}, class {golden_names[label]!r}: {answered[image, label]:.6f} instead of "
            f"{wanted[image, label]:.6f}, tolerance {tolerance:g}"
        )
    return len(images), worst
