"""The commands that send images: `predict` and `explain`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from client import bulk
from client.bulk import Outcome
from client.command_line import Model, server_of
from client.errors import RequestRefused
from client.inputs import STANDARD_INPUT, Source, expand
from client.results import Results
from client.torchserve import TorchServe
from system import files, progress
from system.command_line import AsJson, complain, reports_errors
from system.printable import counted, printable

Paths = Annotated[list[str], typer.Argument(help="Files, folders, patterns, or - for one image on standard input.")]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="How many images are sent at a time.")]


@reports_errors
def predict(
    context: typer.Context,
    model: Model,
    paths: Paths,
    concurrency: Concurrency = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl|FILE.csv", help="Write a row for each image; images that have a row are skipped."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each image.")] = False,
) -> None:
    """Classify images. Exits 1 if any image failed."""
    server = server_of(context, connections=concurrency)
    sources = expand(paths)
    if output is None:
        failed = sum(_show(outcome, as_json) for outcome in ask(server, model, sources, concurrency))
    else:
        with closing(Results(output, model)) as results:
            failed = _fill(results, server, sources, concurrency)
    if failed:
        raise typer.Exit(1)


def _fill(results: Results, server: TorchServe, sources: Sequence[Source], concurrency: int) -> int:
    """Write the rows that are missing; returns how many rows of the file are errors."""
    missing = [source for source in sources if source.name not in results]
    skipped, failed = len(sources) - len(missing), results.failed
    if skipped:
        print(f"skipped {counted(skipped, 'image')} with a row in {results.path}", file=sys.stderr)
    for outcome in ask(server, results.model, missing, concurrency):
        results.write(outcome)
        if outcome.error is not None:
            failed += 1
            complain(f"{outcome.name}: {outcome.error}")
    print(f"{results.path}: {counted(len(results.done), 'row')}, {counted(failed, 'error')}")
    return failed


def ask(server: TorchServe, model: str, sources: Sequence[Source], concurrency: int) -> Iterator[Outcome]:
    """Outcomes in the order of `sources`, with a progress bar where someone is looking."""
    with closing(bulk.predict(server, model, sources, concurrency)) as outcomes, progress.bar() as bar:
        task = bar.add_task(model, total=len(sources), visible=len(sources) > 1)
        for outcome in outcomes:
            yield outcome
            bar.advance(task)


def _show(outcome: Outcome, as_json: bool) -> bool:
    """Print an outcome; returns whether it is an error."""
    if outcome.prediction is None:
        complain(f"{outcome.name}: {outcome.error}")
    elif as_json:
        mark = {} if outcome.accepted is None else {"accepted": outcome.accepted}
        print(json.dumps({"file": outcome.name, "prediction": outcome.prediction, **mark}))
    else:
        best = ", ".join(f"{name} {probability:.4f}" for name, probability in outcome.prediction.items())
        print(printable(f"{outcome.name}: {best}" + (", not accepted" if outcome.accepted is False else "")))
    return outcome.prediction is None


@reports_errors
def explain(
    context: typer.Context,
    model: Model,
    paths: Paths,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Show which regions of each image support its class, as pictures or numbers. Exits 1 if any image failed."""
    server = server_of(context)
    failed = False
    taken: set[Path] = set()
    for source in expand(paths):
        try:
            image = source.read()
            if as_json:
                print(json.dumps({"file": source.name, "explanation": server.explain(model, image)}))
                continue
            picture = server.explain_as_png(model, image)
        except (RequestRefused, OSError) as error:
            failed = True
            complain(f"{source.name}: {(isinstance(error, OSError) and error.strerror) or error}")
            continue
        target = _free_name(output, source, taken)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write(target, picture)
        print(printable(f"wrote {target}"))
    if failed:
        raise typer.Exit(1)


def _free_name(folder: Path, source: Source, taken: set[Path]) -> Path:
    """`digit.png` → `digit-explained.png`, numbered where two images of this call have the same name."""
    stem = "stdin" if source.name == STANDARD_INPUT else Path(source.name).stem
    target, number = folder / f"{stem}-explained.png", 2
    while target in taken:
        target, number = folder / f"{stem}-explained-{number}.png", number + 1
    taken.add(target)
    return target
