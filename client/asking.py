"""The commands that send images: `predict` and `explain`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client import bulk
from client.bulk import Outcome
from client.command_line import AsJson, Model, complain, reports_errors, server_of
from client.errors import RequestRefused
from client.inputs import STANDARD_INPUT, Source, expand
from client.results import Results
from client.torchserve import TorchServe

Paths = Annotated[list[str], typer.Argument(help="Files, folders, patterns, or - for one image on standard input.")]


@reports_errors
def predict(
    context: typer.Context,
    model: Model,
    paths: Paths,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="How many images are asked for at a time.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl|FILE.csv", help="Write rows there; images that have one are skipped."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each image.")] = False,
) -> None:
    """Classify images. Exits 1 if any of them could not be classified, after the others."""
    server = server_of(context, connections=concurrency)
    sources = expand(paths)
    if output is None:
        failed = sum(_show(outcome, as_json) for outcome in _ask(server, model, sources, concurrency))
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
        print(f"skipped {skipped} images that have a row in {results.path}", file=sys.stderr)
    for outcome in _ask(server, results.model, missing, concurrency):
        results.write(outcome)
        if outcome.error is not None:
            failed += 1
            complain(f"{outcome.name}: {outcome.error}")
    print(f"{results.path}: {len(results.done)} rows, {failed} of them errors")
    return failed


def _ask(server: TorchServe, model: str, sources: Sequence[Source], concurrency: int) -> Iterator[Outcome]:
    """Outcomes in the order of `sources`, with a progress bar where someone is looking."""
    with closing(bulk.predict(server, model, sources, concurrency)) as outcomes, _progress() as progress:
        task = progress.add_task(model, total=len(sources), visible=len(sources) > 1)
        for outcome in outcomes:
            yield outcome
            progress.advance(task)


@contextmanager
def _progress() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Rows that go into a pipe must not take the way over the terminal.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as progress:
        yield progress


def _show(outcome: Outcome, as_json: bool) -> bool:
    """Print an outcome; returns whether it is an error."""
    if outcome.prediction is None:
        complain(f"{outcome.name}: {outcome.error}")
    elif as_json:
        print(json.dumps({"file": outcome.name, "prediction": outcome.prediction}))
    else:
        best = ", ".join(f"{name} {probability:.4f}" for name, probability in outcome.prediction.items())
        print(f"{outcome.name}: {best}")
    return outcome.prediction is None


@reports_errors
def explain(
    context: typer.Context,
    model: Model,
    paths: Paths,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Show what in each image spoke for its class: a picture of each, or numbers. Exits 1 if any failed."""
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
        _write(target, picture)
        print(f"wrote {target}")
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


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(content)
    partial.replace(target)
