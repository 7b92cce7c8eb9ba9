"""Why the model answered as it did: which regions of one image support the class, by Captum.

Integrated Gradients (Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365) from a black image to this one,
on the logit of the class, so it works for every network. The path has as many steps as fit into the time that is
allowed; their number and how far the attributions are from adding up to the change of the logit are part of the answer.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

GRID_CELLS = 14
_MOST_STEPS, _FEWEST_STEPS, _STEPS_AT_ONCE = 32, 4, 4
_PICTURE_SIDE = 320
_FOR, _AGAINST = (220, 38, 38), (37, 99, 235)
_STRONGEST_TINT = 0.75

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Explanation:
    """Which regions of one image support one class."""

    grid: torch.Tensor
    """float32[G,G] in -1..1: the share of each cell in the logit, positive where it supports the class."""
    steps: int
    convergence_delta: float
    """Sum of the attributions minus the change of the logit; near 0 where there were enough steps."""

    def document(self, prediction: dict[str, float]) -> dict[str, Any]:
        """The JSON answer; `prediction` holds the explained class first."""
        label, probability = next(iter(prediction.items()))
        return {
            "class": label,
            "probability": probability,
            "method": "integrated_gradients",
            "steps": self.steps,
            "convergence_delta": round(self.convergence_delta, 4),
            "grid": [[round(value, 4) for value in row] for row in self.grid.tolist()],
        }

    def png(self, pixels: torch.Tensor) -> bytes:
        """The image, uint8[C,H,W], tinted red where it supports the class and blue where it contradicts it."""
        image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        side = max(_PICTURE_SIDE, image.width)
        # Small images keep their pixels visible.
        picture = image.resize(
            (side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.BICUBIC
        )
        for colour, sign in ((_FOR, 1), (_AGAINST, -1)):
            strength = ((sign * self.grid).clamp(min=0) * (255 * _STRONGEST_TINT)).byte()
            mask = Image.fromarray(strength.numpy()).resize((side, side), Image.Resampling.BICUBIC)
            picture.paste(Image.new("RGB", picture.size, colour), mask=mask)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()


def explain(logits: Logits, pixels: torch.Tensor, target: int, time_s: float) -> Explanation:
    """Attribute the logit of class `target` to the parts of one image.

    Args:
        logits: float32[N,C,H,W] in 0..255 → float32[N,K], differentiable.
        pixels: uint8[C,H,W], on the device of the model.
        time_s: about how long it may take; never fewer than 4 steps are done.
    """
    # Takes over a second, and most workers are never asked.
    from captum.attr import IntegratedGradients

    inputs = pixels.unsqueeze(0).float()
    # Captum reads the signature of what it calls, and a TorchScript method has none.
    integrated_gradients = IntegratedGradients(lambda images: logits(images))

    def attribute(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        attributions, delta = integrated_gradients.attribute(
            inputs,
            target=target,
            n_steps=steps,
            internal_batch_size=_STEPS_AT_ONCE,
            return_convergence_delta=True,
        )
        return attributions, delta

    started = time.perf_counter()
    steps = _FEWEST_STEPS
    attributions, delta = attribute(steps)
    per_step_s = (time.perf_counter() - started) / steps
    affordable = min(_MOST_STEPS, int((time_s - per_step_s * steps) / per_step_s))
    if affordable > steps:
        steps = affordable
        attributions, delta = attribute(steps)
    return Explanation(_grid(attributions[0]), steps, float(delta[0]))


def _grid(attributions: torch.Tensor) -> torch.Tensor:
    """float32[C,H,W] → float32[G,G] on the CPU, the strongest cell at ±1."""
    cells = min(GRID_CELLS, attributions.shape[-1])
    grid = adaptive_avg_pool2d(attributions.detach().sum(0, keepdim=True), cells)[0].float().cpu()
    strongest = float(grid.abs().max())
    return grid / strongest if strongest > 0 and math.isfinite(strongest) else torch.zeros_like(grid)
