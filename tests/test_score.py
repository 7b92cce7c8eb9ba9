"""Scoring without a server: a row for every image, the very answers of the server, and nothing lost by a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from archive import score
from archive.errors import ScoringRefused
from archive.score_worker import UNREADABLE, readable_name, write_shard
from archive.verify import verify
from client.errors import RequestRefused
from client.torchserve import TorchServe
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT, wait_for
from tests.images import BAD

needs_ray = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("ray", "pyarrow")),
    reason="the packages ray and pyarrow are not installed",
)
needs_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="the package pyarrow is not installed")

DIGITS = 300
SHARD = 20
Row = dict[str, Any]


@pytest.fixture(scope="session")
def photos(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits in several folders, a bad image of every kind, one that cannot be read, and names of all sorts."""
    folder = tmp_path_factory.mktemp("photos")
    digits = sorted((run / "golden").glob("*.png"))
    for number in range(DIGITS):
        target = folder / f"{number % 7}" / f"é {number:03}.PNG"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(digits[number % len(digits)], target)
    for name, (body, _) in BAD.items():
        (folder / f"bad {name}.png").write_bytes(body)
    (folder / "bad link.png").symlink_to("/proc/self/mem")  # a file that nobody can read from its start
    (folder / "notes.txt").write_text("no image")
    return folder


def command(store: Path, photos: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "archive", "score", str(store / f"{MODEL}.mar"), str(photos), "--out", str(out),
        "--num-workers", "1", "--shard-images", str(SHARD),
    ]  # fmt: skip


def read_rows(out: Path) -> list[Row]:
    from pyarrow import parquet

    return [row for shard in sorted(out.glob("*.parquet")) for row in parquet.read_table(shard).to_pylist()]


def differences(rows: Sequence[Row], photos: Path, client: TorchServe) -> list[str]:
    """Those of `rows` that the server answers otherwise; each is asked for."""
    found = []
    for row in rows:
        try:
            answer = client.predict(MODEL, (photos / row["path"]).read_bytes())
            same = list(answer) == row["labels"] and list(answer.values()) == pytest.approx(
                row["probabilities"], abs=1e-6
            )
        except RequestRefused as refusal:
            same = (row["error_code"], row["error_message"]) == (refusal.status, str(refusal).partition(": ")[2])
        if not same:
            found.append(row["path"])
    return found


@pytest.mark.slow
@pytest.mark.process
@needs_ray
def test_a_killed_run_goes_on_and_answers_as_the_server(
    model_store: Path, photos: Path, torchserve: RunningServer, client: TorchServe, tmp_path: Path
) -> None:
    """Killed after its first shard and called again: every image has one row, and a sample is the server's own."""
    out = tmp_path / "scores"
    with subprocess.Popen(command(model_store, photos, out), cwd=ROOT) as process:
        seen: list[psutil.Process] = []
        while not list(out.glob("*.parquet")):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
            seen = psutil.Process(process.pid).children(recursive=True)
        for each in seen:  # otherwise they would be done while their ports are looked at
            with suppress(psutil.NoSuchProcess):
                each.suspend()
        beyond = listening_beyond_loopback(seen)
        os.kill(process.pid, signal.SIGKILL)
        for each in seen:
            with suppress(psutil.NoSuchProcess):
                each.resume()
        assert beyond == []
    psutil.wait_procs(seen, timeout=60)
    before = {shard.name: shard.stat().st_mtime_ns for shard in out.glob("*.parquet")}
    assert 0 < len(before) < (DIGITS + len(BAD) + 1) / SHARD
    finished = subprocess.run(
        command(model_store, photos, out), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    ours = (f"{photos}: left out 1 file", f"{photos.name} ")  # and how far it is, since this is no terminal
    said = [line for line in finished.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line]
    assert [line for line in said if not line.startswith(ours)] == []
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    rows = read_rows(out)
    assert sorted(row["path"] for row in rows) == score.find_images(photos)
    assert len(rows) == DIGITS + len(BAD) + 1
    refused = {row["path"]: row for row in rows if row["error_code"] is not None}
    assert set(refused) == {f"bad {name}.png" for name in BAD} | {"bad link.png"}
    assert refused.pop("bad link.png")["error_code"] == UNREADABLE
    answered = [row for row in rows if row["error_code"] is None]
    sample = [*answered[::10], *refused.values()]
    assert differences(sample, photos, client) == []
    mixed = [{**other, "path": row["path"]} for row, other in zip(sample, [*sample[1:], sample[0]], strict=True)]
    assert len(differences(mixed, photos, client)) > len(sample) / 2


@pytest.mark.slow
@pytest.mark.process
@needs_ray
def test_a_ray_that_does_not_come_up_is_started_again(model_store: Path, photos: Path, tmp_path: Path) -> None:
    """Killed at its start, as a machine without memory may do: nothing is asked of the user, the rows are there, and
    what the first start left takes nothing from the second."""
    with subprocess.Popen(
        command(model_store, photos / "0", tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: raylets(process), "the first raylet", 60)
        first = psutil.Process(process.pid).children(recursive=True)
        raylets(process)[0].kill()
        wait_for(lambda: set(raylets(process)) - set(first), "the second raylet", 60)
        assert psutil.wait_procs(first, timeout=10)[1] == []
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert sorted(row["path"] for row in read_rows(tmp_path)) == score.find_images(photos / "0")


def raylets(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process of Ray that starts workers, where it runs."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # some of Ray's end at once
            if child.name() == "raylet":
                found.append(child)
    return found


def listening_beyond_loopback(processes: Sequence[psutil.Process]) -> list[str]:
    """Addresses on which one of `processes` can be reached from another machine."""
    addresses = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            addresses += [address for address in listening if address.removeprefix("::ffff:") != "127.0.0.1"]
    return addresses


@pytest.mark.slow
@pytest.mark.process
@needs_pyarrow
def test_rows_of_another_archive_are_not_mixed_in(model_store: Path, photos: Path, tmp_path: Path) -> None:
    """A folder with another archive's rows, or a damaged shard, is refused and named; its own rows are skipped."""
    digest = verify(model_store / f"{MODEL}.mar").digest
    row = {"path": "a.png", "label": None, "error_code": 400, "error_message": "no"}
    shard = write_shard(tmp_path, [row], digest)
    assert score.finished(tmp_path, digest) == {"a.png"}
    assert [path.name for path in tmp_path.iterdir()] == [shard.name]
    with pytest.raises(ScoringRefused, match=f"{shard.name} was not written by this archive"):
        score.finished(tmp_path, "0" * 64)
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ScoringRefused, match=f"{shard.name} cannot be read: delete it"):
        score.finished(tmp_path, digest)


def test_images_are_found_by_the_formats_of_the_worker(tmp_path: Path) -> None:
    """Suffixes of all formats that a worker takes, in any case and at any depth; a folder without any is refused."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.JPG", "b/c/x.webp", "b/y.tiff", "b/notes.txt", "no-suffix"):
        (tmp_path / name).touch()
    assert score.find_images(tmp_path) == ["b/c/x.webp", "b/y.tiff", "z.JPG"]
    with pytest.raises(ScoringRefused, match=r"no folder .*/none"):
        score.find_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScoringRefused, match=r"no image in this folder; looked for .*png"):
        score.find_images(tmp_path / "empty")


def test_names_that_are_no_text_can_be_told_apart() -> None:
    """Bytes of a path that are no UTF-8 become their numbers; others stay as they are."""
    assert readable_name(os.fsdecode(b"a\xff.png")) == "a\\xff.png"
    assert readable_name("é.png") == "é.png"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Ray one line says what to install, before anything else is done."""
    monkeypatch.setattr(score, "PACKAGES", ("pathlib", "a_missing_ray"))
    with pytest.raises(ScoringRefused, match=r"scoring needs a_missing_ray: pip install 'ray\[data\]'"):
        next(score.score(tmp_path / "none.mar", tmp_path, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
