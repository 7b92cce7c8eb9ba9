"""How many workers this machine has room for: one for each core, and no more than its free memory holds.

A worker's size is measured on those that the model has: the memory that a process shares with no other. Where the
processes cannot be seen, as those of a container, it is what TorchServe says, up to a minute late and with what they
share: the room is rather more then.
"""

from __future__ import annotations

from typing import Any

import psutil

from client.errors import ModelNotFound, TooManyWorkers
from client.torchserve import TorchServe
from system.addresses import is_here
from system.cores import cores
from system.printable import counted

_WORKER_PROGRAMS = ("model_service_worker.py", "forkserver.py")
_NO_MORE_CORES = "this machine has no more cores"


def check(server: TorchServe, model: str, workers: int, ceiling: int | None = None, beside: bool = False) -> None:
    """Refuse more workers than there is room for.

    A server on another machine has a ceiling only where one is given.

    Args:
        workers: how many are asked for.
        ceiling: most that may be, instead of what cores and memory allow.
        beside: they come beside those that the model has, as another version's do, and not instead of them.

    Raises:
        TooManyWorkers: with the ceiling, where it is from, and how to go past it.
    """
    if ceiling is None and is_here(server.management_url):
        _check_room(server, model, workers, beside)
    elif ceiling is not None and workers > ceiling:
        raise _too_many(workers, ceiling, "the ceiling that was given")


def most_workers(server: TorchServe, model: str, beside: bool = False) -> tuple[int, str]:
    """The most workers that there is room for, and why there is none for more.

    Args:
        beside: as `check` takes it.
    """
    try:
        description = server.describe(model)
    except ModelNotFound:  # it has no worker yet that could be measured
        return cores(), _NO_MORE_CORES
    present = 0 if beside else len(description["workers"])
    available_bytes = psutil.virtual_memory().available
    room = room_in_memory(description, available_bytes)
    if room is None or present + room >= cores():
        return cores(), _NO_MORE_CORES
    return present + room, f"{available_bytes / 1e6:.0f} MB of memory are free and hold {room} more"


def room_in_memory(description: dict[str, Any], available_bytes: float) -> int | None:
    """How many more workers of the described model fit; None where none of its workers can be measured."""
    size_bytes = max(map(_memory_bytes, description["workers"]), default=0)
    return int(available_bytes // size_bytes) if size_bytes else None


def _check_room(server: TorchServe, model: str, workers: int, beside: bool) -> None:
    if workers > cores():
        raise _too_many(workers, cores(), _NO_MORE_CORES)
    allowed, reason = most_workers(server, model, beside)
    if workers > allowed:
        raise _too_many(workers, allowed, reason)


def _too_many(workers: int, allowed: int, reason: str) -> TooManyWorkers:
    return TooManyWorkers(
        f"{counted(workers, 'worker')} would be more than {allowed}, {reason}: --ceiling {workers} allows them"
    )


def _memory_bytes(worker: dict[str, Any]) -> int:
    """Of its own, else with what it shares; 0 where neither can be told."""
    try:
        process = psutil.Process(worker["pid"]) if worker["pid"] > 0 else None
        if process is not None and any(part.endswith(_WORKER_PROGRAMS) for part in process.cmdline()):
            return int(process.memory_full_info().uss)
    except psutil.Error:  # of a server in a container: the pid is nobody's here, or somebody else's
        pass
    return int(worker["memoryUsage"] or 0)
