"""How a model is laid out on a server, and how to try a layout beside the version that is served.

TorchServe takes workers, batch size and delay from the archive's `model-config.yaml` alone, whatever the call that
registers it says. So a layout is tried as a copy of the archive that differs in that file and in its version.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from client import golden
from client.errors import ModelNotFound, NotAsMeasured, NotTunable
from client.torchserve import TorchServe

CONFIG_FILE = "model-config.yaml"
_MANIFEST_FILE = "MAR-INF/MANIFEST.json"
_VERSION_PREFIX = "tune-"
_READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Layout:
    """What of `model-config.yaml` decides on throughput and latency."""

    workers: int
    batch_size: int
    max_batch_delay_ms: int

    @property
    def version(self) -> str:
        return f"{_VERSION_PREFIX}{self.workers}-{self.batch_size}-{self.max_batch_delay_ms}"

    @property
    def settings(self) -> dict[str, int]:
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch_size,
            "maxBatchDelay": self.max_batch_delay_ms,
        }

    def threads(self, cores: int) -> int:
        """Of each worker, as the handler takes them: its share of the cores."""
        return max(1, cores // self.workers)


def rewritten(text: str, settings: Mapping[str, int], source: Path) -> str:
    """A `model-config.yaml` with these settings, and every other line and comment as it was.

    Raises:
        NotTunable: it is not YAML that has a key on each line.
    """
    changed = text
    for key, value in settings.items():
        changed, found = re.subn(rf"^{key}:[^\n#]*?(?=\s*(?:#.*)?$)", f"{key}: {value}", changed, flags=re.MULTILINE)
        if not found:
            changed = f"{changed.rstrip()}\n{key}: {value}\n".lstrip()
    try:
        wanted = {**(yaml.safe_load(text) or {}), **settings}
        if yaml.safe_load(changed) == wanted:
            return changed
    except (yaml.YAMLError, TypeError):
        pass
    raise NotTunable(f"{source}: expected YAML with a line for each key; write {settings} into it by hand")


def write(run: Path, layout: Layout) -> None:
    """Put the layout into a run folder's `model-config.yaml`.

    Raises:
        NotTunable: as `rewritten`, or it has none. Nothing was changed.
    """
    file = run / CONFIG_FILE
    arriving = file.with_name(f".{CONFIG_FILE}.partial")
    text = read_config(run)
    try:
        arriving.write_text(rewritten(text, layout.settings, file), encoding="utf-8")
        arriving.replace(file)
    finally:
        arriving.unlink(missing_ok=True)


def read_config(run: Path) -> str:
    """The text of a run folder's `model-config.yaml`.

    Raises:
        NotTunable: it has none.
    """
    try:
        return (run / CONFIG_FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise NotTunable(f"{run} is no run folder: {CONFIG_FILE}: {error.strerror}") from None


def find_archive(server: TorchServe, model: str, model_store: Path) -> Path:
    """The file that the default version of a model was registered from, which a rollout may have renamed to NAME.mar.

    Raises:
        NotTunable: it is not in `model_store`.
    """
    registered = model_store / Path(server.describe(model)["modelUrl"]).name
    for archive in (registered, model_store / f"{model}.mar"):
        if archive.is_file():
            return archive
    raise NotTunable(f"{registered} is not there: name the model store of this very server with --model-store")


@contextmanager
def registered(server: TorchServe, model: str, archive: Path, layout: Layout) -> Iterator[str]:
    """NAME/VERSION of a model in this layout, ready, as long as the context lasts; the default version stays.

    Raises:
        ModelApiOff: the server does not let models be registered.
        NotTunable: the archive cannot be varied, or is not in the server's own model store.
    """
    copy = archive.with_name(f"{archive.stem}.{layout.version}.mar")
    try:
        try:
            _copy(archive, copy, layout)
            _uninterrupted(lambda: server.register(copy.name, layout.workers, _READY_TIMEOUT_S))
        except ModelNotFound:
            raise NotTunable(f"the server has no {copy.name}: name its own model store with --model-store") from None
        finally:
            copy.unlink(missing_ok=True)
        server.wait_until_ready(f"{model}/{layout.version}", _READY_TIMEOUT_S)
        yield f"{model}/{layout.version}"
    finally:
        with suppress(ModelNotFound):
            _uninterrupted(lambda: server.unregister(model, layout.version))


def _uninterrupted(call: Callable[[], str]) -> None:
    """Whoever interrupts waits for the answer: what the server does after that would stay."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def clear(server: TorchServe, model: str, archive: Path) -> None:
    """Remove what a killed run may have left."""
    for file in archive.parent.glob(f"{archive.stem}.{_VERSION_PREFIX}*"):
        file.unlink()
    for version in server.versions(model):
        if version.startswith(_VERSION_PREFIX):
            server.unregister(model, version)


def golden_images(archive: Path) -> list[bytes]:
    """The images that an archive carries.

    Raises:
        NotTunable: none, or it is no archive.
    """
    try:
        return [image.data for image in golden.read(archive)]
    except NotAsMeasured as error:
        raise NotTunable(f"{archive} cannot be varied on its own images: name some with --images ({error})") from None


def _copy(archive: Path, target: Path, layout: Layout) -> None:
    arriving = target.with_suffix(".partial")
    try:
        with _opened(archive) as source, zipfile.ZipFile(arriving, "w") as copy:
            manifest = json.loads(source.read(_MANIFEST_FILE))
            manifest["model"]["modelVersion"] = layout.version
            config = rewritten(source.read(CONFIG_FILE).decode(), layout.settings, archive / CONFIG_FILE)
            changed = {_MANIFEST_FILE: json.dumps(manifest), CONFIG_FILE: config}
            for info in source.infolist():
                if info.filename in changed:
                    copy.writestr(info.filename, changed[info.filename])
                    continue
                with source.open(info) as member, copy.open(info.filename, "w") as file:
                    shutil.copyfileobj(member, file)
        arriving.replace(target)
    finally:
        arriving.unlink(missing_ok=True)


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as members:
            yield members
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise NotTunable(f"{archive} cannot be varied: {error}") from None
