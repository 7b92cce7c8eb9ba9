"""The command `slow`: which requests took longest, and in which stage.

    python -m operate slow . edge

reads what the workers of a server wrote of slow requests (`serving.log_slower_s`, `logs/requests.log`) and what the
edge did (`logs/access.log`). Where both know a request, the time of its answer is all that is left of the edge's total.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from operate.errors import NoLogs
from system.command_line import AsJson, reports_errors
from system.printable import printable

STAGES = ("edge", "queue", "decode", "forward", "answer")
MOST_REQUESTS = 1000
_MARK = b"request "
_WORKERS, _EDGE = "requests", "access"
# Between the clocks of an edge and a server.
_CLOCKS_S = 1.0


@dataclass(frozen=True)
class Slow:
    """One request, in seconds; a stage that nobody has seen is None."""

    id: str
    ended: float
    """Unix time."""
    total: float
    status: int
    model: str
    trace: str | None
    edge: float | None = None
    queue: float | None = None
    decode: float | None = None
    forward: float | None = None
    answer: float | None = None


@reports_errors
def slow(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="Run directories of servers and folders of edges; default: this one."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="How far back to look.")] = 10,
    most: Annotated[int, typer.Option(min=1, max=MOST_REQUESTS, help="Most requests to list.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the requests that took longest lately, with the time of each stage."""
    found = find(folders or [Path()], time.time() - 60 * minutes)
    slowest = sorted(found, key=lambda request: -request.total)[:most]
    if as_json:
        print(json.dumps([asdict(request) for request in slowest]))
    elif slowest:
        _show(slowest)
    else:
        print(f"no request of the last {minutes:g} minutes was slow enough to be written down: serving.log_slower_s")


def find(folders: Sequence[Path], since: float) -> list[Slow]:
    """What the logs of these folders say of requests that ended after `since`, Unix time in seconds.

    Raises:
        NoLogs: a folder has none.
    """
    by_id: dict[str, list[dict[str, Any]]] = {}
    edges: list[dict[str, Any]] = []
    for folder in folders:
        logs = folder / "logs"
        if not logs.is_dir():
            raise NoLogs(f"{folder} has no folder logs: name a server's run directory or an edge's folder")
        for line in _lines(logs, _WORKERS, since):
            by_id.setdefault(str(line["id"]), []).append(line)
        edges += _lines(logs, _EDGE, since)
    found = [_seen_by_edge(line, _take(by_id.get(line["id"], []), line)) for line in edges]
    return found + [_seen_by_worker(line) for lines in by_id.values() for line in lines]


def _lines(logs: Path, name: str, since: float) -> Iterator[dict[str, Any]]:
    """Those of a log that are late enough, and of the older logs beside it, the newest first."""
    for file in [logs / f"{name}.log", *sorted(logs.glob(f"{name}.*.log*"))]:
        if not file.exists():  # a log begins with its first line
            continue
        lines = _read(file)
        yield from (line for line in lines if line["time"] >= since)
        if any(line["time"] < since for line in lines):
            return


def _read(file: Path) -> list[dict[str, Any]]:
    """The lines that say whose time they tell; one that was cut off is left out."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
        lines = []
        for text in opened:
            try:
                line = json.loads(text.removeprefix(_MARK))
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("time"), float) and isinstance(line.get("id"), str):
                lines.append(line)
        return lines


def _take(lines: list[dict[str, Any]], edge: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the worker's line that belongs to an edge's: clients may use an id again."""
    began = edge["time"] - edge["total_s"] - _CLOCKS_S
    of_it = [line for line in lines if began <= line["time"] <= edge["time"] + _CLOCKS_S]
    for line in of_it:  # more than one where two servers were asked
        lines.remove(line)
    return of_it[-1] if of_it else None


def _seen_by_edge(edge: dict[str, Any], worker: dict[str, Any] | None) -> Slow:
    total = float(edge["total_s"])
    of_servers = sum(map(float, re.findall(r"\d+\.\d+", str(edge["servers_s"]))))
    stages: dict[str, float | None] = {"edge": round(max(0.0, total - of_servers), 6)}
    if worker:
        stages |= {stage: worker.get(f"{stage}_s") for stage in STAGES[1:-1]}
        stages["answer"] = round(max(0.0, total - sum(value or 0.0 for value in stages.values())), 6)
    model = str(worker["model"]) if worker else str(edge["path"])
    trace = worker["trace"] if worker else str(edge["trace"])[3:35] or None
    return Slow(edge["id"], edge["time"], total, int(edge["status"]), model, trace, **stages)


def _seen_by_worker(line: dict[str, Any]) -> Slow:
    stages = {stage: line.get(f"{stage}_s") for stage in STAGES}
    total = round(sum(value or 0.0 for value in stages.values()), 6)
    return Slow(line["id"], line["time"], total, int(line["status"]), str(line["model"]), line["trace"], **stages)


def _show(slowest: Sequence[Slow]) -> None:
    print("".join(f"{name:>10}" for name in ("total ms", *STAGES)), " status  ended     model and id", sep="")
    for request in slowest:
        times = (request.total, *(getattr(request, stage) for stage in STAGES))
        shown = "".join(f"{'-' if seconds is None else f'{1e3 * seconds:.1f}':>10}" for seconds in times)
        ended = datetime.fromtimestamp(request.ended).strftime("%H:%M:%S")
        print(f"{shown}  {request.status:6}  {ended}  {printable(f'{request.model} {request.id}')}")
