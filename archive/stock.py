"""Archives of other makers, for TorchServe's own `image_classifier`: what they hold, without loading any of it."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from archive.errors import ArchiveError
from handler.files import LABELS_FILE
from system.errors import reason

HANDLER = "image_classifier"
_MOST_BYTES, _MOST_MEMBERS = 8 << 30, 10_000
_OTHERS = ("object_detector", "image_segmenter", "text_classifier", "text_handler", "densenet_handler")


@dataclass(frozen=True)
class StockArchive:
    """An unpacked archive whose handler is TorchServe's `image_classifier`."""

    folder: Path
    manifest: dict[str, Any]
    model_file: str | None
    """Code that builds the network, which the handler runs."""
    serialized_file: str
    class_names: list[str] | None


def unpack(mar: Path, folder: Path) -> StockArchive:
    """Unpack `mar` into the new folder `folder`, and tell what is what.

    Raises:
        ArchiveError: it is no archive, unsafe to unpack, or for another handler, with what to do.
    """
    try:
        with zipfile.ZipFile(mar) as archive:
            manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
            model = dict(manifest["model"])
            _check_handler(mar, str(model.get("handler", "")))
            _extract(archive, folder)
        names = None
        if (folder / LABELS_FILE).is_file():
            names = labels(json.loads((folder / LABELS_FILE).read_text(encoding="utf-8")))
    except ArchiveError:
        raise
    except Exception as error:  # zipfile and json raise what they like on damaged files
        raise ArchiveError(f"{mar} cannot be read as a TorchServe archive ({reason(error)}): copy it again") from None
    for key in ("modelFile", "serializedFile"):
        if (name := model.get(key)) and (PurePosixPath(name).name != name or not (folder / name).is_file()):
            raise ArchiveError(f"{mar} names {name!r:.50} as its {key} and does not hold it: archive the model again")
    if not model.get("serializedFile"):
        raise ArchiveError(f"{mar} holds no weights (serializedFile), so its model is random: archive it with them")
    return StockArchive(folder, manifest, model.get("modelFile"), model["serializedFile"], names)


def _check_handler(mar: Path, handler: str) -> None:
    name = handler.partition(":")[0]
    if name == HANDLER:
        return
    if name == f"{HANDLER}.py":
        raise ArchiveError(f"{mar} brings its own {name}, as the archives of this project do: serve it as it is")
    if name in _OTHERS:
        raise ArchiveError(f"{mar} is for the handler {name}, and only those of {HANDLER} can be adopted")
    raise ArchiveError(
        f"{mar} has a handler of its own, {name!r:.60}, whose preprocessing is unknown: unzip it, and adopt the model "
        "file in it with the settings that its code says"
    )


def _extract(archive: zipfile.ZipFile, folder: Path) -> None:
    infos = archive.infolist()
    if len(infos) > _MOST_MEMBERS or sum(info.file_size for info in infos) > _MOST_BYTES:
        raise ArchiveError(f"{archive.filename} unpacks to more than {_MOST_BYTES >> 30} GB or {_MOST_MEMBERS} files")
    folder.mkdir()
    for info in infos:
        parts = PurePosixPath(info.filename).parts
        if info.filename.startswith("/") or ".." in parts or "\\" in info.filename:
            raise ArchiveError(f"{archive.filename} holds {info.filename!r:.80}, which leads out of it")
        if info.is_dir():
            continue
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)


def labels(document: Any) -> list[str]:
    """Class names by `index_to_name.json` in each shape that TorchServe knows, in the order of the outputs.

    Names that several classes share get their number, or their WordNet id where the file has it: an answer has one
    probability for each name.

    Raises:
        ValueError: it has another shape.
    """
    if isinstance(document, dict) and isinstance(document.get("object_type_names"), list):
        document = document["object_type_names"]
    if isinstance(document, list):
        document = {str(index): name for index, name in enumerate(document)}
    if not isinstance(document, dict) or not document:
        raise ValueError("it maps no index to a name")
    if set(document) != {str(index) for index in range(len(document))}:
        raise ValueError(f"its {len(document)} entries are not numbered 0 to {len(document) - 1}")
    entries = [document[str(index)] for index in range(len(document))]
    names = [entry[-1] if isinstance(entry, list) and entry else entry for entry in entries]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{wrong[0]!r:.50} is no name")
    ids = [entry[0] if isinstance(entry, list) and len(entry) > 1 else index for index, entry in enumerate(entries)]
    return [name if names.count(name) == 1 else f"{name} ({number})" for name, number in zip(names, ids, strict=True)]
