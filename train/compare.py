"""Lay finished runs side by side: what they reached, and where their recipes differ.

    python -m train.compare runs/*
    python -m train.compare runs/* --page compare.html

The page also shows how long each model takes for one image on this machine.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from archive.errors import IncompleteRun
from archive.run_folder import RunFolder
from system import figures, files
from system.command_line import AsJson, reports_errors
from system.printable import printable
from train.errors import RunFolderError

_ROUNDS = 5
_SHOWN = {"acc1", "acc1_interval", "balanced_acc1", "worst_class", "ece"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Compared:
    """One run, as its own files have it."""

    run: str
    figures: Mapping[str, Any]
    data_sha256: str
    model_mb: float
    recipe: Mapping[str, Any]
    """Every key with its section, such as `training.epochs`."""
    image_ms: float | None = None
    """Time of the network for one image on this machine, where it was measured."""

    @classmethod
    def read(cls, run: Path, name: str) -> Compared:
        """Raises: IncompleteRun: naming the file that is missing or cannot be read."""
        folder = RunFolder(run)
        folder.require(RunFolder.recipe, folder.exact.name, RunFolder.metrics, RunFolder.provenance)
        size_mb = round(folder.exact.stat().st_size / 1e6, 3)
        measured = folder.read_figures()
        if not measured:
            raise IncompleteRun(
                f"{run} was adopted without labelled images, so it has no figures to compare: leave it out"
            )
        if missing := _SHOWN - measured.keys():
            raise IncompleteRun(f"{folder.metrics} lacks {', '.join(sorted(missing))}: train the run again")
        return cls(name, measured, folder.read_data_fingerprint(), size_mb, dict(_flat(folder.read_recipe())))


def differences(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """Each key of the recipes that is not the same in all runs, with its value in each; None where it is not there."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    values = {key: [run.recipe.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


@app.command(epilog="Example: python -m train.compare runs/*")
@reports_errors
def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write a page, with the time of each run for one image."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: accuracy with its interval, calibration and size, and where their recipes differ."""
    if page is not None and (page.suffix.lower() != ".html" or not page.parent.is_dir()):
        raise RunFolderError(f"--page {page}: name a file that ends in .html, in a folder that is there")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    compared = list(map(Compared.read, runs, names))
    if page is not None:
        compared = _timed(compared, runs)
        write_page(page, compared)
    if as_json:
        print(json.dumps({"runs": list(map(asdict, compared)), "differences": differences(compared)}, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(_results(compared))
    if different := differences(compared):
        console.print()
        console.print(_recipes(compared, different))
    if len({run.data_sha256 for run in compared}) > 1:
        print("\nnot all were measured on the same images: their data or their split differs")
    if page is not None:
        print(f"\nwrote {printable(page)}")


def _timed(compared: Sequence[Compared], runs: Sequence[Path]) -> list[Compared]:
    """The same with `image_ms`, by one thread: the median of rounds in which the models take turns."""
    import torch  # takes seconds, which only the page needs

    from archive import serving
    from dataset.decoding import decode
    from handler import variants
    from train.quantise.speed import images_per_s

    models = []
    for run in map(RunFolder, runs):
        run.require(RunFolder.golden)
        image = decode(run.read_golden_images()[0], serving.read(run.path).handler)
        models.append((variants.load(run.exact), image.unsqueeze(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another on a busy machine
    with torch.inference_mode():
        for predict, image in models * 3:  # TorchScript specialises itself in the first calls
            predict(image)
        rounds = [[1000 / images_per_s(predict, image) for predict, image in models] for _ in range(_ROUNDS)]
    torch.set_num_threads(threads)
    return [replace(run, image_ms=statistics.median(times)) for run, *times in zip(compared, *rounds, strict=True)]


def write_page(path: Path, compared: Sequence[Compared]) -> None:
    """One self-contained HTML file, the most accurate run first.

    Args:
        compared: with `image_ms`.
    """
    from measure.report import template

    ranked = sorted(compared, key=lambda run: -run.figures["acc1"])
    low = math.floor(10 * min(run.figures["acc1_interval"]["lower"] for run in ranked)) / 10
    page = template("compare.html.j2").render(
        runs=ranked,
        best={
            **{key: max(run.figures[key] for run in ranked) for key in ("acc1", "balanced_acc1")},
            "ece": min(run.figures["ece"] for run in ranked),
            **{key: min(getattr(run, key) for run in ranked) for key in ("image_ms", "model_mb")},
        },
        low=low,
        place=lambda share: round(100 * (share - low) / (1 - low), 2),
        differences=differences(ranked),
        other_images=len({run.data_sha256 for run in ranked}) > 1,
    )
    files.write(path, page.encode(errors="replace"))


def _flat(section: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in section.items():
        pairs += _flat(value, f"{above}{key}.") if isinstance(value, dict) else [(f"{above}{key}", value)]
    return pairs


def _results(runs: Sequence[Compared]) -> Table:
    """The most accurate first."""
    table = _table("run", "accuracy", "95% interval", "balanced", "worst class", "ECE", "model")
    for run in sorted(runs, key=lambda run: -run.figures["acc1"]):
        measured, worst = run.figures, run.figures["worst_class"]
        table.add_row(
            printable(run.run),
            f"{measured['acc1']:.2%}",
            figures.shown_interval(measured["acc1_interval"]).removeprefix("95% interval "),
            f"{measured['balanced_acc1']:.2%}",
            printable(f"{worst['acc1']:.1%} ({worst['name']})"),
            f"{measured['ece']:.2%}",
            f"{run.model_mb:.1f} MB",
        )
    return table


def _recipes(runs: Sequence[Compared], different: Mapping[str, Sequence[Any]]) -> Table:
    table = _table("recipe", *(printable(run.run) for run in runs))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"
    for key, values in different.items():
        table.add_row(key, *("–" if value is None else printable(value) for value in values))
    return table


def _table(*titles: str) -> Table:
    table = Table(*titles, box=None, pad_edge=False, header_style="dim")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    return table


if __name__ == "__main__":
    app(prog_name="python -m train.compare")
