"""How fast two forms of a model are on this machine, side by side."""

from __future__ import annotations

import statistics
import time

import torch

from handler.variants import Predict

_ROUNDS, _ROUND_S = 7, 0.15


def compare(fp32: Predict, int8: Predict, images: torch.Tensor) -> dict[str, float]:
    """Let both answer `images`, uint8[N,C,H,W], in turns, so that what else the machine does harms both alike.

    Returns:
        Median images/s of each, and the median over the rounds of how many times as fast `int8` is.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for predict in (fp32, int8):
            for _ in range(3):  # TorchScript specialises itself in the first calls
                predict(images)
        rounds = [(images_per_s(fp32, images), images_per_s(int8, images)) for _ in range(_ROUNDS)]
    return {
        "batch_size": len(images),
        "fp32_images_per_s": round(statistics.median(slow for slow, _ in rounds), 1),
        "int8_images_per_s": round(statistics.median(fast for _, fast in rounds), 1),
        "speedup": round(statistics.median(fast / slow for slow, fast in rounds), 3),
    }


def images_per_s(predict: Predict, images: torch.Tensor) -> float:
    """How many of `images`, uint8[N,C,H,W], are answered in a second, by a seventh of it or one call."""
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < _ROUND_S or calls == 0:
        predict(images)
        calls += 1
    return calls * len(images) / (time.perf_counter() - started)
