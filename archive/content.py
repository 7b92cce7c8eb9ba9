"""What a `.mar` of any origin says of itself: the model's name and version, its settings and its golden images."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from archive.canonical import MAX_READ_BYTES, Section
from archive.data_only import strict_json
from archive.errors import InvalidArchive
from archive.members import MANIFEST_FILE
from archive.run_folder import RunFolder
from archive.strict_yaml import load as load_yaml


def opened(path: Path) -> BinaryIO:
    """An archive to read. Nothing that lies there makes this wait or fail otherwise.

    Raises:
        InvalidArchive: it cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArchive(f"cannot read {path}: {error.strerror or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidArchive(f"cannot read {path}: it is no regular file")
    return os.fdopen(descriptor, "rb")


class ArchiveContent:
    """One archive. A file of it is read when it is first asked for, and then kept.

    Nothing here trusts the archive, and nothing proves it: `archive.verify` does. Whatever is asked for raises
    InvalidArchive, with the archive's name, where it cannot be read.
    """

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        """
        Args:
            file: read this, which is open, and never the path: whatever lies there by now, it is the same content.
        """
        self.path, self.file = path, file

    @cached_property
    def model(self) -> dict[str, Any]:
        """The manifest's section `model`, by which TorchServe goes; it has a name and a version."""
        model = self.document(MANIFEST_FILE).get("model")
        named = [model.get(key) for key in ("modelName", "modelVersion")] if isinstance(model, dict) else [None]
        if not isinstance(model, dict) or not all(isinstance(name, str) for name in named):
            raise InvalidArchive.of(self.path, f"{MANIFEST_FILE} names no model and version")
        return model

    @property
    def name(self) -> str:
        return str(self.model["modelName"])

    @property
    def version(self) -> str:
        return str(self.model["modelVersion"])

    @property
    def model_file(self) -> str:
        """What workers load."""
        return str(self.model.get("serializedFile"))

    @property
    def config_file(self) -> str | None:
        """What TorchServe reads the model's settings from; `model-config.yaml` in ours, and others may have none."""
        name = self.model.get("configFile")
        if not isinstance(name, str | None):
            raise InvalidArchive.of(self.path, f"{MANIFEST_FILE}: configFile is no name of a file")
        return name

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The settings, None where the archive has none."""
        if not self.config_file:
            return None
        try:
            config = load_yaml(self.read(self.config_file))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = f"{self.config_file} is not YAML, so its workers would never load: {' '.join(str(error).split())}"
            raise InvalidArchive.of(self.path, problem) from None
        if not isinstance(config, dict):
            raise InvalidArchive.of(self.path, f"{self.config_file}: expected keys and values")
        return config

    def document(self, name: str) -> dict[str, Any]:
        """The object that a JSON file holds."""
        try:
            document = strict_json(self.read(name))
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise InvalidArchive.of(self.path, f"{name!r} is no JSON object")
        return document

    def read(self, name: str) -> bytes:
        """A file that says something of the model, so not the model itself."""
        with self._reading(), self._opened() as archive:
            if name not in archive.namelist():
                raise InvalidArchive.of(self.path, f"it lacks {name}")
            with archive.open(name) as member:
                content = member.read(MAX_READ_BYTES + 1)
        if len(content) > MAX_READ_BYTES:
            raise InvalidArchive.of(self.path, f"{name!r} has more than the {MAX_READ_BYTES} bytes allowed")
        return content

    @contextmanager
    def golden(self) -> Iterator[zipfile.Path]:
        """The golden images and their answers, as the folder `golden/` of the run."""
        with self._opened() as archive:
            yield zipfile.Path(archive, f"{RunFolder.golden}/")

    def checksums(self) -> dict[str, int]:
        """The CRC-32 of each member."""
        with self._opened() as archive:
            return {info.filename: info.CRC for info in archive.infolist()}

    def extract(self, folder: Path) -> None:
        """Unpack everything into a folder. The archive must have been verified."""
        with self._reading(), self._opened() as archive:
            archive.extractall(folder)

    def copy(self, target: Path, changed: Mapping[str, str]) -> None:
        """Write the same archive with another text in some members. It serves, and `archive.verify` refuses it."""
        with self._reading(), self._opened() as archive, zipfile.ZipFile(target, "w") as copy:
            for info in archive.infolist():
                if info.filename in changed:
                    copy.writestr(info.filename, changed[info.filename])
                    continue
                with archive.open(info) as member, copy.open(info.filename, "w") as file:
                    shutil.copyfileobj(member, file)

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        with ExitStack() as stack:
            with self._reading():
                try:
                    file = self.file or stack.enter_context(opened(self.path))
                    section = Section(file, 0, file.seek(0, os.SEEK_END))
                    archive = stack.enter_context(zipfile.ZipFile(section))
                except OSError as error:
                    raise InvalidArchive(f"cannot read {self.path}: {error.strerror or error}") from None
            yield archive

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (InvalidArchive, OSError):
            raise
        except Exception as error:  # zipfile raises anything from struct.error to NotImplementedError on hostile files
            raise InvalidArchive.unreadable(self.path, error) from None
