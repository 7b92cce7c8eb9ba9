"""Check an archive before anything of it is unpacked or run.

Digests show damage and careless changes. Everyone who can write an archive can also write its digests: only a signature
shows who built it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from archive import canonical, content, data_only
from archive.canonical import Entry, Section
from archive.content import ArchiveContent
from archive.errors import InvalidArchive, InvalidName
from archive.members import GATE_FILE, HANDLER_FILE, MANIFEST_FILE, MODEL_FILES, REQUIRED, check_name, is_known
from archive.run_folder import RunFolder
from handler.identity import DIGESTS_FILE

RUNTIME = "python"
"""TorchServe's name for its own workers; others run what the manifest says."""


@dataclass(frozen=True)
class Verified:
    """What an archive that passed says of itself."""

    model_name: str
    version: str
    digest: str
    """SHA-256 of `digests.json`: one number for everything in the archive."""
    members: int
    size_bytes: int
    signed: bool
    """Whether a signature was checked."""
    forced: bool
    """Whether it was shipped although it did not meet the gate of its recipe."""


def verify(path: Path, public_key: Path | None = None) -> Verified:
    """Check the whole archive, and with a public key also its signature, which lies beside it as `NAME.mar.sig`.

    Raises:
        InvalidArchive: naming the archive and what is wrong in it.
        SignatureError: there is no signature by the owner of `public_key`.
    """
    with opened(path, public_key) as (verified, _):
        return verified


@contextmanager
def opened(path: Path, public_key: Path | None = None) -> Iterator[tuple[Verified, ArchiveContent]]:
    """Check an archive as `verify` does, and hand out the very content that was checked, whatever lies there later.

    Raises:
        InvalidArchive, SignatureError: as `verify`.
    """
    with content.opened(path) as file:
        before = os.fstat(file.fileno())
        verified, held = _verify(path, file, public_key)
        if _was_written(before, os.fstat(file.fileno())):
            raise InvalidArchive.of(path, "it was changed while it was read")
        yield verified, held


def _verify(path: Path, file: BinaryIO, public_key: Path | None) -> tuple[Verified, ArchiveContent]:
    if public_key is not None:
        from archive import sign

        sign.check(path, file, public_key)
    held = ArchiveContent(path, file)
    try:
        entries = canonical.read(path, file)
    except InvalidArchive:
        if _is_stock(held):
            raise InvalidArchive(
                f"{path} was not built by `python -m archive build`: it has no {DIGESTS_FILE}, so nothing tells "
                "whether it is as it was made. torch-model-archiver alone makes such archives, and TorchServe serves "
                "them unchecked"
            ) from None
        raise
    if missing := sorted(REQUIRED - set(entries)):
        raise InvalidArchive.of(path, f"it lacks {', '.join(missing)}")
    if unknown := [name for name in entries if not is_known(name)]:
        raise InvalidArchive.of(path, f"it holds {', '.join(unknown)}, which no archive of ours has")
    _check_digests(held, entries)
    _check_manifest(held, entries)
    for entry in entries.values():
        section = cast("BinaryIO", Section(file, entry.offset, entry.size))
        if problem := data_only.problem(section, Path(entry.name).suffix):
            raise InvalidArchive.of(path, f"{entry.name!r}{problem}")
    if held.config is None:
        raise InvalidArchive.of(path, f"{MANIFEST_FILE} names no settings")
    verified = Verified(
        model_name=held.name,
        version=held.version,
        digest=entries[DIGESTS_FILE].sha256,
        members=len(entries),
        size_bytes=os.fstat(file.fileno()).st_size,
        signed=public_key is not None,
        forced=held.document(GATE_FILE).get("forced") is not False,
    )
    return verified, held


def _was_written(before: os.stat_result, after: os.stat_result) -> bool:
    """A file that lost its name, as one does that is replaced, still has the content that was checked."""
    kept = after.st_nlink == 0 or before.st_ctime_ns == after.st_ctime_ns
    return not kept or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def _is_stock(held: ArchiveContent) -> bool:
    """Whether it has a manifest and no digests, as torch-model-archiver makes archives."""
    try:
        return MANIFEST_FILE in (names := held.checksums()) and DIGESTS_FILE not in names
    except InvalidArchive:
        return False


def _check_digests(held: ArchiveContent, entries: Mapping[str, Entry]) -> None:
    document = held.document(DIGESTS_FILE)
    listed = document.get("members")
    if document.get("algorithm") != "sha256" or not isinstance(listed, dict):
        raise InvalidArchive.of(held.path, f"{DIGESTS_FILE} is no list of SHA-256 digests")
    members = set(entries) - {DIGESTS_FILE}
    if missing := sorted(set(listed) - members):
        raise InvalidArchive.of(held.path, f"it lacks {', '.join(missing)}, which {DIGESTS_FILE} lists")
    if extra := sorted(members - set(listed)):
        raise InvalidArchive.of(held.path, f"it holds {', '.join(extra)}, which {DIGESTS_FILE} does not list")
    for name, expected in listed.items():
        if expected != {"sha256": entries[name].sha256, "size": entries[name].size}:
            problem = f"{name!r} is not what {DIGESTS_FILE} says: it was changed or damaged"
            raise InvalidArchive.of(held.path, problem)


def _check_manifest(held: ArchiveContent, entries: Collection[str]) -> None:
    """By it TorchServe chooses what to run and what to install: not one key more than `archive build` writes."""
    manifest = held.document(MANIFEST_FILE)
    try:
        check_name(held.name, held.version)
    except InvalidName as error:
        raise InvalidArchive.of(held.path, f"{MANIFEST_FILE}: {error}") from None
    carried = [name for name in MODEL_FILES if name in entries]
    if not carried or len(set(carried) - {RunFolder.onnx}) > 1:
        raise InvalidArchive.of(held.path, f"it must carry one of {' and '.join(MODEL_FILES)}")
    expected = {"serializedFile": carried[0], "handler": HANDLER_FILE, "configFile": RunFolder.config}
    found = {key: value for key, value in held.model.items() if key not in ("modelName", "modelVersion")}
    if found != expected:
        problem = f"{MANIFEST_FILE} must make TorchServe use {expected} and nothing else, found {found}"
        raise InvalidArchive.of(held.path, problem)
    if manifest.keys() != {"runtime", "model", "archiverVersion"}:
        problem = (
            f"{MANIFEST_FILE} must have runtime, model and archiverVersion, found {', '.join(map(repr, manifest))}"
        )
        raise InvalidArchive.of(held.path, problem)
    if manifest["runtime"] != RUNTIME or not isinstance(manifest["archiverVersion"], str):
        problem = f"{MANIFEST_FILE} must make TorchServe run {RUNTIME}, found {manifest['runtime']!r:.100}"
        raise InvalidArchive.of(held.path, problem)
