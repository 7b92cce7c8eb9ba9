"""The one ZIP layout that archives have, down to the last byte.

Members lie one behind the other in the order of their names, uncompressed, with one date and one permission for all.
So the same members always give the same bytes, nothing can unpack to more than the file holds, and all readers see the
same members: TorchServe reads the headers from the front, other tools the directory at the end.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from archive.errors import BuildError, InvalidArchive

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_MEMBERS = 2_000
MAX_BYTES = 4_000_000_000
"""Sizes and offsets have 32 bits in a ZIP file that every reader takes."""
_MAX_NAME_BYTES = 300
_CHUNK = 1 << 20

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_ZIP64_LOCATOR_SIZE = 20
_VERSION, _UTF8_NAMES, _STORED = 20, 0x800, 0
_TIME, _DATE = 0, 1 << 5 | 1  # 1980-01-01, the earliest there is
_MADE_BY_UNIX = 3 << 8 | _VERSION
_ATTRIBUTES = (stat.S_IFREG | 0o644) << 16


@dataclass(frozen=True)
class Entry:
    """One member, and where its content begins in the file."""

    name: str
    crc: int
    size: int
    offset: int


def write(members: Mapping[str, Path], target: Path) -> None:
    """Write files under the names that they shall have.

    Raises:
        BuildError: too many members, or too large.
    """
    if len(members) > MAX_MEMBERS or sum(path.stat().st_size for path in members.values()) > MAX_BYTES:
        raise BuildError(f"an archive holds at most {MAX_MEMBERS} files and {MAX_BYTES / 1e9:g} GB in all")
    entries = []
    with target.open("wb") as file:
        for name in sorted(members, key=str.encode):
            start = file.tell()
            file.write(bytes(_LOCAL.size + len(name.encode())))
            crc = size = 0
            with members[name].open("rb") as source:
                while chunk := source.read(_CHUNK):
                    crc, size = zlib.crc32(chunk, crc), size + file.write(chunk)
            entries.append(Entry(name, crc, size, start + _LOCAL.size + len(name.encode())))
            file.seek(start)
            file.write(_local_header(entries[-1]))
            file.seek(0, 2)
        file.write(_directory(entries, file.tell()))


def read(file: BinaryIO) -> list[Entry]:
    """The members of an archive. Nothing is unpacked, and no more is read than headers.

    Raises:
        InvalidArchive: the file is not, byte for byte, as `write` lays it out, or a name leads out of a folder.
    """
    try:
        entries = list(_walk(file))
        file.seek(end := entries[-1].offset + entries[-1].size if entries else 0)
        directory = _directory(entries, end)
        if file.read(len(directory) + 1) != directory:
            raise InvalidArchive("its directory lists other members than it holds, or something follows it")
    except InvalidArchive as error:
        raise InvalidArchive(_explain(file) or str(error)) from None
    for entry in entries:
        if problem := name_problem(entry.name):
            raise InvalidArchive(problem)
    return entries


class Window(io.RawIOBase):
    """A member as a file of its own, without a copy."""

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self._file, self._entry, self._position = file, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._entry.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        remaining = max(0, self._entry.size - self._position)
        self._file.seek(self._entry.offset + self._position)
        data = self._file.read(min(len(view), remaining))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def content(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """The bytes of a member, in parts."""
    window = Window(file, entry)
    while chunk := window.read(_CHUNK):
        yield chunk


def extract(archive: Path, folder: Path) -> None:
    """Unpack an archive that has been verified into an empty folder.

    Raises:
        InvalidArchive: as `read`.
    """
    with archive.open("rb") as file:
        for entry in read(file):
            target = folder / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as unpacked:
                unpacked.writelines(content(file, entry))


def name_problem(name: str) -> str | None:
    """Why a member may not have this name, if so."""
    if name.startswith("/") or name[1:2] == ":":
        return f"{name!r} is an absolute path: it would be unpacked outside the model's folder"
    if re.search(r"[\\\x00-\x1f\x7f-\x9f]", name):
        return f"{name!r} has a backslash or a control character"
    if ".." in name.split("/"):
        return f"{name!r} climbs out of the model's folder"
    if any(part in ("", ".") for part in name.split("/")):
        return f"{name!r} is a folder, or not written in the shortest way"
    return None


def _walk(file: BinaryIO) -> Iterator[Entry]:
    """From header to header, as TorchServe unpacks."""
    length = file.seek(0, 2)
    position, previous = 0, b""
    for _ in range(MAX_MEMBERS + 1):
        file.seek(position)
        header = file.read(_LOCAL.size)
        if header[:4] != b"PK\3\4" or len(header) < _LOCAL.size:
            return
        crc, size, name_length = struct.unpack_from("<I4xIH", header, 14)
        raw_name = file.read(name_length)
        try:
            entry = Entry(raw_name.decode(), crc, size, position + _LOCAL.size + name_length)
        except UnicodeDecodeError:
            raise InvalidArchive(f"{raw_name!r} is no name in UTF-8") from None
        if header + raw_name != _local_header(entry) or name_length > _MAX_NAME_BYTES:
            raise InvalidArchive(f"{entry.name!r} is not stored as archive build stores members")
        if raw_name <= previous:
            raise InvalidArchive(f"{entry.name!r} comes twice or out of order")
        position, previous = entry.offset + size, raw_name
        if position > min(length, MAX_BYTES):
            raise InvalidArchive(f"{entry.name!r} claims {size} bytes, more than there are or may be")
        yield entry
    raise InvalidArchive(f"it has more than {MAX_MEMBERS} members")


def _local_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    return _LOCAL.pack(
        b"PK\3\4", _VERSION, _UTF8_NAMES, _STORED, _TIME, _DATE, entry.crc, entry.size, entry.size, len(name), 0
    ) + name  # fmt: skip


def _directory(entries: list[Entry], offset: int) -> bytes:
    """What follows the members: a record for each, and the end record."""
    records = b""
    for entry in entries:
        name = entry.name.encode()
        start = entry.offset - _LOCAL.size - len(name)
        records += _CENTRAL.pack(
            b"PK\1\2", _MADE_BY_UNIX, _VERSION, _UTF8_NAMES, _STORED, _TIME, _DATE, entry.crc, entry.size, entry.size,
            len(name), 0, 0, 0, 0, _ATTRIBUTES, start,
        ) + name  # fmt: skip
    return records + _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(records), offset, 0)


def _explain(file: BinaryIO) -> str | None:
    """What an ordinary ZIP reader would say is wrong, where it can tell."""
    length = file.seek(0, 2)
    file.seek(max(0, length - _ZIP64_LOCATOR_SIZE - _END.size))
    tail = file.read()
    before, end = tail[: -_END.size], tail[-_END.size :]
    if len(end) < _END.size or end[:4] != b"PK\5\6":
        return "it is not a ZIP file, is cut short, or something follows its end"
    if before.startswith(b"PK\6\7"):
        return "it has the ZIP64 records of a file larger than is allowed"
    listed, directory_size = _END.unpack(end)[4:6]
    if listed > MAX_MEMBERS or directory_size > MAX_MEMBERS * (_CENTRAL.size + _MAX_NAME_BYTES):
        return f"it lists {listed} members, more than the {MAX_MEMBERS} allowed"
    try:
        with zipfile.ZipFile(file) as archive:
            return next(filter(None, map(_problem_of, archive.infolist())), None) or _twice(archive.namelist())
    except Exception as error:  # zipfile raises anything from struct.error to NotImplementedError on hostile files
        return f"it cannot be read as a ZIP file: {error}"


def _problem_of(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if problem := name_problem(info.orig_filename):
        return problem
    if kind not in (0, stat.S_IFREG):
        return f"{info.filename!r} is {'a symbolic link' if stat.S_ISLNK(kind) else 'a special file'}"
    if info.flag_bits & 1:
        return f"{info.filename!r} is encrypted"
    if info.compress_type != zipfile.ZIP_STORED:
        return (
            f"{info.filename!r} is compressed, {info.compress_size} bytes that unpack to {info.file_size} or more: "
            "archive build compresses nothing"
        )
    return None


def _twice(names: list[str]) -> str | None:
    return next((f"{name!r} comes twice" for name in names if names.count(name) > 1), None)
