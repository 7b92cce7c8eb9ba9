"""The section `data` of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class DataSection(BaseModel):
    """Which images, and how they are split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Literal["digits", "mnist", "cifar10", "folder"]
    """A data set that is downloaded or comes with scikit-learn, or `folder`: your images, a folder for each class."""
    root: str | None = None
    """Where the data lies, or is downloaded to; `--data` sets it. A folder of images, or a table with their labels
    (`.csv`, `.tsv`, `.parquet`), makes the data set `folder`, and drops the thresholds for accuracy and calibration
    of a recipe for another data set."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training images that are set aside to choose the temperature, the thresholds of `serving.accept`
    and, with `keep: best`, the epoch; 0: none."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share held out to measure, unless the data has a split of its own."""
    folds: int = Field(default=0, ge=0)
    """Cross-validation with so many folds, for few images: for each fold a model is trained on the others and measured
    on it, and the served model is trained on all images. 0: off. `--folds` sets it."""
    group: str | None = None
    """A regular expression such as `^(patient\\d+)_`: images with the same text of its group in their file names (or
    else paths below the class) stay on one side of a split."""
    unknown: str | None = None
    """A folder of images of no class, to measure how many are accepted; `--unknown` sets it. The model then computes
    nearness to its training images."""
    near_copy_correlation: float = Field(default=0.98, gt=0, le=1)
    """Images whose thumbnails correlate above it are copies and stay on one side of a split; 1: exact copies only."""
    max_unreadable_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Largest share of files that cannot be decoded; they are skipped. Above it training fails."""

    @field_validator("group")
    @classmethod
    def _group_is_an_expression(cls, group: str | None) -> str | None:
        try:
            groups = re.compile(group or "").groups
        except re.error as error:
            raise ValueError(f"{group!r} is no regular expression: {error}") from None
        if groups > 1:
            raise ValueError(
                f"{group!r} has {groups} groups, and one tells what belongs together: write others as (?:...)"
            )
        return group
