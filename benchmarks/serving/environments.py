"""What each peer needs beside PyTorch."""

from __future__ import annotations

PINS: dict[str, tuple[str, ...]] = {
    "fastapi": ("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
    "litserve": ("litserve==0.2.19",),
    "mosec": ("mosec==0.9.8",),
    "bentoml": ("bentoml==1.4.39",),
    "ray": ("ray[serve]==2.60.0", "python-multipart==0.0.34"),
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),  # workers of MLServer crash with newer ones
    "pytriton": ("nvidia-pytriton==0.7.0",),
    "openvino": ("openvino==2026.4.1", "nncf==3.4.0", "fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
}
