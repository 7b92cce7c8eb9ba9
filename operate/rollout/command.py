"""The command `rollout`: a new version of a model beside the old one, compared, then promoted or withdrawn."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from archive.content import ArchiveContent
from client import scaling
from client.command_line import Ceiling, Timeout, server_of
from client.inputs import expand
from client.torchserve import TorchServe
from operate.edge.share import EdgeShare
from operate.errors import RolloutRefused
from operate.rollout.asking import Plan, compare
from operate.rollout.comparison import Comparison, Limits
from operate.rollout.mirror import Mirror
from operate.rollout.versions import Rollout
from system import locks, progress, signals
from system.addresses import is_here
from system.command_line import AsJson, complain, reports_errors

_ANSWER_TIMEOUT_S = 30.0
_LEAST_QUIET_S = 1.0
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@reports_errors
def rollout(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME", help="A served model.")],
    archive: Annotated[
        str | None, typer.Argument(metavar="NEW.mar", help="The new version, in the server's model store.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Images to compare on: files, folders or patterns.")
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Compare on copies of real requests, which --edge sends, not on images.")
    ] = False,
    canary: Annotated[
        str, typer.Option(metavar="N%", help="Share of the images that the new version gets too, or that is copied.")
    ] = "10%",
    watch: Annotated[str, typer.Option(metavar="TIME", help="How long to compare: 30s, 5m, 1h.")] = "5m",
    rate: Annotated[
        float,
        typer.Option(min=0.1, max=1000, help="Images, or at most so many copies, that the old one gets a second."),
    ] = 10,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of the new version; default: as many as the old one has.")
    ] = None,
    ceiling: Ceiling = None,
    model_store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The server's model store: on promotion, NEW.mar becomes NAME.mar there."),
    ] = None,
    edge: Annotated[
        Path | None,
        typer.Option(
            metavar="canary.conf", help="canary.conf of an edge: it sends the share of real requests too, or copies."
        ),
    ] = None,
    max_errors: Annotated[str, typer.Option(metavar="N%", help="Most errors, above the old version's.")] = "0.1%",
    max_p99_ratio: Annotated[float, typer.Option(min=1, help="Largest p99, times the old version's.")] = 1.5,
    max_disagreement: Annotated[str, typer.Option(metavar="N%", help="Most requests that get another class.")] = "5%",
    min_compared: Annotated[int, typer.Option(min=1, help="Promote only after so many requests were compared.")] = 100,
    abort: Annotated[bool, typer.Option("--abort", help="Remove the share and every version but the default.")] = False,
    timeout_s: Timeout = 120,
    as_json: AsJson = False,
) -> None:
    """Compare a new version with the served one and promote it if it is as good. Exits 1 if it is not."""
    signals.catch()  # what was registered must go then too
    limits = Limits(_share("--max-errors", max_errors), max_p99_ratio, _share("--max-disagreement", max_disagreement),
                    min_compared)  # fmt: skip
    server = server_of(context, timeout_s=_ANSWER_TIMEOUT_S, retry_s=0)
    edge_share = EdgeShare(edge) if edge else None
    if abort:
        with _alone(server, model, edge_share):
            _abort(Rollout(server, model, edge_share))
        return
    if archive is None or bool(images) == mirror or (mirror and edge_share is None):
        raise RolloutRefused(
            "name NEW.mar and --images, or --mirror with --edge, or --abort what a killed rollout left"
        )
    share, watch_s = _share("--canary", canary), _duration_s(watch)
    plan: Plan | Mirror
    if edge_share is not None and mirror:
        plan = Mirror(edge_share.copies, watch_s, rate, share)
    else:
        plan = Plan(expand(images or ()), watch_s, rate, share)
    if plan.compared < min_compared:
        raise RolloutRefused(
            f"{plan.compared} requests would be compared and {min_compared} are evidence: --watch longer, or give a "
            "larger --canary or --rate"
        )
    archive = Path(archive).name.removesuffix(".mar") + ".mar"
    with _alone(server, model, edge_share) as alone:
        this = Rollout(server, model, edge_share, _in_store(model_store, archive, model), alone)
        workers = workers or this.old_workers or 1
        scaling.check(server, model, workers, ceiling, beside=True)
        try:
            this.start(archive, workers, timeout_s)
            comparison, reasons = _decide(this, plan, limits)
        except (KeyboardInterrupt, OSError):
            print(f"{archive} was rolled back and {this.old} serves on", file=sys.stderr)
            raise
    _show(this, comparison, reasons, plan.left_out if isinstance(plan, Mirror) else 0, as_json)
    _hint(model, archive, promoted=not reasons, renamed=this.archive is not None)
    if reasons:
        complain(f"{model} {this.new} was rolled back and {this.old} serves on: {'; '.join(reasons)}")
        raise typer.Exit(1)


@contextmanager
def _alone(server: TorchServe, model: str, edge: EdgeShare | None) -> Iterator[bool]:
    """Keep other rollouts of this model, or at this edge, away for as long as this process lives.

    Yields:
        Whether that holds for the server: it is on this machine, and so is its key file, beside which the lock is.

    Raises:
        RolloutRefused: another one is under way.
    """
    with ExitStack() as stack:
        if edge is not None:
            refusal = RolloutRefused(f"another rollout is under way at the edge in {edge.nginx.folder}: one at a time")
            stack.enter_context(locks.held(edge.nginx.run / "rollout.lock", refusal))
        lock = server.key_file.with_name(f".rollout-{quote(model, safe='')}.lock")
        has_lock = False
        if server.key_file.exists():
            with suppress(OSError):  # as where its directory is read-only
                stack.enter_context(locks.held(lock, RolloutRefused(f"another rollout of {model} is under way")))
                has_lock = True
        yield has_lock and is_here(server.management_url)


def _decide(this: Rollout, plan: Plan | Mirror, limits: Limits) -> tuple[Comparison, list[str]]:
    """Compare, then promote or withdraw; returns the reasons for the latter."""
    try:
        with ExitStack() as stack:
            if this.edge is not None and isinstance(plan, Mirror):
                stack.enter_context(plan.listening())
                this.edge.copy(this.model, plan.share)
            elif this.edge is not None:
                this.edge.give(this.model, this.new, plan.share)
            report = stack.enter_context(_progress(this, plan))
            comparison = compare(this.server, this.model, (this.old, this.new), plan, limits, report)
    except BaseException:
        this.withdraw(_LEAST_QUIET_S)
        raise
    reasons = comparison.reasons(limits)
    finish = this.withdraw if reasons else this.promote
    finish(max(_LEAST_QUIET_S, comparison.slowest_ms / 1000))
    return comparison, reasons


def _abort(this: Rollout) -> None:
    removed = this.clear()
    print(f"{this.model} {this.old} serves on; " + (f"removed {', '.join(removed)}" if removed else "nothing was left"))


@contextmanager
def _progress(this: Rollout, plan: Plan | Mirror) -> Iterator[Callable[[float, Comparison], None]]:
    with progress.bar("{task.fields[state]}") as bar:
        task = bar.add_task(f"{this.model} {this.old} → {this.new}", total=plan.watch_s, state="")

        def report(seconds: float, comparison: Comparison) -> None:
            state = f"{len(comparison.pairs)} compared, {comparison.disagreements} disagree"
            if comparison.excess > 0:
                state += f", {comparison.excess} more errors"
            bar.update(task, completed=min(seconds, plan.watch_s), state=state)

        yield report


def _show(this: Rollout, comparison: Comparison, reasons: list[str], left_out: int, as_json: bool) -> None:
    versions = {this.old: comparison.old, this.new: comparison.new}
    if as_json:
        document = {
            "model": this.model,
            "old": {"version": this.old, **asdict(comparison.old)},
            "new": {"version": this.new, **asdict(comparison.new)},
            "disagreements": comparison.disagreements,
            "largest_difference": comparison.largest_difference,
            "left_out": left_out,
            "promoted": not reasons,
            "reasons": reasons,
        }
        print(json.dumps(document))
        return
    table = Table("version", "requests", "errors", "p50 ms", "p99 ms", "other class", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for version, figures in versions.items():
        times = ("-" if time_ms is None else f"{time_ms:.1f}" for time_ms in (figures.p50_ms, figures.p99_ms))
        other = str(comparison.disagreements) if version == this.new else ""
        table.add_row(version, str(figures.requests), str(figures.errors), *times, other)
    Console(highlight=False).print(table)
    print(f"largest difference of a probability: {comparison.largest_difference:.4f}")
    if left_out:
        print(f"copies that came too fast and were left out: {left_out}")
    if not reasons:
        print(f"{this.model} {this.new} was promoted and {this.old} removed")


def _in_store(model_store: Path | None, archive: str, model: str) -> Path | None:
    """Raises:
    RolloutRefused: the archive is not in the model store, is of another model, or is what a start in the meantime
        would serve.
    """
    if model_store is None:
        return None
    if archive == f"{model}.mar":
        raise RolloutRefused(f"{archive} is what the server's next start takes: give the new archive another name")
    if not (model_store / archive).is_file():
        raise RolloutRefused(f"{model_store / archive} is not there: name the server's own model store")
    if (name := ArchiveContent(model_store / archive).name) != model:
        raise RolloutRefused(
            f"{model_store / archive} is the model {name}, and as {model}.mar no start serves it: name one of {model}"
        )
    return model_store / archive


def _hint(model: str, archive: str, promoted: bool, renamed: bool) -> None:
    """A server that starts again takes NAME.mar from its model store, whatever was decided."""
    is_next = archive == f"{model}.mar"
    if promoted and not is_next and not renamed:
        print(f"the server's next start takes {model}.mar: in its store, mv {archive} {model}.mar", file=sys.stderr)
    if not promoted and is_next:
        print(f"the server's next start takes {model}.mar: put the old archive back there", file=sys.stderr)


def _share(option: str, text: str) -> float:
    """`10%` → 0.1."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if number is None or float(number[1]) > 100:
        raise RolloutRefused(f"{option}: expected a percentage such as 10%, found {text!r}")
    return float(number[1]) / 100


def _duration_s(text: str) -> float:
    """`5m` → 300."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if number is None:
        raise RolloutRefused(f"--watch: expected a time such as 30s, 5m or 1h, found {text!r}")
    return float(number[1]) * _SECONDS[number[2]]
