"""How a model is laid out on a server, and how to try a layout beside the version that is served.

What a server starts with is what the archive's `model-config.yaml` says: TorchServe takes workers, batch size and delay
from there, and our handler its threads. So a layout is tried as a copy of the archive that differs in that file and in
its version.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from client import golden
from client.errors import ModelNotFound, NotAsMeasured, NotTunable
from client.manifest import MANIFEST_FILE
from client.torchserve import TorchServe

CONFIG_FILE = "model-config.yaml"
_VERSION_PREFIX = "tune-"
_READY_TIMEOUT_S = 120.0
_HANDLER_SECTION = re.compile(r"^handler:[^\n]*\n((?:(?:[ \t]+[^\n]*|[ \t]*#[^\n]*|)(?:\n|\Z))*)", re.MULTILINE)


@dataclass(frozen=True)
class Layout:
    """What of `model-config.yaml` decides on throughput and latency."""

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
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch_size,
            "maxBatchDelay": self.max_batch_delay_ms,
        }


def rewritten(text: str, layout: Layout, source: Path) -> str:
    """A `model-config.yaml` with this layout, and every other line and comment as it was.

    Raises:
        NotTunable: it is not YAML that has a key on each line, or has no handler that could be given threads.
    """
    changed = text
    for key, value in layout.settings.items():
        changed, found = re.subn(_line(key), f"{key}: {value}", changed, flags=re.MULTILINE)
        if not found:
            changed = f"{changed.rstrip()}\n{key}: {value}\n".lstrip()
    try:
        document = yaml.safe_load(text) or {}
        wanted = {**document, **layout.settings}
        if layout.threads is not None or "threads" in (document.get("handler") or {}):
            wanted["handler"] = {**document["handler"], "threads": layout.threads}
            changed = _HANDLER_SECTION.sub(lambda found: _with_threads(found, layout.threads), changed)
        if yaml.safe_load(changed) == wanted:
            return changed
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        pass
    by_hand = f"{layout.settings}" + (f" and threads: {layout.threads} of handler" if layout.threads else "")
    raise NotTunable(f"{source}: expected YAML with a line for each key; write {by_hand} into it by hand")


def _line(key: str) -> str:
    """What a key and its value match where they are a line, but for a comment after them."""
    return rf"^{key}:[^\n#]*?(?=\s*(?:#.*)?$)"


def _with_threads(section: re.Match[str], threads: int | None) -> str:
    """The section `handler`, with these threads where they stood or in a first line."""
    lines, key = section[1], f"threads: {'null' if threads is None else threads}"
    [indent, *_] = re.findall(r"^[ \t]+(?=[^\s#])", lines, re.MULTILINE)
    changed, found = re.subn(_line(f"{indent}threads"), f"{indent}{key}", lines, flags=re.MULTILINE)
    return section[0].removesuffix(lines) + (changed if found else f"{indent}{key}\n{lines}")


def write(run: Path, layout: Layout) -> None:
    """Put the layout into a run folder's `model-config.yaml`.

    Raises:
        NotTunable: as `rewritten`, or it has none. Nothing was changed.
    """
    file = run / CONFIG_FILE
    arriving = file.with_name(f".{CONFIG_FILE}.partial")
    text = read_config(run)
    try:
        arriving.write_text(rewritten(text, layout, file), encoding="utf-8")
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
            _uninterrupted(lambda: server.register(copy.name, layout.workers, _READY_TIMEOUT_S, model))
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
            manifest = json.loads(source.read(MANIFEST_FILE))
            manifest["model"]["modelVersion"] = layout.version
            config = rewritten(source.read(CONFIG_FILE).decode(), layout, archive / CONFIG_FILE)
            changed = {MANIFEST_FILE: json.dumps(manifest), CONFIG_FILE: config}
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
