"""The commands that measure a server: `load` and `tune`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from client import interrupts, scaling
from client.command_line import AsJson, Model, complain, reports_errors, server_of
from client.errors import NotTunable
from client.inputs import expand
from client.torchserve import TorchServe
from client.tuning import layouts
from client.tuning import load as loading
from client.tuning.layouts import Layout
from client.tuning.load import LoadResult
from client.tuning.tune import Bench, Measured, Tuning, choose, default_layout, search

_HEADING = "workers  threads  batch  delay ms  clients  requests/s   p50 ms   p99 ms"
MODEL_STORE = Path("model_store")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@reports_errors
def load(
    context: typer.Context,
    model: Model,
    images: Annotated[
        list[str], typer.Option("--images", metavar="PATH", help="A file, folder or pattern; may be given again.")
    ],
    concurrency: Annotated[int, typer.Option(help=f"Connections, up to {loading.MAX_CONCURRENCY}.")] = 8,
    duration_s: Annotated[float, typer.Option("--duration", help=f"Seconds, up to {loading.MAX_DURATION_S:g}.")] = 10,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, whatever the server does; default: as it answers.")
    ] = None,
    deadline_s: Annotated[float, typer.Option("--deadline", help="Most seconds for an answer.")] = 10,
    yes_remote: Annotated[
        bool, typer.Option(help="Load a server on another machine: you have asked its owner.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send a model images for a while, and tell what became of them. Exits 1 if any request failed."""
    server = server_of(context)
    data = [source.read() for source in expand(images)]
    with _progress(model, duration_s) as watch:
        result = loading.load(server, model, data, concurrency, duration_s, rate, deadline_s, yes_remote, watch)
    if as_json:
        print(json.dumps(document(result)))
    else:
        _show(result)
    if result.failed:
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in result.counts.items())
        complain(f"{result.failed} of {result.requests} requests failed ({outcomes})")
        raise typer.Exit(1)


@reports_errors
def tune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME", help="A served model.")],
    p99_ms: Annotated[float, typer.Option(min=0, help="Most milliseconds for 99 of 100 requests.")],
    model_store: Annotated[Path, typer.Option(help="The server's own; copies of the archive go there.")] = MODEL_STORE,
    images: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Files, folders or patterns; default: the archive's own.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=60, help="Length of one measurement.")] = 2,
    most_layouts: Annotated[int, typer.Option("--layouts", min=1, max=100, help="Most layouts to try.")] = 12,
    run: Annotated[
        Path | None, typer.Option("--write", metavar="RUN", help="Put the choice into this run's model-config.yaml.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the workers, batch size, delay and threads with the most requests/s within a latency. Exits 1 if none does.

    The server must be on this machine, with nothing else to do, and let models be registered (enable_model_api=true).
    """
    interrupts.catch()  # what was registered must go then too
    if "/" in model:
        raise NotTunable(f"{model}: name the model alone; its default version is tuned")
    server, cores = server_of(context), scaling.cores()
    archive = layouts.find_archive(server, model, model_store)
    if run is not None:
        layouts.rewritten(layouts.read_config(run), Layout(1, 1, 1, 1), run / layouts.CONFIG_FILE)
    data = [source.read() for source in expand(images)] if images else layouts.golden_images(archive)
    layouts.clear(server, model, archive)
    bench = Bench(server, model, archive, data, p99_ms, seconds)
    if not as_json:
        print(_HEADING, flush=True)
    found = []
    for best in search(bench.climb, _most_workers(server, model, cores), cores, p99_ms, most_layouts):
        found.append(best)
        if not as_json:
            print(_row(best, cores, _remark(best, p99_ms)), flush=True)
    tuning = choose(found, bench.again, cores, p99_ms)
    if as_json:
        print(json.dumps(_tuning_document(tuning, found)))
    else:
        print(f"\n{_row(tuning.chosen, cores, 'chosen: the worst of three rounds')}\n{_gain(tuning, found, cores)}")
    if run is not None:
        layouts.write(run, tuning.chosen.layout)
        hint = f"scripts/archive.sh {run} --version, with a version higher than the served one, packs it"
        print(f"{run / layouts.CONFIG_FILE}: written; {hint}", file=sys.stderr if as_json else sys.stdout)


def _most_workers(server: TorchServe, model: str, cores: int) -> int:
    """That a layout may have, beside the workers that serve; says so where that is less than the cores."""
    room, reason = scaling.most_workers(server, model, beside=True)
    most_workers = max(1, room)
    if most_workers < cores:
        print(f"no layout has more than {most_workers} workers: {reason}", file=sys.stderr)
    return most_workers


def _row(best: Measured, cores: int, remark: str) -> str:
    layout = best.layout
    threads = "-" if best.threads is None else best.threads
    numbers = f"{layout.workers:7}  {threads:>7}  {layout.batch_size:5}  {layout.max_batch_delay_ms:8}"
    load = f"{best.clients:7}  {best.requests_per_s:10.1f}  {best.p50_ms:7.1f}  {best.p99_ms:7.1f}"
    remarks = [remark, "TorchServe's default" if layout == default_layout(cores) else ""]
    return f"{numbers}  {load}  {', '.join(filter(None, remarks))}".rstrip()


def _remark(best: Measured, p99_ms: float) -> str:
    if best.clients == 0:
        return "did not load, see logs/model_log.log"
    if best.failed:
        return f"{best.failed} failed"
    return "" if best.is_safe(p99_ms) else "too near the bound or beyond"


def _gain(tuning: Tuning, found: list[Measured], cores: int) -> str:
    if default_layout(cores) not in [best.layout for best in found]:
        return f"TorchServe's default layout, {cores} workers, was not tried"
    if tuning.default is None or tuning.gain is None:
        return "TorchServe's default layout does not keep the bound"
    return f"{tuning.gain:.2f} times TorchServe's default layout ({tuning.default.requests_per_s:.1f} requests/s)"


def _tuning_document(tuning: Tuning, measured: list[Measured]) -> dict[str, object]:
    """As `--json` prints it."""
    return {
        "chosen": _measured_document(tuning.chosen),
        "default": tuning.default and _measured_document(tuning.default),
        "gain": tuning.gain,
        "measured": [_measured_document(best) for best in measured],
    }


def _measured_document(best: Measured) -> dict[str, object]:
    """JSON knows no infinity."""
    return {**asdict(best), **({} if math.isfinite(best.p99_ms) else {"p50_ms": None, "p99_ms": None})}


def document(result: LoadResult) -> dict[str, object]:
    """What a program wants of a load; latencies are null where nothing was answered."""
    quantiles = {
        name: result.latency_ms(quantile) if result.latencies_ms else None for name, quantile in QUANTILES.items()
    }
    return {
        "requests": result.requests,
        "failed": result.failed,
        "seconds": result.seconds,
        "requests_per_s": result.requests_per_s,
        "counts": result.counts,
        "latency_ms": quantiles,
    }


def _show(result: LoadResult) -> None:
    table = Table("requests", "failed", "seconds", "requests/s", *(f"{name} ms" for name in QUANTILES), box=None)
    for column in table.columns:
        column.justify = "right"
    latencies = (f"{result.latency_ms(share):.1f}" if result.latencies_ms else "-" for share in QUANTILES.values())
    counts = (str(result.requests), str(result.failed), f"{result.seconds:.1f}", f"{result.requests_per_s:.1f}")
    table.add_row(*counts, *latencies)
    Console(highlight=False).print(table)


@contextmanager
def _progress(model: str, duration_s: float) -> Iterator[Callable[[float, int], None]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]} requests"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(model, total=duration_s, done=0)
        yield lambda seconds, done: progress.update(task, completed=min(seconds, duration_s), done=done)
