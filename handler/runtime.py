"""How the worker's process uses the machine: memory allocator, threads, and what is worth having by measurement."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from system.cores import cores

T = TypeVar("T")

# What is tried must be this much faster than what there is: below that, noise would decide.
WORTHWHILE_SPEEDUP = 1.15
_FEWEST_ROUNDS, _MOST_ROUNDS, _ROUNDS_S = 2, 5, 0.25
_WORTH_THREADS_S = 0.01

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


@contextmanager
def without_collecting() -> Iterator[None]:
    """Parse JSON within: looking for garbage again and again among millions of new lists takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def share_cores(workers: int | None, threads: int | None = None) -> int:
    """Give this process its share of the cores as torch threads, and return how many.

    Threads that outnumber the cores cost several times the throughput.

    Args:
        workers: how many processes share them; None is one for each core, as TorchServe starts them on a CPU.
        threads: to take instead of the share, but no more than there are cores.
    """
    allowed = cores()
    threads = min(threads, allowed) if threads else max(1, allowed // (workers or allowed))
    torch.set_num_threads(threads)
    return threads


def settle_threads(call: Callable[[], object]) -> None:
    """Keep torch's threads only if they make `call` faster than one does."""
    given = torch.get_num_threads()
    if given == 1:
        return

    def with_threads(number: int) -> float:
        torch.set_num_threads(number)
        return seconds(call)

    if not is_worth_threads(with_threads(1), lambda: with_threads(given)):
        torch.set_num_threads(1)


def is_worth_threads(alone_s: float, together_s: Callable[[], float]) -> bool:
    """Whether several threads are to share what one does in `alone_s`.

    They wait for each other. Where another process takes one of their cores, as TorchServe's frontend does under load,
    that costs milliseconds, however much faster they were on an idle machine.

    Args:
        together_s: measures how long they take.
    """
    return alone_s > _WORTH_THREADS_S and is_worthwhile(alone_s, together_s())


def is_worthwhile(present_s: float, faster_s: float) -> bool:
    """Whether what takes `faster_s` is enough faster than what there is."""
    return present_s > WORTHWHILE_SPEEDUP * faster_s


def seconds(call: Callable[[], object], known: Sequence[float] = ()) -> float:
    """How long a call takes: the shortest of a few after one that is not counted, since noise only adds to it.

    Args:
        known: times of such calls, which need not be made again, nor the first.
    """
    if not known:
        call()
    times = list(known)
    while len(times) < _FEWEST_ROUNDS or (len(times) < _MOST_ROUNDS and sum(times) < _ROUNDS_S):
        times.append(timed(call)[1])
    return min(times)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    returned = call()
    return returned, time.perf_counter() - started
