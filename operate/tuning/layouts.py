"""How a model is laid out on a server, and how to try a layout beside the version that is served.

What a server starts with is what the archive's `model-config.yaml` says: TorchServe takes workers, batch size and delay
from there, and our handler its threads. So a layout is tried as a copy of the archive that differs in that file and in
its version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from archive.content import ArchiveContent
from archive.errors import InvalidArchive
from archive.members import MANIFEST_FILE
from client.errors import ModelNotFound
from client.torchserve import TorchServe
from handler import torchserve_defaults
from operate import golden
from operate.errors import NotAsMeasured, NotTunable
from system import files

_VERSION_PREFIX = "tune-"
_READY_TIMEOUT_S = float(torchserve_defaults.TIMEOUT_S)


@dataclass(frozen=True)
class Layout:
    """What of a recipe's `serving` decides on throughput and latency."""

    workers: int
    batch_size: int
    max_batch_delay_ms: int
    threads: int | None = None
    """Of each worker; None leaves them to it: its share of the cores, or one where several are no faster."""

    @property
    def version(self) -> str:
        numbers = (self.workers, self.batch_size, self.max_batch_delay_ms, self.threads)
        return _VERSION_PREFIX + "-".join(str(number) for number in numbers if number is not None)

    @property
    def settings(self) -> dict[str, int]:
        """What TorchServe reads; the threads are the handler's."""
        from archive.serving import workers_and_batches  # imports pydantic, which takes time that --help saves

        return workers_and_batches(self.workers, self.batch_size, self.max_batch_delay_ms)


def changed(config: Any, layout: Layout, source: Path) -> dict[str, Any]:
    """A `model-config.yaml` with this layout.

    Raises:
        NotTunable: it has no keys, or no handler that could be given threads.
    """
    if not isinstance(config, dict):
        raise NotTunable(f"{source}: expected keys and values, found {type(config).__name__}")
    handler = config.get("handler") or {}
    if layout.threads is None and "threads" not in handler:
        return config | layout.settings
    if not isinstance(handler, dict) or not handler:
        raise NotTunable(f"{source}: its section handler has no keys, so no worker would take {layout.threads} threads")
    return config | layout.settings | {"handler": handler | {"threads": layout.threads}}


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
            named = _uninterrupted(lambda: server.register(copy.name, layout.workers, _READY_TIMEOUT_S, model))
        except ModelNotFound:
            raise NotTunable(f"the server has no {copy.name}: name its own model store with --model-store") from None
        finally:
            copy.unlink(missing_ok=True)
        yield named
    finally:
        with suppress(ModelNotFound):
            _uninterrupted(lambda: server.unregister(model, layout.version))


def _uninterrupted(call: Callable[[], str]) -> str:
    """An interruption waits for the answer: what the server does after that would stay."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


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
    content = ArchiveContent(archive)
    try:
        if content.config_file is None:
            raise InvalidArchive.of(archive, f"{MANIFEST_FILE} names no configFile")
        manifest = content.document(MANIFEST_FILE)
        manifest["model"] = {**content.model, "modelVersion": layout.version}
        config = changed(content.config, layout, archive / content.config_file)
        ours = {MANIFEST_FILE: json.dumps(manifest), content.config_file: yaml.safe_dump(config, sort_keys=False)}
        with files.replacing(target) as arriving:
            content.copy(arriving, ours)
    except InvalidArchive as error:
        raise NotTunable(f"{archive} cannot be varied: {error}") from None
