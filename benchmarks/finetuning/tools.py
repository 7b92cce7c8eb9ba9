"""How each tool is started: a command that trains, whose time counts, and one that answers the held-out images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.finetuning.sets import ImageSet

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
PINS = {"fastai": ("fastai==2.8.12", "timm==1.0.31"), "timm": ("timm==1.0.31",)}
TIMM_TAG = "v1.0.28"
"""Of timm's repository, whose `train.py` is in no package."""
EPOCHS = 10
"""Of the others: one frozen and nine whole ones by fastai. The recipe has six."""
BATCH_SIZE = 32
"""Of all: the others' defaults of 64 and 128 would leave a handful of steps for so few images."""


@dataclass(frozen=True)
class Job:
    """One training: of which set, by which seed, and where its files go."""

    images: ImageSet
    seed: int
    data: Path
    weights: Path
    files: Path
    """A list of the images to answer."""
    classes: int
    folder: Path
    python: Path
    """Of the tool's environment."""
    timm_train: Path

    @property
    def answers(self) -> Path:
        """float32[N,K] of probabilities, as numpy saves it; a column with the nearness may follow."""
        return self.folder / "answers.npy"


Commands = tuple[Sequence[object], Sequence[object]]


def ours(job: Job) -> Commands:
    """The recipe as it is, with the nearness that tells strangers, and resized in the proportion of its own sizes."""
    side = job.images.side
    settings = (
        f"model.weights={job.weights}", f"input.crop_size={side}", f"input.resize_size={round(side / 0.875)}",
        f"training.seed={job.seed}", "serving.accept.known=0.95",
    )  # fmt: skip
    train = (job.python, "-m", "train", "finetune", "--data", job.data, "--runs", job.folder, "--name", "run")
    answer = (job.python, "-m", "benchmarks.finetuning.ours_tool", job.folder / "run", job.files, job.answers)
    return (*train, *(part for setting in settings for part in ("--set", setting))), answer


def timm(job: Job) -> Commands:
    """Its train.py, whose best epoch of the validation images is taken."""
    side = job.images.side
    train = (
        job.python, job.timm_train, "--data-dir", job.data, "--val-split", "val", "--model", "tf_efficientnet_lite0",
        "--pretrained", "--pretrained-path", job.weights, "--num-classes", job.classes,
        "--input-size", 3, side, side, "--device", "cpu", "--epochs", EPOCHS, "--batch-size", BATCH_SIZE,
        "--seed", job.seed, "--output", job.folder, "--experiment", "run",
    )  # fmt: skip
    best = job.folder / "run" / "model_best.pth.tar"
    return train, (job.python, _HERE / "timm_tool.py", best, job.classes, side, job.files, job.answers)


def fastai(job: Job) -> Commands:
    """`fine_tune` as its book has it."""
    script, learner = _HERE / "fastai_tool.py", job.folder / "learner.pkl"
    return (
        (
            job.python,
            script,
            "train",
            job.data,
            job.weights,
            learner,
            job.images.side,
            EPOCHS - 1,
            BATCH_SIZE,
            job.seed,
        ),
        (job.python, script, "answer", learner, job.files, job.answers),
    )


TOOLS: Mapping[str, Callable[[Job], Commands]] = {"ours": ours, "timm": timm, "fastai": fastai}


def python(environments: Path, tool: str) -> Path:
    """The Python that runs a tool."""
    return environments / tool / "bin" / "python" if tool in PINS else Path(sys.executable)
