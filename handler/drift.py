"""How far a worker's answers have moved from those that training measured: the population stability index.

Training writes `reference.json` from the exported model's answers for the held-out images. A model without that file
has no drift figures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from handler.files import LABELS_FILE
from handler.settings import describe_errors

CONFIDENCE_BINS = 10


class InvalidReference(ValueError):
    """`reference.json` cannot be compared with; the message names the file and what is wrong in it."""


class Reference(BaseModel):
    """What the exported model answered for the held-out images."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    images: int = Field(gt=0)
    confidence: list[NonNegativeInt] = Field(min_length=CONFIDENCE_BINS, max_length=CONFIDENCE_BINS)
    """Images in each of ten equal intervals, from 0 to 1, of the best class's probability."""
    classes: dict[str, NonNegativeInt]
    """Class name → how many images it was the best class of."""

    @model_validator(mode="after")
    def _every_image_counts_once(self) -> Reference:
        if not sum(self.confidence) == sum(self.classes.values()) == self.images:
            raise ValueError(
                f"confidence counts {sum(self.confidence)} and classes count {sum(self.classes.values())} "
                f"of {self.images} images"
            )
        return self

    @classmethod
    def measure(cls, probabilities: torch.Tensor, class_names: Sequence[str]) -> Reference:
        """From float32[N,K] with N > 0, the answers for the held-out images."""
        confidence, best = probabilities.max(1)
        counts = Counter(best.tolist())
        return cls(
            images=len(probabilities),
            confidence=confidence_counts(confidence.numpy()),
            classes={name: counts[index] for index, name in enumerate(class_names)},
        )

    @classmethod
    def read(cls, path: Path, class_names: Sequence[str]) -> Reference | None:
        """What training wrote to `path`; None where there is no such file.

        Raises:
            InvalidReference: it is damaged, or counts other classes than `class_names`.
        """
        try:
            reference = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise InvalidReference(f"{path.name}: {describe_errors(error, cls)}") from None
        except (OSError, ValueError) as error:
            raise InvalidReference(f"{path.name} cannot be read: {error}") from error
        if differing := reference.classes.keys() ^ set(class_names):
            raise InvalidReference(f"{path.name} and {LABELS_FILE} differ in the classes {sorted(differing)}")
        return reference


def confidence_counts(confidence: npt.NDArray[np.floating]) -> list[int]:
    """float[N] in 0..1 → how many lie in each of ten equal intervals; 1 belongs to the last, NaN to the first."""
    bins = (np.nan_to_num(confidence) * CONFIDENCE_BINS).astype(int).clip(0, CONFIDENCE_BINS - 1)
    return [int(count) for count in np.bincount(bins, minlength=CONFIDENCE_BINS)]


def population_stability_index(expected: Sequence[int], actual: Sequence[int]) -> float:
    """Σ (a - e) · ln(a / e) over the bins' shares; 0 where both are alike (Yurdakul and Naranjo 2020).

    Half an answer is added to every bin, so that an empty one weighs as much as the number of answers warrants.

    Args:
        expected: counts that training measured.
        actual: counts of now, of the same bins.
    """
    e, a = (np.asarray(counts) + 0.5 for counts in (expected, actual))
    e, a = e / e.sum(), a / a.sum()
    return float(((a - e) * np.log(a / e)).sum())
