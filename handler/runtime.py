"""How the worker's process uses the machine: memory allocator and threads."""

from __future__ import annotations

import ctypes
import os

import torch

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
