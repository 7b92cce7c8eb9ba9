"""A folder of files → an archive that says what it holds, with the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from archive import canonical
from archive.errors import BuildError
from archive.members import MANIFEST_FILE, is_known
from handler.identity import DIGESTS_FILE
from system.files import write_json

_CHUNK = 1 << 20


def pack(content: Path, target: Path) -> None:
    """Write every file of `content`, and `digests.json` with the size and SHA-256 of each, as the archive `target`.

    Raises:
        BuildError: a file that no archive has, or more than an archive holds.
    """
    files = {path.relative_to(content).as_posix(): path for path in content.rglob("*") if path.is_file()}
    for name in files:
        problem = canonical.name_problem(name) or (None if is_known(name) else f"{name!r} has no place in an archive")
        if problem:
            raise BuildError(f"cannot pack {content}: {problem}")
    files.pop(DIGESTS_FILE, None)
    digests = {"algorithm": "sha256", "members": {name: _digest(path) for name, path in sorted(files.items())}}
    files[DIGESTS_FILE] = content / DIGESTS_FILE
    write_json(files[DIGESTS_FILE], digests)
    canonical.write(files, target)


def forget_creation_time(content: Path) -> None:
    """Take what torch-model-archiver writes of the clock out of the manifest."""
    path = content / MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.pop("createdOn", None)
    write_json(path, manifest)


def _digest(path: Path) -> dict[str, str | int]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}
