"""Features of images on disk, by the images' own bytes, so that a network sees each image once.

    FOLDER/<SHA-256 of the file's content>.safetensors        images: uint8[N,32], their SHA-256; features: float32[N,D]

A file is moved into place when it is whole, and its name is the digest of its content: what was damaged since is
removed and computed again. Nothing else keeps these files, so the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from system import files

_SUFFIX = ".safetensors"


class FeatureCache:
    """What one network gave for images.

    Args:
        folder: for this network and these input settings alone; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> tuple[dict[bytes, torch.Tensor], int]:
        """The features float32[D] of each image by its SHA-256, and how many damaged files were removed."""
        found: dict[bytes, torch.Tensor] = {}
        damaged = 0
        for file in sorted(self.folder.glob(f"*{_SUFFIX}")):
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != file.stem:
                file.unlink(missing_ok=True)
                damaged += 1
                continue
            kept = load(content)
            found |= zip(map(bytes, kept["images"].numpy()), kept["features"], strict=True)
        return found, damaged

    def add(self, images: Sequence[bytes], features: torch.Tensor) -> None:
        """Keep the features float32[N,D] of images, by their SHA-256.

        Raises:
            OSError: the folder cannot be written.
        """
        digests = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8).view(len(images), -1)
        content = save({"images": digests, "features": features.contiguous()})
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write(self.folder / f"{hashlib.sha256(content).hexdigest()}{_SUFFIX}", content)
