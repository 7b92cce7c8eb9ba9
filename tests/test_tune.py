"""Tuning: what is tried, what is chosen, what is written, and that nothing is left on the server."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from client import scaling
from client.__main__ import app
from client.errors import BoundNotMet, ModelApiOff, NotTunable
from client.torchserve import TorchServe
from client.tuning import layouts
from client.tuning.layouts import Layout
from client.tuning.tune import Bench, Measured, choose, default_layout, neighbours, search
from server import launch, processes
from server.launch import RunningServer
from tests.conftest import CONFIG, MODEL, ROOT, free_ports

BOUND_MS = 50.0
CORES = 4
CONFIG_TEXT = """\
# Who serves
minWorkers: 1          # one is enough
maxWorkers: 1
batchSize: 8  # eight
maxBatchDelay: 5
responseTimeout: 120
handler:
  batchSize: 3
  top_k: 5   # five
"""


def measured(layout: Layout, requests_per_s: float, p99_ms: float = 10.0, failed: int = 0) -> Measured:
    return Measured(layout, 8, requests_per_s, p99_ms / 2, p99_ms, failed)


def steep(layout: Layout) -> Measured:
    """A machine on which two workers, batches of 16 and 10 ms are best, and long batches are slow."""
    distance = sum(
        abs(math.log2(value / best))
        for value, best in ((layout.workers, 2), (layout.batch_size, 16), (layout.max_batch_delay_ms, 10))
    )
    return measured(layout, 1000 - 50 * distance, p99_ms=layout.batch_size)


def test_the_search_begins_with_the_default_and_ends_at_the_best() -> None:
    """From TorchServe's default over the corners to the top, no layout twice, none beyond the cores."""
    found = list(search(steep, CORES, BOUND_MS, 50))
    tried = [best.layout for best in found]
    assert tried[0] == default_layout(CORES) == Layout(4, 1, 100)
    assert max(found, key=lambda best: best.requests_per_s).layout == Layout(2, 16, 10)
    assert len(set(tried)) == len(tried) < 25
    assert all(1 <= layout.workers <= CORES for layout in tried)
    assert len(list(search(steep, CORES, BOUND_MS, 3))) == 3


def test_the_search_stays_within_the_bound() -> None:
    """With a tight bound the same machine is searched elsewhere: what is too slow leads nowhere."""
    tried = [best.layout for best in search(steep, CORES, 10.0, 50)]
    assert max(layout.batch_size for layout in tried) == 16
    assert all(layout.max_batch_delay_ms <= 5 for layout in tried if layout.batch_size > 1)
    assert neighbours(Layout(2, 1, 100), 2, BOUND_MS) == [Layout(2, 2, 5), Layout(1, 1, 100)]


def test_what_does_not_hold_again_is_not_chosen() -> None:
    """The fastest breaks the bound when measured again, the next fails a request: the third is taken as remeasured."""
    fast, broken, third = Layout(1, 16, 5), Layout(1, 8, 5), Layout(1, 4, 5)
    near = Layout(1, 32, 5)
    found = [
        measured(default_layout(CORES), 100),
        measured(near, 4000, p99_ms=0.9 * BOUND_MS),
        measured(fast, 3000),
        measured(broken, 2000),
        measured(third, 1000),
    ]
    asked: list[Layout] = []

    def again(best: Measured) -> Measured:
        asked.append(best.layout)
        spoilt = {fast: {"p99_ms": BOUND_MS + 0.1}, broken: {"failed": 1}}.get(best.layout, {})
        return replace(best, requests_per_s=0.9 * best.requests_per_s, **spoilt)

    tuning = choose(found, again, CORES, BOUND_MS)
    assert (tuning.chosen.layout, tuning.chosen.requests_per_s) == (third, 900)
    assert tuning.gain == pytest.approx(10)
    assert asked == [fast, broken, third, default_layout(CORES)]
    trusting = choose(found, lambda best: best, CORES, BOUND_MS)
    assert trusting.chosen.layout == fast


def test_the_default_is_chosen_where_nothing_beats_it() -> None:
    """Measured again it is the fastest after all; and one that breaks the bound is no standard to compare with."""
    default, other = measured(default_layout(CORES), 900), measured(Layout(1, 8, 5), 1000)
    tuning = choose([default, other], lambda best: replace(best, requests_per_s=950 - best.clients), CORES, BOUND_MS)
    assert tuning.gain == 1
    slow = replace(default, p99_ms=BOUND_MS)
    alone = choose([slow, other], lambda best: best, CORES, BOUND_MS)
    assert (alone.default, alone.gain) == (None, None)


def test_none_that_holds_is_an_error() -> None:
    """Where every layout fails, at once or when measured again, the nearest is named."""
    for p99_ms, again_ms in ((60.0, 60.0), (10.0, 70.0)):
        found = [measured(Layout(1, 8, 5), 1000, p99_ms)]
        with pytest.raises(BoundNotMet, match=rf"keeps a p99 of 50 ms: the nearest was {again_ms} ms with 8 clients"):
            choose(found, lambda best, again_ms=again_ms: replace(best, p99_ms=again_ms), CORES, BOUND_MS)


def test_only_the_chosen_values_are_written(tmp_path: Path) -> None:
    """Comments, order and other keys stay, also such of the same name further in; what was missing is added."""
    file = tmp_path / "model-config.yaml"
    file.write_text(CONFIG_TEXT)
    layouts.write(tmp_path, Layout(2, 16, 10))
    expected = CONFIG_TEXT.replace("Workers: 1", "Workers: 2").replace("batchSize: 8", "batchSize: 16")
    assert file.read_text() == expected.replace("Delay: 5", "Delay: 10")
    file.write_text("batchSize: 8")
    layouts.write(tmp_path, Layout(1, 4, 2))
    assert file.read_text() == "batchSize: 4\nminWorkers: 1\nmaxWorkers: 1\nmaxBatchDelay: 2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model-config.yaml"]


@pytest.mark.parametrize(
    "text", ["{batchSize: 8, maxBatchDelay: 5}", "- 1", "a: b: c", "batchSize: 1\nbatchSize: [", "x"]
)
def test_other_yaml_is_left_alone(tmp_path: Path, text: str) -> None:
    """What cannot be changed line by line is refused with the file's name, and stays as it was."""
    file = tmp_path / "model-config.yaml"
    file.write_text(text)
    with pytest.raises(NotTunable, match=r"model-config\.yaml: expected YAML with a line for each key"):
        layouts.write(tmp_path, Layout(1, 4, 2))
    assert file.read_text() == text
    with pytest.raises(NotTunable, match="is no run folder"):
        layouts.write(tmp_path / "none", Layout(1, 4, 2))


@pytest.fixture(scope="module")
def own(
    torchserve: RunningServer, model_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server that lets models be registered, with a model store of its own."""
    run_dir = tmp_path_factory.mktemp("tuned")
    shutil.copytree(model_store, run_dir / "model_store")
    config = run_dir / "tuned.properties"
    config.write_text(f"{CONFIG.read_text()}enable_model_api=true\n")
    yield launch.start(run_dir, run_dir / "model_store", config, first_port=free_ports())
    processes.stop(run_dir)


@pytest.fixture
def store(own: RunningServer) -> Iterator[Path]:
    """The model store of that server; before and after, it and the server hold the one model and nothing else."""
    store = own.key_file.parent / "model_store"
    check_untouched(own, store)
    yield store
    check_untouched(own, store)


def check_untouched(server: RunningServer, store: Path) -> None:
    assert [file.name for file in store.iterdir()] == [f"{MODEL}.mar"]
    assert server.client().versions(MODEL) == ["1.0"]
    description = server.client().describe(MODEL)
    assert (description["modelVersion"], description["batchSize"], len(description["workers"])) == ("1.0", 32, 1)


def command_line(server: RunningServer, store: Path, *arguments: str | Path) -> list[str]:
    place = ["--url", server.inference_url, "--key-file", str(server.key_file)]
    return [
        sys.executable, "-m", "client", *place, "tune", MODEL, "--model-store", str(store), *map(str, arguments),
    ]  # fmt: skip


def tune(server: RunningServer, store: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = command_line(server, store, *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def test_a_layout_is_served_as_it_says(own: RunningServer, store: Path, digit: bytes) -> None:
    """The copy is served with its own workers, batch size and delay beside the default, and gives the same answers."""
    client = own.client()
    with layouts.registered(client, MODEL, store / f"{MODEL}.mar", Layout(2, 4, 7)) as version:
        description = client.describe(version)
        assert (description["batchSize"], description["maxBatchDelay"]) == (4, 7)
        assert (description["minWorkers"], len(description["workers"])) == (2, 2)
        assert client.predict(version, digit) == pytest.approx(client.predict(MODEL, digit), abs=1e-5)
        assert client.describe(MODEL)["modelVersion"] == "1.0"
        assert [file.name for file in store.iterdir()] == [f"{MODEL}.mar"]


def test_a_choice_is_measured_made_and_written(own: RunningServer, store: Path, run: Path, tmp_path: Path) -> None:
    """Two layouts: a row for each, the choice within the bound with its gain, and just its keys in the run folder."""
    copied = tmp_path / "run"
    copied.mkdir()
    shutil.copy(run / "model-config.yaml", copied)
    before = yaml.safe_load((copied / "model-config.yaml").read_text())
    finished = tune(own, store, "--p99-ms", "2000", "--seconds", "0.2", "--layouts", "2", "--write", copied)
    assert (finished.returncode, finished.stderr) == (0, "")
    heading, default, second, _, chosen, gain, written = finished.stdout.splitlines()
    assert heading.split()[:3] == ["workers", "threads", "batch"]
    assert "TorchServe's default" in default
    assert second.split()[2] == "8"
    workers, _, batch_size, delay_ms, _, requests_per_s, _, p99_ms = map(float, chosen.split()[:8])
    assert p99_ms <= 2000
    found = re.fullmatch(r"([\d.]+) times TorchServe's default layout \(([\d.]+) requests/s\)", gain)
    assert found is not None
    assert requests_per_s / float(found[2]) == pytest.approx(float(found[1]), rel=0.02)
    assert "scripts/archive.sh" in written
    after = yaml.safe_load((copied / "model-config.yaml").read_text())
    assert after == {
        **before, "minWorkers": workers, "maxWorkers": workers, "batchSize": batch_size, "maxBatchDelay": delay_ms,
    }  # fmt: skip


def test_memory_bounds_the_layouts(own: RunningServer, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no second worker fits, every layout has one, and the default is said to be untried and not too slow."""
    free = psutil.virtual_memory()._replace(available=20_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(scaling, "cores", lambda: 8)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = command_line(own, store, "--p99-ms", "2000", "--seconds", "0.1", "--layouts", "2")
    finished = CliRunner().invoke(app, arguments[arguments.index("client") + 1 :])
    assert finished.exit_code == 0, finished.stderr
    assert finished.stderr == "no layout has more than 1 workers: 20 MB of memory are free and hold 0 more\n"
    rows = finished.stdout.splitlines()
    assert [row.split()[0] for row in (*rows[1:3], rows[4])] == ["1", "1", "1"]
    assert rows[5] == "TorchServe's default layout, 8 workers, was not tried"


def test_a_bound_that_nothing_meets(own: RunningServer, store: Path, run: Path, tmp_path: Path) -> None:
    """A hundredth of a millisecond: exit 1 with the nearest that there was, and nothing is written."""
    shutil.copy(run / "model-config.yaml", tmp_path)
    finished = tune(own, store, "--p99-ms", "0.01", "--seconds", "0.1", "--layouts", "1", "--write", tmp_path)
    assert finished.returncode == 1
    assert re.fullmatch(r"error: no layout keeps a p99 of 0\.01 ms: the nearest was [\d.]+ ms .*\n", finished.stderr)
    assert (tmp_path / "model-config.yaml").read_text() == (run / "model-config.yaml").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_interrupts_leaves_nothing(own: RunningServer, store: Path, number: signal.Signals) -> None:
    """Interrupted or terminated while a layout is registered, the command takes it away before it ends with 130."""
    command = command_line(own, store, "--p99-ms", "2000", "--seconds", "20")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        wait_for_version(own.client())
        process.send_signal(number)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (130, "interrupted\n")


def wait_for_version(client: TorchServe) -> None:
    """Until a second version is registered."""
    deadline = time.monotonic() + 60
    while len(client.versions(MODEL)) < 2:
        assert time.monotonic() < deadline, "no layout was registered within a minute"
        threading.Event().wait(0.05)


def test_what_a_killed_run_left_is_cleared(own: RunningServer, store: Path) -> None:
    """A layout that stayed registered and a copy that stayed in the store go with the next run."""
    client, archive = own.client(), store / f"{MODEL}.mar"
    left = layouts.registered(client, MODEL, archive, Layout(1, 4, 7))
    left.__enter__()
    shutil.copy(archive, store / f"{MODEL}.tune-1-4-7.mar")
    with pytest.raises(AssertionError):
        check_untouched(own, store)
    layouts.clear(client, MODEL, archive)


def test_a_layout_that_does_not_load_is_passed_over(own: RunningServer, store: Path) -> None:
    """Workers that cannot load the model, as where memory is short, are a layout that fails and not the end."""
    broken = store / f"{MODEL}-broken.mar"
    with zipfile.ZipFile(store / f"{MODEL}.mar") as archive, zipfile.ZipFile(broken, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, b"no model" if name == "model.pt" else archive.read(name))
    try:
        best = Bench(own.client(), MODEL, broken, [b"no image"], BOUND_MS, 0.1).climb(Layout(1, 4, 7))
    finally:
        broken.unlink()
    assert (best.clients, best.requests_per_s) == (0, 0)
    assert not best.holds(math.inf)


def test_the_copy_differs_in_two_members(model_store: Path, tmp_path: Path) -> None:
    """Configuration and version alone; every other member is the same, byte for byte."""
    archive, copy = model_store / f"{MODEL}.mar", tmp_path / "copy.mar"
    layouts._copy(archive, copy, Layout(2, 4, 7))
    with zipfile.ZipFile(archive) as original, zipfile.ZipFile(copy) as varied:
        assert original.namelist() == varied.namelist()
        changed = {name for name in original.namelist() if digest(original, name) != digest(varied, name)}
        manifest: dict[str, Any] = json.loads(varied.read("MAR-INF/MANIFEST.json"))
    assert changed == {"model-config.yaml", "MAR-INF/MANIFEST.json"}
    assert manifest["model"]["modelVersion"] == "tune-2-4-7"
    assert len(layouts.golden_images(archive)) > 1


def digest(archive: zipfile.ZipFile, name: str) -> str:
    return hashlib.sha256(archive.read(name)).hexdigest()


def test_what_cannot_be_tuned_says_why(
    own: RunningServer, store: Path, torchserve: RunningServer, model_store: Path, tmp_path: Path
) -> None:
    """Another server's model store, a damaged archive, a server that registers nothing: refused, with the way out."""
    client = own.client()
    with pytest.raises(NotTunable, match="name the model store of this very server with --model-store"):
        layouts.find_archive(client, MODEL, tmp_path)
    elsewhere = tmp_path / f"{MODEL}.mar"
    shutil.copy(model_store / elsewhere.name, elsewhere)
    with (
        pytest.raises(NotTunable, match="its own model store with --model-store"),
        layouts.registered(client, MODEL, elsewhere, Layout(1, 4, 7)),
    ):
        pass
    elsewhere.write_bytes(b"no archive")
    with pytest.raises(NotTunable, match="cannot be varied"):
        layouts.golden_images(elsewhere)
    with (
        pytest.raises(ModelApiOff, match="enable_model_api=true"),
        layouts.registered(torchserve.client(), MODEL, model_store / f"{MODEL}.mar", Layout(1, 4, 7)),
    ):
        pass
    assert [file.name for file in model_store.iterdir()] == [f"{MODEL}.mar"]
    assert [file.name for file in tmp_path.iterdir()] == [elsewhere.name]
