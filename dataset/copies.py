"""Which images belong together, so that no split parts them: copies, near copies, and those of one group.

A near copy (re-encoded, made smaller or brighter, the next picture of a burst) has almost the same thumbnail of 16×16
grey values: they correlate above 0.98. Among 398 photographs of ants and bees no two different ones exceed 0.83, among
2,500 of CIFAR-10 none 0.94. Copies of a photograph saved as JPEG of quality 40 or at half the size stay above 0.99,
those of a 32×32 image at half the size above 0.957. A mirror image counts as a near copy: training may flip images.

Of plain drawings such as digits 12 % look like another one. They lie on one side of a split that is drawn, and with
splits of the data's own they are left out of training: `near_copy_correlation` 1 keeps them. Not found are crops of
some percent, rotated images, and other encodings of an image of a single colour. Colours do not count, so that one
texture in red and in blue is taken for copies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dataset.errors import DataError

_SIDE = 16
_GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
_PLAIN = 2.0
"""Standard deviation of grey values, up to which an image shows nothing to compare."""
_MOST_COMPARED = 50_000
"""Images, of which all pairs are compared in a minute."""
_BLOCK = 2_048
_SHOWN = 5


@dataclass(frozen=True)
class Look:
    """What tells whether two images are the same."""

    digest: bytes
    """SHA-256 of the encoded image."""
    thumbnail: torch.Tensor
    """float32[256], of mean 0 and length 1; 0 of a plain image."""

    @classmethod
    def of(cls, data: bytes, pixels: torch.Tensor) -> Look:
        """Of an encoded image and its uint8[C,H,W]."""
        grey = (pixels.float() * _GREY).sum(0, keepdim=True) if len(pixels) == 3 else pixels.float()
        thumbnail = torch.nn.functional.adaptive_avg_pool2d(grey, _SIDE).flatten()
        thumbnail = thumbnail - thumbnail.mean()
        length = thumbnail.norm() if thumbnail.std() > _PLAIN else torch.inf
        return cls(hashlib.sha256(data).digest(), thumbnail / length)


@dataclass(frozen=True)
class Grouped:
    """Which images belong together."""

    groups: np.ndarray
    """int[N]: the index of the first image of each one's group."""
    notes: Sequence[str]
    """What was found, a line each."""


def group(
    looks: Sequence[Look],
    names: Sequence[str],
    labels: np.ndarray,
    *,
    least_correlation: float,
    pattern: str | None,
    stated: Sequence[str] = (),
) -> Grouped:
    """Find the images that belong together.

    Args:
        names: of the files, with the folders that they lie in.
        least_correlation: of the thumbnails of near copies; 1 looks for exact copies alone.
        pattern: with one group or none. Images with the same text of it in their file names, or else in their paths
            below the class, belong together; where it is missing or empty, an image belongs to no group.
        stated: the group of each image as a table has it, empty for none.

    Raises:
        DataError: the pattern is found in no name.
    """
    exact = _same([look.digest for look in looks])
    notes = []
    near = np.empty((0, 2), int)
    if least_correlation < 1 and len(looks) > _MOST_COMPARED:
        notes.append(f"more than {_MOST_COMPARED:,} images: exact copies are looked for, near copies are not")
    elif least_correlation < 1:
        near = _alike(torch.stack([look.thumbnail for look in looks]), least_correlation)
        near = near[[looks[one].digest != looks[other].digest for one, other in near.tolist()]]
    near, whole = _parted(exact, near, labels)
    if whole:
        notes.append(f"all images of {whole} of the classes look alike, so a split parts near copies there")
    by_name = np.empty((0, 2), int)
    if pattern is not None:
        by_name, line = _named(names, pattern)
        notes.append(line)
    by_table = np.empty((0, 2), int)
    if any(stated):
        by_table, line = _keyed(stated, "column of groups")
        notes.append(line)
    copied, alike = len(set(exact[:, 1].tolist())), len(set(near[:, 1].tolist()) - set(exact[:, 1].tolist()))
    if copied or alike:
        notes.append(
            f"{copied} images are copies of others, and {alike} nearly so: none is both trained on and held out "
            "(data.near_copy_correlation)"
        )
    for pairs, what in ((exact, "lie in two classes"), (near, "look like one of another class")):
        double = [f"{names[one]} and {names[other]}" for one, other in pairs.tolist() if labels[one] != labels[other]]
        if double:
            notes.append(
                f"{len(double)} images {what}: {'; '.join(double[:_SHOWN])}{'; ...' if len(double) > _SHOWN else ''}"
            )
    return Grouped(_components(len(looks), exact, near, by_name, by_table), notes)


def _same(keys: Sequence[object]) -> np.ndarray:
    """Pairs int[M,2] of each image with the first that has the same key, if that is another."""
    first: dict[object, int] = {}
    pairs = [(first.setdefault(key, index), index) for index, key in enumerate(keys)]
    return np.array([pair for pair in pairs if pair[0] != pair[1]], int).reshape(-1, 2)


def _alike(thumbnails: torch.Tensor, least: float) -> np.ndarray:
    """Pairs int[M,2] of images whose thumbnails correlate so, as they are or one of them mirrored."""
    found = []
    mirrored = thumbnails.view(-1, _SIDE, _SIDE).flip(2).flatten(1)
    for start in range(0, len(thumbnails), _BLOCK):
        block = thumbnails[start : start + _BLOCK]
        rows = torch.maximum(block @ thumbnails[start:].T, block @ mirrored[start:].T)
        pairs = (rows > least).triu(1).nonzero() + start
        found.append(pairs)
    return torch.cat(found).numpy()


def _named(names: Sequence[str], pattern: str) -> tuple[np.ndarray, str]:
    keys = [_key(name, pattern) or "" for name in names]
    if not any(keys):
        raise DataError(
            f"data.group: {pattern!r} is found in no file name or path below its class, or only as an empty text, such "
            f"as in {names[0].partition('/')[2]!r}"
        )
    return _keyed(keys, "data.group")


def _keyed(keys: Sequence[str], what: str) -> tuple[np.ndarray, str]:
    """Pairs of the images with the same key, and a line; an empty one belongs to none."""
    without = keys.count("")
    line = f"{what}: {len(keys) - without} images in {len(set(keys) - {''})} groups, {without} in none"
    return _same([key or index for index, key in enumerate(keys)]), line


def _key(name: str, pattern: str) -> str | None:
    """What the pattern finds in a file's name, or else in the path below its class."""
    match = re.search(pattern, name.rpartition("/")[2]) or re.search(pattern, name.partition("/")[2])
    return match and match[match.re.groups]


def _parted(exact: np.ndarray, near: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """The pairs of near copies, without those inside classes that would be a single group, and how many these are."""
    with_near, without = _components(len(labels), exact, near), _components(len(labels), exact)
    whole = [
        label
        for label in np.unique(labels)
        if len(np.unique(with_near[labels == label])) == 1 < len(np.unique(without[labels == label]))
    ]
    return near[~np.isin(labels[near], whole).any(1)] if whole else near, len(whole)


def _components(count: int, *pairs: np.ndarray) -> np.ndarray:
    """int[N]: for each image the first that pairs lead to."""
    joined = np.concatenate(pairs)
    graph = coo_array((np.ones(len(joined), bool), (joined[:, 0], joined[:, 1])), (count, count))
    _, components = connected_components(graph, directed=False)
    _, first, inverse = np.unique(components, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])
