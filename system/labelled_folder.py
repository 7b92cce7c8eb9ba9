"""A folder of images that are sorted by class, to evaluate a model on that has those classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from system import image_files
from system.errors import KnownError
from system.printable import printable

_MOST_NAMES = 10


class NotLabelled(KnownError):
    """A folder that is not sorted by the classes of the model."""


@dataclass(frozen=True)
class LabelledFolder:
    """The images below a folder for each class."""

    folder: Path
    images: list[tuple[Path, str]]
    """Each with the name of its folder."""
    left_out: list[Path]
    """Files that are no images, and images that lie in no class's folder."""
    told: Sequence[str] = ()
    """What else was found, a line each, where the labels are from a table."""

    def labels(self, class_names: Sequence[str], model: str) -> list[int]:
        """The index in `class_names` of each image's class.

        Raises:
            NotLabelled: a folder is named after no class of the model.
        """
        numbers = {name: index for index, name in enumerate(class_names)}
        beside = [file.relative_to(self.folder).parts for file in self.left_out]
        names = [name for _, name in self.images] + [parts[0] for parts in beside if len(parts) > 1]
        if unknown := list(dict.fromkeys(name for name in names if name not in numbers)):
            fix = "give the folder that holds a folder of images for each class, and nothing else"
            raise NotLabelled(
                f"{self.folder} holds {_listed(unknown)}, and {model} has the classes {_listed(class_names)}: "
                + (fix + self._further_down(class_names) if self.folder.is_dir() else "change those labels")
            )
        return [numbers[name] for _, name in self.images]

    def _further_down(self, class_names: Sequence[str]) -> str:
        """`, such as photos/test`, where a folder of this one holds folders for classes."""
        fitting = [
            inner
            for inner in image_files.folders(self.folder)
            if any(folder.name in class_names for folder in image_files.folders(inner))
        ]
        fitting.sort(key=lambda inner: "test" not in inner.name.casefold())
        return f", such as {printable(fitting[0])}" if fitting else ""

    def notes(self, class_names: Sequence[str]) -> list[str]:
        """What is not evaluated, each in one line: classes without images, and files that are none."""
        present = {name for _, name in self.images}
        missing = [name for name in class_names if name not in present]
        notes = [*self.told, *([f"no images of {_listed(missing)}"] if missing else [])]
        loose = [file for file in self.left_out if image_files.is_image(file)]
        if loose:
            are = "image that lies" if len(loose) == 1 else "images that lie"
            notes.append(f"left out {len(loose)} {are} in no class's folder: {_listed(file.name for file in loose)}")
        others = [file for file in self.left_out if file not in set(loose)]
        return notes + [note for note in [image_files.Found([], others).note] if note]


def read(folder: Path) -> LabelledFolder:
    """The images in each folder of `folder`, in the order of their paths, as `image_files` looks for them.

    Raises:
        NotLabelled: there are none.
    """
    if not folder.is_dir():
        raise NotLabelled(f"no folder {folder}")
    found = {entry: image_files.below(entry) for entry in image_files.folders(folder)}
    images = [(file, entry.name) for entry, files in found.items() for file in files.images]
    if not images:
        raise NotLabelled(
            f"{folder} holds no folder of images for each class; looked for {image_files.LOOKED_FOR}"
            if found
            else f"{folder} holds no folder: put the images of each class into one that is named after it"
        )
    left_out = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return LabelledFolder(folder, images, left_out + [file for files in found.values() for file in files.left_out])


def _listed(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - _MOST_NAMES} more" if len(shown) > _MOST_NAMES else ""
    return ", ".join(shown[:_MOST_NAMES]) + more
