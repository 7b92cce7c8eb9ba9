"""The model store: one archive for each model, whose version only rises and whose content never changes under it."""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archive.errors import VersionTaken
from archive.members import MANIFEST_FILE, signature_path
from archive.verify import Verified
from handler.identity import DIGESTS_FILE


def put(packed: Path, verified: Verified, model_store: Path, private_key: Path | None) -> Path:
    """Move a copy of the archive into its place, with its signature where there is a key.

    Raises:
        VersionTaken: the store has that version with other content, or a higher one.
        SignatureError: the key cannot be used. In both cases nothing was changed.
    """
    target = model_store / f"{verified.model_name}.mar"
    signature = None
    if private_key is not None:
        from archive import sign

        signature = sign.sign(packed, private_key)
    with locked(model_store):
        unchanged = target.exists() and _holds(target, packed, verified.version)
        if not unchanged:
            signature_path(target).unlink(missing_ok=True)  # it is not of these bytes
            arriving = model_store / f".{target.name}.partial-{os.getpid()}"
            try:
                shutil.copyfile(packed, arriving)
                arriving.replace(target)
            finally:
                arriving.unlink(missing_ok=True)
        if signature is not None:
            sign.write(signature, target)
    return target


def _holds(target: Path, packed: Path, version: str) -> bool:
    """Whether `target` is the same archive already; False where it is of a lower version.

    Raises:
        VersionTaken: it must not be replaced.
    """
    held = _held_version(target)
    if _number(held) < _number(version):
        return False
    if filecmp.cmp(target, packed, shallow=False):
        return True
    if _number(held) > _number(version):
        raise VersionTaken(f"{target} is version {held}, and {version} is not higher: give a higher --version")
    raise VersionTaken(
        f"{target} is version {held} already, with other content ({', '.join(_differing(target, packed))}): give a "
        f"higher --version, such as {_next(held)}"
    )


def _held_version(target: Path) -> str:
    """Also of archives that others made.

    Raises:
        VersionTaken: it cannot be told.
    """
    try:
        with zipfile.ZipFile(target) as archive:
            version = str(json.loads(archive.read(MANIFEST_FILE))["model"]["modelVersion"])
        _number(version)
    except Exception as error:  # zipfile raises anything on files that are no archives
        raise VersionTaken(
            f"{target} is in the way and is no archive that can be read ({error}): move it away"
        ) from None
    return version


def _number(version: str) -> tuple[int, ...]:
    """1.0 is 1 is 1.0.0."""
    parts = [int(part) for part in version.split(".")]
    while len(parts) > 1 and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _next(version: str) -> str:
    first, _, rest = version.partition(".")
    return f"{first}.{int(rest.partition('.')[0] or 0) + 1}"


def _differing(target: Path, packed: Path) -> list[str]:
    """Names of the members that one has and the other has not, or not the same."""
    checksums = []
    for path in (target, packed):
        with zipfile.ZipFile(path) as archive:
            checksums.append({(info.filename, info.CRC) for info in archive.infolist()})
    return sorted({name for name, _ in checksums[0] ^ checksums[1]} - {DIGESTS_FILE}) or ["its layout"]


@contextmanager
def locked(model_store: Path) -> Iterator[None]:
    """Two builds at once take turns."""
    descriptor = os.open(model_store, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
