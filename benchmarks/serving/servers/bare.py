"""The least that a cold start can be: import torch, load the file given, and answer once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(file: Path, channels: int, crop_size: int) -> None:
    model = torch.jit.load(str(file)).eval()
    with torch.inference_mode():
        model(torch.zeros(1, channels, crop_size, crop_size, dtype=torch.uint8))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
