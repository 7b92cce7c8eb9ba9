"""The `handler:` section of `model-config.yaml`: one schema, written by training and read by the worker.

Unknown keys, missing keys and wrong types are errors that name the key and what was expected.
"""

from __future__ import annotations

from typing import Any, Literal

from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

TORCHSERVES_TIMEOUT_S = 120
"""What TorchServe waits for a batch where `model-config.yaml` has no `responseTimeout`."""


class SettingsError(ValueError):
    """The settings cannot be used; the message lists every key that is wrong."""


class HandlerSettings(BaseModel):
    """How encoded images become model input, and how probabilities become an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    channels: Literal[1, 3]
    """1 for grey, 3 for RGB; images of the other kind are converted."""
    resize_size: int = Field(gt=0)
    """Length of the shorter side after resizing, in pixels."""
    crop_size: int = Field(gt=0)
    """Side of the square cut from the centre: height and width of the model's input, in pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Both are antialiased, as Pillow does it."""
    top_k: int = Field(default=5, gt=0)
    """How many classes an answer names; fewer where the model has fewer."""
    max_pixels: int = Field(default=50_000_000, gt=0, le=178_956_970)  # above it Pillow refuses by itself
    """Larger images are refused from their header. 50 megapixels hold any phone's photograph."""
    max_aspect: float = Field(default=20.0, ge=1)
    """Longer side over shorter side; above it a resize to `resize_size` would need unbounded memory."""
    max_images: int = Field(default=64, gt=0)
    """Most images in one request; the rows that share its batch wait for all of them."""
    background: str = "white"
    """What shows through transparent pixels: a colour as CSS names it, such as "black" or "#808080"."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "onnxruntime", "onnxruntime-int8", "openvino"] = "auto"
    """Which variant of the model is served; `auto` takes the fastest on the machine that passes the golden check."""
    threads: int | None = Field(default=None, gt=0)
    """Threads of a worker, and at most one for each core; null is its share of the cores, or one where several are no
    faster."""
    explanation_time_s: float = Field(default=2.0, gt=0)
    """About how long a worker may spend on the explanations of one batch, which share it; less time means fewer steps.
    It must be shorter than the response timeout, after which TorchServe ends the worker."""

    @model_validator(mode="after")
    def _crop_fits(self) -> HandlerSettings:
        if self.crop_size > self.resize_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than resize_size {self.resize_size}")
        return self

    @field_validator("background")
    @classmethod
    def _background_is_a_colour(cls, background: str) -> str:
        ImageColor.getrgb(background)
        return background

    def check_time(self, response_timeout_s: float, source: str) -> None:
        """Raises:
        SettingsError: TorchServe would end the worker before its explanations are due.
        """
        if not self.explanation_time_s < response_timeout_s:
            raise SettingsError(
                f"{source}: explanation_time_s {self.explanation_time_s:g} does not fit into the response timeout of "
                f"{response_timeout_s:g} s"
            )

    @classmethod
    def parse(cls, section: Any, source: str) -> HandlerSettings:
        """Check `section`, the parsed YAML found in `source`.

        Raises:
            SettingsError: naming `source` and every wrong key.
        """
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            raise SettingsError(f"{source}: {describe_errors(error)}") from None


def describe_errors(error: ValidationError) -> str:
    """Every wrong key of a schema in one line: where it is, what was expected, what was found."""
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
        problems.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}{found}")
    return "; ".join(problems)
