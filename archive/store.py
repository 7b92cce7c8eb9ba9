"""The model store: one archive for each model, whose version only rises and whose content never changes under it."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from archive.content import ArchiveContent
from archive.errors import InvalidArchive, VersionTaken
from archive.members import signature_path
from archive.verify import Verified
from handler.identity import DIGESTS_FILE
from system import files, locks


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
    with locks.held(model_store):  # two builds at once take turns
        unchanged = target.exists() and _holds(target, packed, verified.version)
        if not unchanged:
            signature_path(target).unlink(missing_ok=True)  # it is not of these bytes
            with files.replacing(target) as arriving:
                shutil.copyfile(packed, arriving)
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
        raise VersionTaken(
            f"{target} is version {held}, and {version} is not higher: archive it with --version {_next(held)}"
        )
    raise VersionTaken(
        f"{target} is version {held} already, with other content ({_differing(target, packed)}), and a version never "
        f"changes: archive this run with --version {_next(held)}"
    )


def _held_version(target: Path) -> str:
    """Also of archives that others made.

    Raises:
        VersionTaken: it cannot be told.
    """
    try:
        version = ArchiveContent(target).version
        _number(version)
    except (InvalidArchive, ValueError) as error:
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


def _differing(target: Path, packed: Path) -> str:
    """Names of the members that only one has or that differ; the first three of many."""
    held, new = (ArchiveContent(path).checksums().items() for path in (target, packed))
    names = sorted({name for name, _ in held ^ new} - {DIGESTS_FILE}) or ["its layout"]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
