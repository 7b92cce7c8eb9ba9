"""The least that a cold start can be: import torch, load the file given, and answer once."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(file: Path, channels: int, crop_size: int) -> None:
    images = torch.zeros(1, channels, crop_size, crop_size, dtype=torch.uint8)
    if file.suffix == ".onnx":
        import onnxruntime

        onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})
        return
    with torch.inference_mode():
        torch.jit.load(str(file)).eval()(images)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
