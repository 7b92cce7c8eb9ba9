"""A TorchServe handler that answers without looking: what is left is the frontend and the way to the worker."""

from __future__ import annotations

from typing import Any

ANSWER = {str(digit): 0.2 for digit in range(5)}


def handle(data: list[Any] | None, context: Any) -> list[dict[str, float]] | None:
    return None if data is None else [ANSWER] * len(data)
