"""The one form of an archive: its members, written again, give the same file, byte for byte.

Members are stored uncompressed in the order of their names, with one date and one permission for all. So the same
members always give the same bytes, nothing unpacks to more than the file holds, and every reader sees the same members:
TorchServe reads from the front, other tools read the directory at the end.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from archive.errors import BuildError, InvalidArchive

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_MEMBERS = 2_000
MAX_BYTES = 4_000_000_000
MAX_READ_BYTES = 1 << 20
"""Most that is taken into memory at once, whatever a file claims."""
_END_BYTES = 22
_MAX_PART_BYTES = 255
"""Of a name, as file systems allow it."""
_ATTRIBUTES = (stat.S_IFREG | 0o644) << 16


@dataclass(frozen=True)
class Entry:
    """One member, and where its content begins in the file."""

    name: str
    offset: int
    size: int
    sha256: str


class Section:
    """A part of a file as a file of its own, to be read as ZIP: it hands out at most `MAX_READ_BYTES` at once."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0
        self.name = file.name

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise OSError("there is nothing before the beginning")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        remaining = max(0, self._size - self._position)
        size = remaining if size < 0 else min(size, remaining)
        if size > MAX_READ_BYTES:
            raise zipfile.BadZipFile(f"it has a directory of {size} bytes, {MAX_READ_BYTES} are allowed")
        self._file.seek(self._start + self._position)
        data = self._file.read(size)
        self._position += len(data)
        return data


def write(members: Mapping[str, Path], target: Path) -> None:
    """Write files under the names that they shall have.

    Raises:
        BuildError: too many members, or too large.
    """
    sizes = {name: path.stat().st_size for name, path in members.items()}
    if len(sizes) > MAX_MEMBERS or sum(sizes.values()) > MAX_BYTES:
        raise BuildError(f"an archive holds at most {MAX_MEMBERS} files and {MAX_BYTES / 1e9:g} GB in all")
    with target.open("wb") as file:
        for _ in _written(sizes, lambda name: members[name].open("rb"), file):
            pass


def read(path: Path, file: BinaryIO) -> dict[str, Entry]:
    """The members of an archive. Nothing is unpacked; the file is read twice, in parts.

    Args:
        path: what messages call the archive.

    Raises:
        InvalidArchive: the file is not, byte for byte, as `write` writes it, or a name leads out of a folder.
    """
    try:
        return _read(file, _Comparison(Section(file, 0, file.seek(0, os.SEEK_END))))
    except OSError as error:
        raise InvalidArchive(f"cannot read {path}: {error.strerror or error}") from None
    except _NotCanonical as error:
        raise InvalidArchive.of(path, str(error)) from None
    except Exception as error:  # zipfile raises anything from struct.error to NotImplementedError on hostile files
        raise InvalidArchive.unreadable(path, error) from None


def name_problem(name: str) -> str | None:
    """Why a member may not have this name, if so."""
    parts = name.split("/")
    if name.startswith("/") or name[1:2] == ":":
        return f"{name!r} is an absolute path: it would be unpacked outside the model's folder"
    if re.search(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", name):
        return f"{name!r} has a backslash, a control character or bytes that are not UTF-8"
    if ".." in parts:
        return f"{name!r} climbs out of the model's folder"
    if any(part in ("", ".") for part in parts):
        return f"{name!r} is a folder, or not written in the shortest way"
    if any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
        return f"{name[:40]!r}... is longer than the {_MAX_PART_BYTES} bytes that a file system allows"
    return None


class _NotCanonical(Exception):
    """What is wrong, without the file's name."""


class _Comparison:
    """A file to write to, which remembers where the bytes written last are not those that a file holds there."""

    def __init__(self, file: Section) -> None:
        self._file = file
        self.differing: set[int] = set()
        self.seek, self.tell = file.seek, file.tell

    def flush(self) -> None:
        """There is nothing to write out."""

    def write(self, data: Buffer) -> int:
        place, written = self._file.tell(), bytes(data)
        same = self._file.read(len(written)) == written
        (self.differing.discard if same else self.differing.add)(place)
        self._file.seek(place + len(written))
        return len(written)

    def is_over(self) -> bool:
        return not self._file.read(1)


def _read(file: BinaryIO, comparison: _Comparison) -> dict[str, Entry]:
    length = file.seek(0, os.SEEK_END)
    if length > MAX_BYTES + MAX_MEMBERS * MAX_READ_BYTES:
        raise _NotCanonical(f"it has {length} bytes, more than the {MAX_BYTES} allowed")
    file.seek(max(0, length - _END_BYTES))
    if not file.read().startswith(b"PK\5\6"):  # zipfile would look further, and may find a member's own end
        raise _NotCanonical("it is not a ZIP file, is cut short, or something follows its end")
    entries = {}
    with zipfile.ZipFile(Section(file, 0, length)) as archive:
        infos = archive.infolist()
        if problem := _problem(infos, length):
            raise _NotCanonical(problem)
        sizes = {info.filename: info.file_size for info in infos}
        for entry in _written(sizes, archive.open, cast("BinaryIO", comparison)):
            if comparison.differing:
                raise _NotCanonical(f"{entry.name!r} is not stored as archive build stores members")
            entries[entry.name] = entry
    if comparison.differing or not comparison.is_over():
        raise _NotCanonical("its directory lists other members than it holds, or something follows it")
    return entries


def _problem(infos: list[zipfile.ZipInfo], length: int) -> str | None:
    """What the directory says that no archive's does; where it says none of it, reading takes a bounded time."""
    if len(infos) > MAX_MEMBERS:
        return f"it lists {len(infos)} members, more than the {MAX_MEMBERS} allowed"
    if problem := next(filter(None, map(_problem_of, infos)), None):
        return problem
    name, count = Counter(info.filename for info in infos).most_common(1)[0] if infos else ("", 0)
    if count > 1:
        return f"{name!r} comes twice"
    if (claimed := sum(info.file_size for info in infos)) > length:
        largest = max(infos, key=lambda info: info.file_size)
        return f"{largest.filename!r} claims {largest.file_size} bytes, all members {claimed} of the file's {length}"
    return None


def _problem_of(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if problem := name_problem(info.orig_filename):
        return problem
    if kind not in (0, stat.S_IFREG):
        return f"{info.filename!r} is {'a symbolic link' if stat.S_ISLNK(kind) else 'a special file'}"
    if info.compress_type != zipfile.ZIP_STORED:
        return (
            f"{info.filename!r} is compressed, {info.compress_size} bytes that unpack to {info.file_size} or more: "
            "archive build compresses nothing"
        )
    return None


def _written(sizes: Mapping[str, int], content: Callable[[str], IO[bytes]], target: BinaryIO) -> Iterator[Entry]:
    """Write the members, in parts; yields each once it is written.

    Args:
        sizes: in bytes, of each name.
        content: opens what a name shall hold.
    """
    with zipfile.ZipFile(target, "w") as archive:
        for name in sorted(sizes, key=str.encode):
            info = zipfile.ZipInfo(name)  # of 1980-01-01, and uncompressed
            info.external_attr, info.file_size = _ATTRIBUTES, sizes[name]
            digest, size = hashlib.sha256(), 0
            with content(name) as source, archive.open(info, "w") as member:
                offset = target.tell()
                while chunk := source.read(MAX_READ_BYTES):
                    digest.update(chunk)
                    size += member.write(chunk)
            yield Entry(name, offset, size, digest.hexdigest())
