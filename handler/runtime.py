"""How the worker's process uses the machine: memory allocator, threads, and what is worth having by measurement."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable

import torch

# What is tried must be this much faster than what there is: below that, noise would decide.
WORTHWHILE_SPEEDUP = 1.15
_ROUNDS, _ROUNDS_S = 5, 0.5

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Keep large freed blocks in the process instead of giving them back to the kernel.

    glibc returns activations after every operation and page-faults them in again, which can take half of the time.
    Must run before large blocks are allocated. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


def share_cores(workers: int | None) -> int:
    """Give this process its share of the cores as torch threads, and return how many.

    Threads that outnumber the cores cost several times the throughput.

    Args:
        workers: how many processes share them; None is one for each core, as TorchServe starts them on a CPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // (workers or cores))
    torch.set_num_threads(threads)
    return threads


def settle_threads(call: Callable[[], object]) -> None:
    """Keep torch's threads only if they make `call` faster than one does.

    On a small network threads cost more than they bring, and many times more beside another busy process.
    """
    given = torch.get_num_threads()
    if given > 1:
        together_s = median_seconds(call)
        torch.set_num_threads(1)
        if is_worthwhile(median_seconds(call), together_s):
            torch.set_num_threads(given)


def is_worthwhile(seconds: float, faster_seconds: float) -> bool:
    """Whether what takes `faster_seconds` is enough faster than what takes `seconds`."""
    return seconds > WORTHWHILE_SPEEDUP * faster_seconds


def median_seconds(call: Callable[[], object]) -> float:
    """How long a call takes, by a few of them after one that is not counted, within half a second or so."""
    call()
    times: list[float] = []
    while len(times) < _ROUNDS and sum(times) < _ROUNDS_S:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
