"""Which answers a worker marks as accepted: sure enough to be right, and of an image like those it was trained on.

Training writes `acceptance.json`: how sure the model was of images that it was not trained on, whether it was right,
and how near they lay to training images. The thresholds follow from that and from the recipe's `serving.accept`, so a
recipe may be changed without a new training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from handler.files import ACCEPTANCE_FILE
from handler.settings import AcceptSettings, SettingsError, describe_errors
from system.selective import choose, curve

if TYPE_CHECKING:
    import torch

_SHOWN = {True: "true", False: "false", None: "null"}
HEADER = "x-accepted"
"""Of an answer, beside those of `handler.identity`."""


class Scores(BaseModel):
    """How sure a model was of images that it was not trained on; `acceptance.json` holds those of validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    probability: list[float] = Field(min_length=1)
    """Of each answer's best class."""
    right: list[bool]
    nearness: list[float] | None = None
    """Of each image to the nearest training image, where the model tells it."""

    @model_validator(mode="after")
    def _are_of_the_same_images(self) -> Self:
        for values in (self.right, self.nearness):
            if values is not None and len(values) != len(self.probability):
                raise ValueError(f"{len(values)} values of {len(self.probability)} images")
        return self

    @classmethod
    def of(cls, answered: torch.Tensor, labels: torch.Tensor, classes: int) -> Self:
        """Of `answered`, float32[N,K] of probabilities or with nearness as a further column, for int64[N]."""
        best, guesses = answered[:, :classes].max(1)
        nearness = answered[:, classes].tolist() if answered.shape[1] > classes else None
        return cls(probability=best.tolist(), right=(guesses == labels).tolist(), nearness=nearness)

    def subset(self, indices: Sequence[int]) -> Self:
        """Those at `indices`, in that order."""
        kept = {name: [values[index] for index in indices] for name, values in self if values is not None}
        return self.model_copy(update=kept)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises:
        SettingsError: there is none, or it is damaged.
        """
        try:
            return cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise SettingsError(
                f"serving.accept: there is no {ACCEPTANCE_FILE}, since the run had no images to validate; train again "
                "with data.val_fraction above 0 or data.folds"
            ) from None
        except ValidationError as error:
            raise SettingsError(f"{file.name}: {describe_errors(error, cls)}") from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"{file.name} cannot be read: {error}") from error

    def choose(self, wanted: AcceptSettings) -> Acceptance:
        """The thresholds that keep what is wanted, on these answers, and accept the most of them.

        Raises:
            SettingsError: none does.
        """
        probability, nearness = -math.inf, None
        if wanted.error_rate is not None:
            point = choose(curve(self.probability, self.right), wanted.error_rate)
            if point is None:
                raise SettingsError(
                    f"serving.accept.error_rate {wanted.error_rate:g} cannot be reached: of {len(self.right)} images "
                    "that the network was not trained on, even the surest answers are wrong more often"
                )
            probability = point.threshold
        if wanted.known is not None and not wanted.needs_nearness:
            probability = max(probability, reached_by(self.probability, wanted.known))
        elif wanted.known is not None:
            if self.nearness is None:
                raise SettingsError(
                    "serving.accept.known: this model does not tell how near an image is to those it was trained on; "
                    "train again with the key set, or set known_by: probability"
                )
            nearness = reached_by(self.nearness, wanted.known)
        return Acceptance(probability, nearness)


def reached_by(scores: Sequence[float], share: float) -> float:
    """The highest value that this share of them reaches."""
    return sorted(scores, reverse=True)[math.ceil(share * len(scores)) - 1]


@dataclass(frozen=True)
class Acceptance:
    """An answer is accepted whose image and whose best class reach both thresholds."""

    probability: float
    nearness: float | None = None
    """None accepts every image."""

    def accepts(self, probability: float, nearness: float | None = None) -> bool:
        """NaN is never accepted."""
        is_near = self.nearness is None or (nearness is not None and nearness >= self.nearness)
        return probability >= self.probability and is_near

    def of(self, scores: Scores) -> list[bool]:
        """Whether each answer that the scores are of is accepted."""
        if scores.nearness is None:
            return list(map(self.accepts, scores.probability))
        return list(map(self.accepts, scores.probability, scores.nearness))

    def counts(self, scores: Scores) -> tuple[int, int]:
        """How many of these answers are accepted, and how many are not."""
        marks = self.of(scores)
        return marks.count(True), marks.count(False)

    def marks(self, answered: torch.Tensor, classes: int) -> list[bool]:
        """Whether each answer is accepted; `answered` and `classes` as `Scores.of` takes them."""
        table = answered.numpy()  # torch would wake its threads for this little
        best = table[:, :classes].max(1).tolist()
        nearness = table[:, classes].tolist() if self.nearness is not None else [None] * len(best)
        return list(map(self.accepts, best, nearness))


def shown(marks: Sequence[bool | None]) -> str:
    """What a header says of the images of a request, in order: `true`, `false`, and `null` for a refused image."""
    return ", ".join([_SHOWN[mark] for mark in marks])
