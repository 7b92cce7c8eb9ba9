"""Which images are kept aside: a share of every class where there are enough, and never a part of a group.

Images of one group (copies of each other, one patient, one video) lie on one side together. Shares are counted in
images, whatever the size of the groups, and a group counts for every class that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split


@dataclass(frozen=True)
class _Group:
    members: np.ndarray
    classes: np.ndarray
    counts: np.ndarray
    """Images of each of the classes."""


def split(
    labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int, *, every_class: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Indices of the images that stay and of those kept aside.

    Args:
        labels: int[N].
        groups: int[N], the same number for images that stay together.
        every_class: whether at least one group of every class is kept aside, where that leaves another one.

    Returns:
        Both, and whether those aside are about `fraction` of every class. A class of a single group stays whole.
    """
    if len(np.unique(groups)) == len(groups):
        try:
            kept, aside = train_test_split(
                np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
            )
            if not every_class or len(np.unique(labels[aside])) == len(np.unique(labels)):
                return kept, aside, True
        except ValueError:  # fewer images than classes on one side, or a class of one
            pass
    units = _shuffled(labels, groups, seed)
    chosen = _chosen(units, labels, fraction, every_class)
    kept = np.concatenate([unit.members for index, unit in enumerate(units) if index not in chosen])
    aside = np.concatenate([np.empty(0, int), *(units[index].members for index in chosen)])
    wanted = fraction * np.bincount(labels)
    missed = np.abs(np.bincount(labels[aside], minlength=len(wanted)) - wanted)
    present = set(labels.tolist()) == set(labels[aside].tolist())
    return kept, aside, present and bool((missed <= np.maximum(1, wanted / 2)).all())


def folds(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Indices of the images in each of `count` folds, with about equal shares of every class.

    Each group, large ones first, goes to the fold that has least of its classes. None stays empty.

    Args:
        labels, groups: as `split` takes them, of at least `count` groups.
    """
    in_class = np.bincount(labels)
    in_fold = np.zeros((count, len(in_class)), int)
    dealt: list[list[np.ndarray]] = [[] for _ in range(count)]
    for unit in sorted(_shuffled(labels, groups, seed), key=lambda unit: -len(unit.members)):
        alike = in_fold[:, unit.classes] @ (unit.counts / in_class[unit.classes] ** 2)
        fold = np.lexsort((in_fold.sum(1), alike))[0]
        in_fold[fold, unit.classes] += unit.counts
        dealt[fold].append(unit.members)
    return [np.sort(np.concatenate(members)) for members in dealt]


def _shuffled(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[_Group]:
    by_group = np.argsort(groups, kind="stable")
    starts = np.unique(groups[by_group], return_index=True)[1]
    units = [
        _Group(members, *np.unique(labels[members], return_counts=True)) for members in np.split(by_group, starts[1:])
    ]
    return [units[index] for index in np.random.default_rng(seed).permutation(len(units))]


def _chosen(units: list[_Group], labels: np.ndarray, fraction: float, every_class: bool) -> dict[int, None]:
    """Indices of the groups to keep aside, so that the images of each class come nearest to the fraction.

    No class gives more than half of its groups, or the fraction where that is more, and none its last.
    """
    of_class: list[list[int]] = [[] for _ in np.bincount(labels)]
    turns = np.empty(len(units), int)
    for index, unit in enumerate(units):
        turns[index] = len(of_class[unit.classes[unit.counts.argmax()]])
        for label in unit.classes:
            of_class[label].append(index)
    in_class = np.array([len(indices) for indices in of_class])
    most = np.minimum(in_class - 1, np.maximum(1, (max(fraction, 0.5) * in_class).astype(int)))
    wanted = fraction * np.bincount(labels)
    taken, images = np.zeros_like(in_class), np.zeros_like(in_class)
    chosen: dict[int, None] = {}

    def is_free(index: int) -> bool:
        return index not in chosen and bool((taken < most)[units[index].classes].all())

    def comes_nearer(index: int) -> bool:
        unit = units[index]
        return bool((images[unit.classes] + unit.counts / 2 <= wanted[unit.classes]).all())

    def take(index: int) -> None:
        chosen[index] = None
        taken[units[index].classes] += 1
        images[units[index].classes] += units[index].counts

    for label in np.argsort(in_class, kind="stable") if every_class else ():
        free = [index for index in of_class[label] if not images[label] and is_free(index)]
        if free:
            take(min(free, key=lambda index: 0 if comes_nearer(index) else len(units[index].members)))
    in_turn = np.argsort(turns, kind="stable").tolist()
    for even_if_too_many in (False, True):
        for index in in_turn:
            unit = units[index]
            if images.sum() + len(unit.members) / 2 > wanted.sum() or not is_free(index):
                continue
            if comes_nearer(index) or (even_if_too_many and not images[unit.classes].any()):
                take(index)
    free = [] if chosen else [index for index in in_turn if is_free(index)]
    if free:
        take(min(free, key=lambda index: len(units[index].members)))
    return chosen
