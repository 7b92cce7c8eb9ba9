"""The run folder, as training writes it and everything after reads it: each name once, and who reads it.

`RunFolder.recipe` is a name, `RunFolder(path).recipe` the path of that file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import yaml

from archive import data_only
from archive.errors import IncompleteRun
from archive.strict_yaml import load as load_yaml
from handler import files, golden, labels
from handler.golden import Golden, GoldenMismatch

if TYPE_CHECKING:
    from handler.acceptance import Acceptance
    from handler.settings import AcceptSettings

_TRAIN = "`python -m train RECIPE --overwrite` writes the run folder anew"


class Entry:
    """A file or a folder of the run folder: its name on the class, its path on a run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, folder: None, owner: type[RunFolder]) -> str: ...
    @overload
    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path: ...
    def __get__(self, folder: RunFolder | None, owner: type[RunFolder]) -> str | Path:
        return self.name if folder is None else folder.path / self.name


class RunFolder:
    """Everything one training gives, and what was made of it since.

    A reader raises IncompleteRun, with the file and the fix, where the file is missing or not as training writes it.
    """

    recipe = Entry("recipe.yaml")
    weights = Entry("weights.safetensors")
    model = Entry("model.pt")
    exported_program = Entry("model.pt2")
    config = Entry(files.CONFIG_FILE)
    labels = Entry(files.LABELS_FILE)
    golden = Entry(files.GOLDEN)
    reference = Entry(files.REFERENCE_FILE)
    acceptance = Entry(files.ACCEPTANCE_FILE)
    metrics = Entry("metrics.json")
    provenance = Entry("provenance.json")
    report = Entry("report.html")
    card = Entry("MODEL_CARD.md")
    mistakes = Entry("mistakes.csv")
    label_issues = Entry("label-issues.csv")
    preview = Entry("preview.png")
    checkpoints = Entry("checkpoints")
    tensorboard = Entry("tensorboard")
    onnx = Entry(files.ONNX_FILE)
    int8 = Entry(files.INT8_FILE)
    quantisation = Entry("quantisation.json")
    pick = Entry("pick.json")

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoint(self) -> Path:
        """What `--resume` goes on from."""
        return self.checkpoints / "last.pt"

    @property
    def exact(self) -> Path:
        """What figures and golden answers are measured with: `model.onnx` where a run has no other model."""
        return self.onnx if self.onnx.exists() and not self.model.exists() else self.model

    def require(self, *names: str) -> None:
        """See that the files are there, and that the models among them are data alone.

        Raises:
            IncompleteRun: naming each of `names` that is missing.
            UnsafeFile: loading a model could run code, or reach other files.
        """
        if not self.path.is_dir():
            raise IncompleteRun(f"no run folder {self.path}: `python -m train RECIPE` writes one")
        if missing := [name for name in names if not (self.path / name).exists()]:
            raise IncompleteRun(f"{self.path} lacks {', '.join(missing)}: {_TRAIN}")
        for name in names:
            data_only.check(self.path / name)

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe, section → keys."""
        return self._read_yaml(self.recipe)

    def read_config(self) -> dict[str, Any]:
        """What TorchServe and the handler read."""
        return self._read_yaml(self.config)

    def read_class_names(self) -> list[str]:
        """In the order of the model's outputs."""
        with _reading(self.labels):
            return labels.read(self.labels)

    def read_figures(self) -> dict[str, Any]:
        """What the exported model reached on the held-out images; nothing where none had a label."""
        with _reading(self.metrics):
            return dict(_json(self.metrics)["test"] or {})

    def read_temperature(self) -> float:
        """The softmax temperature that was fitted to the validation images."""
        with _reading(self.metrics):
            return float(_json(self.metrics)["calibration"]["temperature"])

    def read_data_fingerprint(self) -> str:
        """SHA-256 of the data that the run was trained on."""
        with _reading(self.provenance):
            return str(_json(self.provenance)["data_sha256"])

    def read_json(self, path: Path) -> dict[str, Any]:
        """A JSON file of the run folder, whatever it holds."""
        with _reading(path):
            return dict(_json(path))

    def read_golden(self) -> Golden:
        """The answers that training measured for the golden images."""
        with _reading(self.golden):
            return golden.read(self.golden)

    def read_golden_images(self) -> list[bytes]:
        """The encoded golden images, in the order of their answers."""
        with _reading(self.golden):
            return golden.images(self.golden)

    def read_thresholds(self, wanted: AcceptSettings) -> Acceptance | None:
        """The thresholds by which a worker marks answers; None where none is wanted."""
        if not wanted.is_on:
            return None
        from handler.acceptance import Scores  # imports numpy, which names and other readers do without
        from handler.settings import SettingsError

        try:
            return Scores.read(self.acceptance).choose(wanted)
        except SettingsError as error:
            raise IncompleteRun(f"{self}: {error}") from None

    def _read_yaml(self, path: Path) -> dict[str, Any]:
        with _reading(path):
            document = load_yaml(path.read_text(encoding="utf-8"))
            if not isinstance(document, dict):
                raise TypeError(f"it holds {type(document).__name__} where keys and values belong")
            return document


NAMES = frozenset(entry.name for entry in vars(RunFolder).values() if isinstance(entry, Entry))
"""Of all that a run folder may hold."""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises:
    IncompleteRun: naming the file and the fix, whatever goes wrong in the block.
    """
    try:
        yield
    except FileNotFoundError:
        raise IncompleteRun(f"{path.parent} lacks {path.name}: {_TRAIN}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, GoldenMismatch, yaml.YAMLError) as error:
        raise IncompleteRun(f"{path} cannot be read ({' '.join(repr(error).split())}): {_TRAIN}") from None
