"""The golden check: a few encoded images and the answers that training measured for them travel in the archive.

A worker answers them through its own decoding and model before it takes a request, and refuses to load where an
answer has moved. The check is the worker's warm-up as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # readers of the answers do not need torch, which is slow to import
    import zipfile

    import torch

GOLDEN_FILE = "golden.json"
# Another processor or thread count moves fp32 probabilities by about 1e-6; changed weights, labels, resizing or
# channel order move them by far more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Golden:
    """What `golden.json` holds: the answers that training measured."""

    tolerance: float
    """Largest difference of a probability that passes."""
    class_names: list[str]
    """In the order of the model's outputs."""
    probabilities: dict[str, list[float]]
    """Image file → the probability of each class."""
    nearness: list[float] | None = None
    """Of each image to the nearest training image, where the model tells it."""


_PLAIN = re.compile(r"[^/\\\x00-\x1f\x7f-\x9f.][^/\\\x00-\x1f\x7f-\x9f]*")
"""Names that lead nowhere else."""


class GoldenMismatch(RuntimeError):
    """An answer differs from the one that training measured; the message names image, class and difference."""


def write(
    folder: Path, images: Sequence[tuple[str, bytes]], answered: torch.Tensor, class_names: Sequence[str]
) -> None:
    """Store encoded images and their answers.

    Args:
        folder: created if need be.
        images: file name and encoded bytes of each image.
        answered: float32[N,K] of probabilities, as the exported fp32 model gave them; nearness may follow.
        class_names: the K names, in the order of the model's outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images:
        (folder / name).write_bytes(data)
    classes = len(class_names)
    answers = {name: row[:classes].tolist() for (name, _), row in zip(images, answered, strict=True)}
    document = {"tolerance": TOLERANCE, "class_names": list(class_names), "probabilities": answers}
    if answered.shape[1] > classes:
        document["nearness"] = answered[:, classes].tolist()
    (folder / GOLDEN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(folder: Path | zipfile.Path) -> Golden:
    """The answers for the images of `folder`.

    Raises:
        GoldenMismatch: they cannot be read, or there are none.
    """
    try:
        document = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        names = [str(name) for name in document["class_names"]]
        answers = {
            str(image): [float(probability) for _, probability in zip(names, row, strict=True)]
            for image, row in document["probabilities"].items()
        }
        if outside := [image for image in answers if not _PLAIN.fullmatch(image)]:
            raise ValueError(f"{outside[0]!r:.100} is no name of a file beside {GOLDEN_FILE}")
        nearness = document.get("nearness")
        if nearness is not None:
            nearness = [float(value) for _, value in zip(answers, nearness, strict=True)]
        golden = Golden(float(document["tolerance"]), names, answers, nearness)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(error) from error
    if not answers:
        raise GoldenMismatch(f"{folder / GOLDEN_FILE} lists no image")
    return golden


def images(folder: Path | zipfile.Path) -> list[bytes]:
    """The encoded golden images, in the order of their answers.

    Raises:
        GoldenMismatch: they cannot be read, or there are none.
    """
    try:
        return [image(folder, name) for name in read(folder).probabilities]
    except (OSError, KeyError) as error:  # a KeyError where the folder is an archive's
        raise _unreadable(error) from error


def image(folder: Path | zipfile.Path, name: str) -> bytes:
    """One encoded golden image, which lies in the folder itself.

    Raises:
        OSError: it does not, or cannot be read.
    """
    file = folder / name
    if isinstance(file, Path) and (file.is_symlink() or not file.is_file()):
        raise OSError(f"{file} is no file of its own")
    return file.read_bytes()


def answers(folder: Path) -> torch.Tensor:
    """What training measured for `images`: float32[N,K].

    Raises:
        GoldenMismatch: it cannot be read.
    """
    import torch

    return torch.tensor(list(read(folder).probabilities.values()))


def check(folder: Path, answered: torch.Tensor, class_names: Sequence[str], tolerance: float | None = None) -> float:
    """Compare answers to the golden images with those that training measured.

    Args:
        answered: float[N,K] in the order of `images`; nearness may follow.
        tolerance: largest difference of a probability that passes; None is the one that training wrote down.

    Returns:
        The largest difference of a probability.

    Raises:
        GoldenMismatch: a label or a probability is not what training measured, or there is nothing to compare with.
    """
    import torch

    golden = read(folder)
    tolerance = golden.tolerance if tolerance is None else tolerance
    if golden.class_names != list(class_names):
        raise GoldenMismatch(f"labels are {list(class_names)}, but training measured {golden.class_names}")
    answered = answered.float().cpu()
    wanted, columns = torch.tensor(list(golden.probabilities.values())), list(golden.class_names)
    if golden.nearness is not None and answered.shape[1] == len(columns) + 1:
        wanted, columns = torch.cat([wanted, torch.tensor(golden.nearness)[:, None]], 1), [*columns, "nearness"]
    if answered.shape != wanted.shape:
        raise GoldenMismatch(f"the model answers {list(answered.shape)}, training measured {list(wanted.shape)}")
    differences = (answered - wanted).abs()
    worst = float(differences.max())
    if not worst <= tolerance:  # also true for NaN
        image, label = divmod(int(differences.nan_to_num(torch.inf).argmax()), len(columns))
        raise GoldenMismatch(
            f"{list(golden.probabilities)[image]}, class {columns[label]!r}: {answered[image, label]:.6f} "
            f"instead of {wanted[image, label]:.6f}, tolerance {tolerance:g}"
        )
    return worst


def _unreadable(error: Exception) -> GoldenMismatch:
    return GoldenMismatch(f"the golden answers cannot be read: {error!r}")
