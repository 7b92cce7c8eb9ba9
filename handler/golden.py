"""The golden check: a few encoded images and the answers that training measured for them travel in the archive.

A worker answers them through its own decoding and model before it takes a request, and refuses to load where an
answer has moved. The check is the worker's warm-up as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

GOLDEN_FILE = "golden.json"
# Another processor or thread count moves fp32 probabilities by about 1e-6; changed weights, labels, resizing or
# channel order move them by far more.
TOLERANCE = 1e-3


class _Document(TypedDict):
    tolerance: float
    class_names: list[str]
    probabilities: dict[str, list[float]]


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


def images(folder: Path) -> list[bytes]:
    """The encoded golden images, in the order of their answers.

    Raises:
        GoldenMismatch: they cannot be read, or there are none.
    """
    names = _read(folder)["probabilities"]
    if not names:
        raise GoldenMismatch(f"{folder / GOLDEN_FILE} lists no image")
    try:
        return [(folder / name).read_bytes() for name in names]
    except OSError as error:
        raise _unreadable(error) from error


def answers(folder: Path) -> torch.Tensor:
    """What training measured for `images`: float32[N,K].

    Raises:
        GoldenMismatch: it cannot be read.
    """
    return torch.tensor(list(_read(folder)["probabilities"].values()))


def check(folder: Path, answered: torch.Tensor, class_names: Sequence[str], tolerance: float | None = None) -> float:
    """Compare answers to the golden images with those that training measured.

    Args:
        answered: float[N,K] in the order of `images`.
        tolerance: largest difference of a probability that passes; None is the one that training wrote down.

    Returns:
        The largest difference of a probability.

    Raises:
        GoldenMismatch: a label or a probability is not what training measured, or there is nothing to compare with.
    """
    document = _read(folder)
    expected, golden_names = document["probabilities"], document["class_names"]
    tolerance = document["tolerance"] if tolerance is None else tolerance
    if golden_names != list(class_names):
        raise GoldenMismatch(f"labels are {list(class_names)}, but training measured {golden_names}")
    answered = answered.float().cpu()
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
    return worst


def _read(folder: Path) -> _Document:
    try:
        document: _Document = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        missing = _Document.__required_keys__ - document.keys()
        if missing:
            raise KeyError(*missing)
        return document
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> GoldenMismatch:
    return GoldenMismatch(f"the golden answers cannot be read: {error!r}")
