"""The `handler:` section of `model-config.yaml`: one schema, written by training and read by the worker.

Unknown keys, missing keys and wrong types are errors that name the key and what was expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Literal

from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from handler.formats import FORMATS


class SettingsError(ValueError):
    """The settings cannot be used; the message lists every key that is wrong."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PixelSettings(_Section):
    """How encoded images become the pixels that the model was trained on: the section `input` of a recipe."""

    channels: Literal[1, 3]
    """1 for grey, 3 for RGB; images of the other kind are converted."""
    resize_size: int = Field(gt=0)
    """Length of the shorter side after resizing, in pixels."""
    crop_size: int = Field(gt=0)
    """Side of the square cut from the centre: height and width of the model's input, in pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Both are antialiased, as Pillow does it."""
    resize_mode: Literal["fused", "torchvision", "squash"] = "fused"
    """`fused`: the centre is resized in one step, and a large JPEG is decoded smaller, which is the fastest.
    `torchvision`: the very pixels of its `Resize(resize_size)` and `CenterCrop(crop_size)`. `squash`: those of
    `Resize((crop_size, crop_size))`, which keeps no proportions."""
    background: str = "white"
    """What shows through transparent pixels: a colour as CSS names it, such as "black" or "#808080"."""

    @model_validator(mode="after")
    def _crop_fits(self) -> PixelSettings:
        if self.crop_size > self.resize_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than resize_size {self.resize_size}")
        return self

    @field_validator("background")
    @classmethod
    def _background_is_a_colour(cls, background: str) -> str:
        ImageColor.getrgb(background)
        return background


class AcceptSettings(_Section):
    """Which answers are marked as accepted; without any key none is marked."""

    error_rate: float | None = Field(default=None, gt=0, lt=1)
    """Largest share of the accepted answers that may be wrong, such as 0.02. Images that the model was not trained on
    choose the threshold of the probability."""
    known: float | None = Field(default=None, gt=0, lt=1)
    """Share of images of the model's own classes to accept, such as 0.95; of images of no class fewer are accepted."""
    known_by: Literal["nearness", "probability"] = "nearness"
    """What decides `known`: nearness to the training images, or the probability of the best class. `--unknown` measures
    which is better. For nearness, train with `known` set, or with `data.unknown`."""

    @property
    def is_on(self) -> bool:
        return self.error_rate is not None or self.known is not None

    @property
    def needs_nearness(self) -> bool:
        return self.known is not None and self.known_by == "nearness"


class CaptureSettings(_Section):
    """Which requests are kept with their answers, to be labelled; by default none."""

    folder: str | None = None
    """Where; an absolute path. Whoever may read it sees what clients send."""
    share: float = Field(default=0.0, ge=0, le=1)
    """Share of all images, drawn at random."""
    unsure: bool = False
    """Also every image that `accept` does not accept or, without it, whose best class has a probability below 0.5."""
    max_mb: float = Field(default=1000.0, gt=0)
    """Size at which nothing more is kept."""

    @model_validator(mode="after")
    def _has_a_folder(self) -> CaptureSettings:
        if self.folder is None and (self.share or self.unsure):
            raise ValueError("capture: share and unsure need a folder to keep images in: set capture.folder")
        if self.folder is not None and not self.folder.startswith("/"):
            raise ValueError(f"capture.folder: expected an absolute path, found {self.folder!r}")
        return self


class AnswerSettings(_Section):
    """What a worker accepts, computes with and answers: a part of the section `serving` of a recipe."""

    top_k: int = Field(default=5, gt=0)
    """How many classes an answer names; fewer where the model has fewer."""
    formats: list[str] | None = None
    """Accepted formats: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF (HEIC); null: all."""
    max_pixels: int = Field(default=25_000_000, gt=0, le=178_956_970)  # Pillow warns above it
    """Most pixels decoded for one request, all its images together. A JPEG counts by the size at which it is decoded,
    costly formats count more (`handler.budget`). 25 megapixels take about a second and 300 MB."""
    max_aspect: float = Field(default=20.0, ge=1)
    """Largest ratio of the longer to the shorter side. A longer image is refused, since a resize of its shorter side to
    `resize_size` could need unbounded memory."""
    max_images: int = Field(default=64, gt=0)
    """Most images in one request; the requests that share its batch wait for all of them."""
    max_wait_s: float = Field(default=10.0, gt=0)
    """Longest wait since the edge (nginx before the servers) passed the request on (X-Request-Start). A later request
    gets 504 and is not computed, and so does one whose answer would come later than its client waits
    (X-Envoy-Expected-Rq-Timeout-Ms). Without X-Request-Start neither is checked."""
    log_slower_s: float | None = Field(default=0.5, ge=0)
    """Requests slower than this leave a line in requests.log with the time of each stage (`python -m operate slow`); 0:
    all, null: none."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "onnxruntime", "openvino"] = "auto"
    """Variant (form of the model) that workers serve. `auto`: fp32, or another one that is at least 1.15 times as fast
    on the machine and whose answers to the golden images are within its tolerance."""
    accept: AcceptSettings = AcceptSettings()
    capture: CaptureSettings = CaptureSettings()
    threads: int | None = Field(default=None, gt=0)
    """Threads of a worker, at most one for each core. null: its share of the cores if that makes a slow model (over 10
    ms for four images) at least 1.15 times as fast, otherwise one."""
    decode_time_s: float = Field(default=1.0, gt=0)
    """Processor time for decoding one request; images after it are refused."""
    explanation_time_s: float = Field(default=2.0, gt=0)
    """Time for all explanations of a batch; less time means fewer steps. It must be shorter than the response
    timeout."""

    @model_validator(mode="after")
    def _variant_tells_nearness(self) -> AnswerSettings:
        if self.accept.needs_nearness and self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(
                f"accept.known_by: precision {self.precision} tells no nearness: set auto, or known_by: probability"
            )
        return self

    @field_validator("formats")
    @classmethod
    def _formats_are_decoded(cls, formats: list[str] | None) -> list[str] | None:
        if formats is not None and (not formats or set(formats) - set(FORMATS)):
            raise ValueError(f"use some of {', '.join(FORMATS)}, as this machine decodes them, or null")
        return formats

    def check_time(self, response_timeout_s: float, source: str) -> None:
        """Raises:
        SettingsError: TorchServe would end the worker before its images are decoded, or its explanations are due.
        """
        for key in ("decode_time_s", "explanation_time_s"):
            if not getattr(self, key) < response_timeout_s:
                raise SettingsError(
                    f"{source}: {key} {getattr(self, key):g} does not fit into the response timeout of "
                    f"{response_timeout_s:g} s"
                )


class HandlerSettings(AnswerSettings, PixelSettings):
    """The whole section: all that the worker reads of `model-config.yaml`."""

    @classmethod
    def parse(cls, section: Any, source: str) -> HandlerSettings:
        """Check `section`, the parsed YAML found in `source`.

        Raises:
            SettingsError: naming `source` and every wrong key.
        """
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            raise SettingsError(f"{source}: {describe_errors(error, cls)}") from None


def describe_errors(error: ValidationError, schema: type[BaseModel]) -> str:
    """Every wrong key of a schema in one line: where it is, what was expected, what was found."""
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
        if problem["type"] == "extra_forbidden":
            meant = _meant(schema, [str(part) for part in problem["loc"]])
            found += f"; did you mean {' or '.join(meant)}?" if meant else ""
            found += f"; the keys are {', '.join(_section(schema, problem['loc'][:-1]).model_fields)}"
        said = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{key}: {said[0].lower()}{said[1:]}{found}")
    return "; ".join(problems)


def _meant(schema: type[BaseModel], wrong: list[str]) -> list[str]:
    """The keys that somebody may have meant: those of the same name in other sections, or else of a similar one."""
    known = list(keys(schema))
    if same := [key for key in known if key.split(".")[-1] == wrong[-1]]:
        return same
    beside = [key for key in known if key.split(".")[:-1] == wrong[:-1]]
    for among in (beside, known):
        close = get_close_matches(wrong[-1], [key.split(".")[-1] for key in among], n=1, cutoff=0.7)
        if close:
            return [key for key in among if key.split(".")[-1] == close[0]]
    return []


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a schema, those of sections with their section's before them: `training.epochs`."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def _section(schema: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel]:
    """The schema of the section at `path`."""
    for key in path:
        annotation = schema.model_fields[str(key)].annotation
        assert isinstance(annotation, type)
        schema = annotation
    return schema
