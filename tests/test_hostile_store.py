"""Whatever lies in a model store under the name of an archive stops nothing else, and is named with the reason."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from archive.errors import ArchiveError
from archive.verify import verify
from operate.errors import NotAsMeasured
from operate.golden import read
from server import launch, store
from server.config import ServerConfig
from server.errors import ConfigError
from tests.conftest import CONFIG, MODEL

MANIFEST = "MAR-INF/MANIFEST.json"
GOOD = json.dumps({"model": {"modelName": "x", "modelVersion": "1.0", "configFile": "model-config.yaml"}})


def zipped(file: Path, manifest: str = GOOD, config: str | bytes = "minWorkers: 1\n") -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, manifest)
        archive.writestr("model-config.yaml", config)


def patched(file: Path, old: bytes, new: bytes) -> None:
    zipped(file)
    file.write_bytes(file.read_bytes().replace(old, new))


def encrypted(file: Path) -> None:
    zipped(file)
    data = bytearray(file.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + offset] |= 1
    file.write_bytes(data)


def damaged(file: Path) -> None:
    zipped(file)
    data = bytearray(file.read_bytes())
    start = data.index(MANIFEST.encode()) + len(MANIFEST)
    data[start : start + 20] = b"\xff" * 20
    file.write_bytes(data)


def unfolding() -> str:
    """YAML of a few hundred bytes that stands for 9 to the power of 9 values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines)


def leaving(file: Path) -> None:
    zipped(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../x.py", "")


def unreadable(file: Path) -> None:
    zipped(file)
    file.chmod(0)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "deep JSON": lambda file: zipped(file, "[" * 200_000),
    "deep YAML": lambda file: zipped(file, config="[" * 100_000),
    "YAML that unfolds": lambda file: zipped(file, config=unfolding()),
    "unknown compression": lambda file: patched(file, b"\x08\x00", b"\x63\x00"),
    "encrypted": encrypted,
    "damaged": damaged,
    "member outside of its folder": leaving,
    "unpacks to 300 MB": lambda file: zipped(file, config=b" " * 300_000_000),
    "manifest of wrong types": lambda file: zipped(file, '{"model": {"modelName": [], "modelVersion": {}}}'),
    "settings of a wrong type": lambda file: zipped(file, GOOD.replace('"model-config.yaml"', "[]")),
    "model that is a list": lambda file: zipped(file, '{"model": ["modelName", "modelVersion"]}'),
    "number of any length": lambda file: zipped(file, '{"model": ' + "1" * 100_000 + "}"),
    "key twice": lambda file: zipped(file, '{"model": {}, "model": {}}'),
    "escapes in the name": lambda file: zipped(file, GOOD.replace('"x"', json.dumps("\x1b[31mred\n"))),
    "surrogate in the name": lambda file: zipped(file, '{"model": {"modelName": "\\ud800", "modelVersion": "1"}}'),
    "another model's name": lambda file: zipped(file, GOOD.replace('"x"', '"y"')),
    "empty": lambda file: file.touch(),
    "folder": lambda file: file.mkdir(),
    "pipe": lambda file: os.mkfifo(file),
    "dangling link": lambda file: file.symlink_to("nowhere"),
    "link to itself": lambda file: file.symlink_to(file),
    "unreadable": unreadable,
    "stock": zipped,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_stops_no_other(model_store: Path, tmp_path: Path, kind: str) -> None:
    """One printable line names it and the reason, and the good archive beside it is served.

    Negative control: alone in the store it ends the start in that line.
    """
    hostile = tmp_path / "x.mar"
    HOSTILE[kind](hostile)
    config = ServerConfig.read(CONFIG)
    with pytest.raises(ConfigError, match=r"x\.mar"):
        archives, _ = store.archives(tmp_path)
        launch._good(archives, config)
    shutil.copy(model_store / f"{MODEL}.mar", tmp_path)
    archives, left_out = store.archives(tmp_path)
    good, models, refused = launch._good(archives, config)
    assert [archive.name for archive in good] == [model.name for model in models] == [MODEL]
    [line] = left_out + refused
    assert "x.mar" in line
    assert line.isprintable()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_by_every_reader(tmp_path: Path, kind: str) -> None:
    """Verify, and what reads golden images out of an archive, raise errors of their own."""
    hostile = tmp_path / "x.mar"
    HOSTILE[kind](hostile)
    with pytest.raises(ArchiveError, match=r"x\.mar"):
        verify(hostile)
    with pytest.raises(NotAsMeasured, match=r"x\.mar"):
        read(hostile)
