"""What an adopted network takes and gives, and how its answers stand beside those of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console

from archive.run_folder import RunFolder
from dataset.labelled_images import Dataset
from measure import golden_images
from networks.errors import ModelError
from networks.export import ServedClassifier
from networks.models import Classifier
from system import figures
from system.errors import reason
from system.printable import printable
from train.adopt import stock
from train.adopt.source import Source
from train.recipe import RunRecipe

_ALMOST = 1e-3
_SAME = 1e-4
"""Of a probability, from the stock handler's."""
_COMPARED_IMAGES, _SHOWN = 64, 10


def check(classifier: Classifier, side: int, wants_logits: bool = True) -> int:
    """How many classes a network has that takes images of `side` pixels in batches of any size and gives logits.

    Raises:
        ModelError: it does not, with what to do.
    """
    channels, given, failed = classifier.mean.shape[1], {}, {}
    for count in (1, 2, 3):
        try:
            with torch.no_grad():
                given[count] = classifier(255 * torch.rand(count, channels, side, side))
        except Exception as error:  # every network has errors of its own
            failed[count] = reason(error)
    if not given:
        if _takes_channels_last(classifier, side):
            raise ModelError(
                f"the network takes images of {side}×{side}×{channels}, channels last: wrap it in a module that begins "
                "with images.permute(0, 2, 3, 1)"
            )
        raise ModelError(
            f"the network cannot take images of {channels}×{side}×{side} ({failed[1]}): give the size that it is made "
            "for by --set input.crop_size=N, and --set input.channels=1 for grey"
        )
    for count, logits in given.items():
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            shown = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ModelError(
                f"the network gives {shown} for a batch of {count}, expected are logits [{count}, classes] of two "
                "classes or more: wrap it in a module that gives them"
            )
        if len(logits) != count:
            failed[count] = f"it gives {len(logits)} rows"
    if failed:
        taken = " or ".join(str(count) for count in given if count not in failed)
        raise ModelError(
            f"the network takes batches of {taken} and not of {min(failed)} ({failed[min(failed)]}): trace or export "
            "it again with a batch size that is left open"
        )
    rows = torch.cat(list(given.values()))
    if not rows.isfinite().all():
        raise ModelError("the network gives NaN or infinity for images of noise: its weights are damaged")
    if wants_logits and (rows >= 0).all() and (rows.sum(1) - 1).abs().max() < _ALMOST:
        raise ModelError(
            "the network gives probabilities where logits are expected: add --outputs probabilities, or take away its "
            "softmax"
        )
    return rows.shape[1]


def _takes_channels_last(classifier: Classifier, side: int) -> bool:
    try:
        with torch.no_grad():
            classifier.network(torch.rand(1, side, side, classifier.mean.shape[1]))
    except Exception:  # every network has errors of its own
        return False
    return True


def hint_at_colours(
    served: ServedClassifier, data: Dataset, recipe: RunRecipe, probabilities: torch.Tensor, console: Console
) -> None:
    """Say so where the network is surely better with red and blue exchanged, as OpenCV reads images."""
    if recipe.input.channels != 3:
        return
    indices = torch.linspace(0, len(data.test) - 1, min(_COMPARED_IMAGES, len(data.test))).long()
    some = data.test.subset(indices.tolist())
    with torch.inference_mode():
        exchanged = served(some.decode(recipe.handler).flip(1)).argmax(1)
    right, instead = (int((guess == some.labels).sum()) for guess in (probabilities[indices].argmax(1), exchanged))
    if figures.wilson(instead, len(some))["lower"] > figures.wilson(right, len(some))["upper"]:
        console.print(
            f"{instead} instead of {right} of {len(some)} images are right with red and blue exchanged: the network "
            "was trained on images as OpenCV reads them, so adopt it again with --channel-order bgr"
        )


def write_golden(
    folder: RunFolder,
    source: Source,
    data: Dataset,
    recipe: RunRecipe,
    probabilities: torch.Tensor,
    calibrated: bool,
    console: Console,
) -> str:
    """The golden images, with the answers of the deployment that the model is taken from where it has some.

    Returns:
        The file name of the first.

    Raises:
        ModelError: it answers every image otherwise.
    """
    if source.answers is None or calibrated:
        return golden_images.write(folder, recipe.handler, data, probabilities)
    compared = torch.linspace(0, len(data.test) - 1, min(_COMPARED_IMAGES, len(data.test))).long().tolist()
    alike, others = [], []
    for index in compared:
        encoded = data.test.encoded[index]
        [answer] = source.answers([encoded])
        if isinstance(answer, torch.Tensor) and _differ(answer, probabilities[index]) <= _SAME:
            alike.append(index)
        else:
            others.append({"file": data.test.names[index], "why": stock.why_other(encoded, answer)})
    source.about["other_answers"] = others
    for other in others[:_SHOWN]:
        console.print(printable(f"{other['file']}: {other['why']}"))
    if not alike:
        raise ModelError(
            f"the stock handler answers none of {len(compared)} images as the adopted model does: give photographs in "
            "RGB, and leave the section input as the stock handler has it"
        )
    console.print(f"{len(alike)} of {len(compared)} images get the stock handler's answer within {_SAME:g}")

    def answered(images: Sequence[bytes]) -> torch.Tensor:
        assert source.answers is not None
        return torch.stack([answer for answer in source.answers(images) if isinstance(answer, torch.Tensor)])

    chosen = replace(data, test=data.test.subset(alike))
    return golden_images.write(folder, recipe.handler, chosen, probabilities[alike], answered)


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
