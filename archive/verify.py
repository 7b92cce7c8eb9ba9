"""Check an archive before anything of it is unpacked or run.

Digests show damage and careless changes. Whoever can write an archive can also write its digests: that it comes from
whom you trust is shown by a signature, and by nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from archive import layout
from archive.errors import InvalidArchive, InvalidName
from archive.layout import Entry
from archive.members import (
    CONFIG_FILE,
    GATE_FILE,
    HANDLER_FILE,
    MANIFEST_FILE,
    REQUIRED,
    SERIALIZED_FILE,
    is_known,
)
from archive.names import check_name
from handler.identity import DIGESTS_FILE

_MAX_JSON_BYTES = 4_000_000


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
    """Whether it was shipped although it was worse than its recipe allows."""


def verify(path: Path, public_key: Path | None = None) -> Verified:
    """Check the whole archive, and with a public key also its signature, which lies beside it as `NAME.mar.sig`.

    Raises:
        InvalidArchive: naming the archive and what is wrong in it.
        SignatureError: there is no signature by the owner of `public_key`.
    """
    if public_key is not None:
        from archive import sign

        sign.check(path, public_key)
    try:
        with path.open("rb") as file:
            return _verify(file, signed=public_key is not None)
    except OSError as error:
        raise InvalidArchive(f"cannot read {path}: {error.strerror}") from None
    except InvalidArchive as error:
        raise InvalidArchive(f"{path}: {error}. Do not serve it: build or fetch it again") from None


def _verify(file: BinaryIO, *, signed: bool) -> Verified:
    entries = {entry.name: entry for entry in layout.read(file)}
    if missing := sorted(REQUIRED - set(entries)):
        raise InvalidArchive(f"it lacks {', '.join(missing)}")
    if unknown := [name for name in entries if not is_known(name)]:
        raise InvalidArchive(f"it holds {', '.join(unknown)}, which no archive of ours has")
    digests = _document(file, entries[DIGESTS_FILE])
    _check_digests(file, entries, digests)
    model = _check_manifest(_document(file, entries[MANIFEST_FILE]))
    for entry in entries.values():
        if entry.name.endswith(".pt"):
            _check_torchscript(file, entry)
    return Verified(
        model_name=model["modelName"],
        version=model["modelVersion"],
        digest=hashlib.sha256(b"".join(layout.content(file, entries[DIGESTS_FILE]))).hexdigest(),
        members=len(entries),
        size_bytes=file.seek(0, 2),
        signed=signed,
        forced=_document(file, entries[GATE_FILE]).get("forced") is not False,
    )


def _check_digests(file: BinaryIO, entries: Mapping[str, Entry], digests: Mapping[str, Any]) -> None:
    listed = digests.get("members")
    if digests.get("algorithm") != "sha256" or not isinstance(listed, dict):
        raise InvalidArchive(f"{DIGESTS_FILE} is no list of SHA-256 digests")
    held = set(entries) - {DIGESTS_FILE}
    if missing := sorted(set(listed) - held):
        raise InvalidArchive(f"it lacks {', '.join(missing)}, which {DIGESTS_FILE} lists")
    if extra := sorted(held - set(listed)):
        raise InvalidArchive(f"it holds {', '.join(extra)}, which {DIGESTS_FILE} does not list")
    for name, expected in listed.items():
        digest, crc, size = hashlib.sha256(), 0, 0
        for chunk in layout.content(file, entries[name]):
            digest.update(chunk)
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        if expected != {"sha256": digest.hexdigest(), "size": size}:
            raise InvalidArchive(f"{name!r} is not what {DIGESTS_FILE} says: it was changed or damaged")
        if crc != entries[name].crc:
            raise InvalidArchive(f"the checksum in the header of {name!r} is wrong: it cannot be unpacked")


def _check_manifest(manifest: Mapping[str, Any]) -> Mapping[str, str]:
    """The section `model`, which tells TorchServe what to run and what to install."""
    model = manifest.get("model")
    expected = {"serializedFile": SERIALIZED_FILE, "handler": HANDLER_FILE, "configFile": CONFIG_FILE}
    if not isinstance(model, dict) or not all(isinstance(model.get(key), str) for key in ("modelName", "modelVersion")):
        raise InvalidArchive(f"{MANIFEST_FILE} names no model and version")
    try:
        check_name(model["modelName"], model["modelVersion"])
    except InvalidName as error:
        raise InvalidArchive(f"{MANIFEST_FILE}: {error}") from None
    found = {key: value for key, value in model.items() if key not in ("modelName", "modelVersion")}
    if found != expected:
        raise InvalidArchive(f"{MANIFEST_FILE} must make TorchServe use {expected} and nothing else, found {found}")
    return model


def _check_torchscript(file: BinaryIO, entry: Entry) -> None:
    """Tell TorchScript, which is loaded as data, from other files of the same suffix, which can be pickled code."""
    try:
        with zipfile.ZipFile(io.BufferedReader(layout.Window(file, entry))) as model:
            names = model.namelist()
    except Exception:  # as in layout, zipfile raises anything on hostile files
        names = []
    if not any(name.endswith("/constants.pkl") for name in names) or not any("/code/" in name for name in names):
        raise InvalidArchive(f"{entry.name!r} is not TorchScript: loading another kind of file could run code")


def _document(file: BinaryIO, entry: Entry) -> dict[str, Any]:
    if entry.size > _MAX_JSON_BYTES:
        raise InvalidArchive(f"{entry.name!r} has {entry.size} bytes, more than the {_MAX_JSON_BYTES} allowed")
    try:
        document = json.loads(b"".join(layout.content(file, entry)))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InvalidArchive(f"{entry.name!r} is no JSON object")
    return document
