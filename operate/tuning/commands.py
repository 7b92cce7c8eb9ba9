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
from rich.table import Table

from archive.run_folder import RunFolder
from client import scaling
from client.command_line import Model, server_of
from client.inputs import expand
from client.torchserve import TorchServe
from operate.errors import NotTunable
from operate.quantiles import quantile
from operate.tuning import layouts
from operate.tuning import load as loading
from operate.tuning.load import LoadResult
from operate.tuning.tune import Bench, Measured, Tuning, choose, default_layout, search
from system import progress, signals
from system.command_line import AsJson, complain, reports_errors
from system.cores import cores as usable_cores
from system.printable import counted

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
    """Load a model with requests and print rates, latencies and errors. Exits 1 if any request failed."""
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
        complain(f"{result.failed} of {counted(result.requests, 'request')} failed ({outcomes})")
        raise typer.Exit(1)


@reports_errors
def tune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME", help="A served model.")],
    p99_ms: Annotated[float, typer.Option(min=0, help="Largest p99 latency, in ms.")],
    model_store: Annotated[
        Path, typer.Option(help="The server's model store; copies of the archive go there.")
    ] = MODEL_STORE,
    images: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Files, folders or patterns; default: the archive's own.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=60, help="Length of one measurement.")] = 2,
    most_layouts: Annotated[int, typer.Option("--layouts", min=1, max=100, help="Most layouts to try.")] = 12,
    run: Annotated[
        Path | None, typer.Option("--write", metavar="RUN", help="Put the choice into this run's recipe.yaml.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the workers, batch size, delay and threads with the most requests/s within a latency. Exits 1 if none does.

    The server must be on this machine, with nothing else to do, and let models be registered (--model-api).
    """
    from archive import serving  # imports pydantic and Pillow, which take time that --help saves

    signals.catch()  # what was registered must go then too
    if "/" in model:
        raise NotTunable(f"{model}: name the model alone; its default version is tuned")
    server, cores = server_of(context), usable_cores()
    archive = layouts.find_archive(server, model, model_store)
    if run is not None:
        serving.read(run)
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
        serving.change(run, **asdict(tuning.chosen.layout))
        recipe = run / RunFolder.recipe
        hint = f"scripts/archive.sh {run} --version, with a version higher than the served one, packs it"
        keeps = f"python -m train {recipe} --name {run.resolve().name} --overwrite keeps it in a new training"
        print(f"{recipe}: serving is written; {hint}; {keeps}", file=sys.stderr if as_json else sys.stdout)


def _most_workers(server: TorchServe, model: str, cores: int) -> int:
    """That a layout may have, beside the workers that serve; says so where that is less than the cores."""
    room, reason = scaling.most_workers(server, model, beside=True)
    most_workers = max(1, room)
    if most_workers < cores:
        print(f"no layout has more than {counted(most_workers, 'worker')}: {reason}", file=sys.stderr)
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
    return {
        "requests": result.requests,
        "failed": result.failed,
        "seconds": result.seconds,
        "requests_per_s": result.requests_per_s,
        "counts": result.counts,
        "latency_ms": {name: quantile(result.latencies_ms, share) for name, share in QUANTILES.items()},
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
    with progress.bar("{task.fields[done]} requests") as bar:
        task = bar.add_task(model, total=duration_s, done=0)
        yield lambda seconds, done: bar.update(task, completed=min(seconds, duration_s), done=done)
