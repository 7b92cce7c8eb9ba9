"""What tests share: one trained run and its archive, kept between sessions, and one TorchServe for the whole session.

Fixtures import torch and what needs it themselves, since the process that hands out tests does without.

The server runs on free ports with its own working and temp directory, beside whatever else runs on the machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from rich.console import Console

from benchmarks.ports import free_ports
from client.torchserve import TorchServe
from server import launch, processes
from server.launch import RunningServer
from tests.made import made

pytest_plugins = ["tests.costs", "tests.warm"]

# Half of what a start of TorchServe costs is Java compiling what runs once.
os.environ["JAVA_TOOL_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_given_back() -> Iterator[None]:
    """A worker keeps what it has freed, and so does a process of tests that has imported the handler: gigabytes."""
    yield
    ctypes.CDLL(None).malloc_trim(0)


ROOT = Path(__file__).parent.parent
MODEL = "lenet5-digits"
CONFIG = ROOT / "config" / "config.cpu.properties"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SERVERS = re.compile("RunningServer|RunningEdge|RunningRay|Supervised|Pair|Clone|Idle")
"""What the fixtures that start servers return."""
PATIENCE_S = 30.0
"""Longer than a busy machine delays what ends by itself, shorter than what hangs."""
COSTS_S = {"data": 60, "slow": 20, "server": 1, "process": 1, "": 0}
"""By mark, roughly what a test takes."""
LAPTOP, PHONE = (1280, 800), (390, 844)
"""Sizes of a browser's window, in pixels."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark who takes a fixture that gives a server, and order modules by cost.

    One process of pytest-xdist runs each module. The longest come first there, so that no process is left waiting at
    the end; without pytest-xdist they come last.
    """
    costs: Counter[Path] = Counter()
    for item in items:
        fixtures = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]
        if any(SERVERS.search(str(found.func.__annotations__.get("return"))) for found in fixtures):
            item.add_marker("server")
        costs[item.path] += max(
            seconds for mark, seconds in COSTS_S.items() if not mark or item.get_closest_marker(mark)
        )
    items.sort(key=lambda item: costs[item.path], reverse=hasattr(config, "workerinput"))


def wait_for(condition: Callable[[], object], awaited: str, timeout_s: float = 60.0) -> float:
    """Seconds until `condition` held; fails if it does not in time."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s: {awaited}"
        threading.Event().wait(0.05)
    return time.monotonic() - started


@contextmanager
def signals_of_a_terminal() -> Iterator[None]:
    """Whoever is started within takes Ctrl-C and a closed terminal, also where these tests are run by nohup or `&`."""
    given = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in given.items():
            signal.signal(number, handler)


def run_module(module: str, *arguments: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` of this project, however it ends; `options` as `subprocess.run` has them."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300, **options,
    )  # fmt: skip


def data_folder(name: str) -> Path:
    """The folder of a data set under TEST_DATA, or a skip that says what is missing."""
    root = os.environ.get("TEST_DATA")
    if not root:
        pytest.skip("TEST_DATA names no folder with the data sets")
    if not (Path(root) / name).exists():
        pytest.skip(f"TEST_DATA={root} has no {name}")
    return Path(root)


def of_prometheus(name: str) -> Path:
    """`prometheus` or `promtool`, on the PATH or beneath the folder that PROMETHEUS_HOME names; or a skip."""
    home = os.environ.get("PROMETHEUS_HOME")
    found = shutil.which(name, path=f"{home}{os.pathsep}{home}/usr/bin{os.pathsep}{home}/bin" if home else None)
    if found is None:
        pytest.skip(f"no {name}: install Debian's package prometheus, or name its folder in PROMETHEUS_HOME")
    return Path(found)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for TMPDIR whose path leaves room for the workers' sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the default recipe, trained once; to be served by one worker, so that tests can count."""
    from tests.costs import uncounted  # which pytest must load first, as a plugin

    with uncounted():
        from train import pipeline, recipe

    with_one_worker = recipe.load(MODEL, ["serving.workers=1"])

    def train(target: Path) -> None:
        pipeline.train(with_one_worker, MODEL, target, overwrite=False, console=Console(quiet=True))

    return made("run", train, tmp_path_factory.mktemp("runs") / MODEL)


@pytest.fixture(scope="session")
def onnx_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `run` as `python -m export --to onnx` writes it."""
    from export import formats

    def write(folder: Path) -> None:
        formats.export(run, "onnx", folder, MODEL)

    return made("onnx", write, tmp_path_factory.mktemp("export") / "onnx")


@pytest.fixture(scope="session")
def int8_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `run` with its int8 model, whose speed does not count."""
    from train.quantise.pipeline import quantise

    def write(target: Path) -> None:
        shutil.copytree(run, target)
        quantise(target, min_speedup=0, max_loss_points=1, console=Console(quiet=True))

    return made("int8", write, tmp_path_factory.mktemp("int8") / MODEL)


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of `run` that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "own" / run.name))


@pytest.fixture(scope="session")
def model_store(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the archive of `run`."""
    from archive.build import build

    def archive(store: Path) -> None:
        store.mkdir()
        build(run, MODEL, "1.0", store)

    return made("archive", archive, tmp_path_factory.mktemp("archive") / "model_store")


@contextmanager
def started(run_dir: Path, model_store: Path, config: Path = CONFIG) -> Iterator[RunningServer]:
    """A server on ports of its own, which is gone afterwards."""
    try:
        yield launch.start(run_dir, model_store, config, first_port=free_ports())
    finally:
        processes.stop(run_dir)


@contextmanager
def with_model_api(folder: Path, model_store: Path, more: str = "") -> Iterator[RunningServer]:
    """A server in `folder` that lets models be registered, with a copy of the model store there.

    Args:
        more: lines of its configuration.
    """
    config = folder / "config.properties"
    config.write_text(f"{CONFIG.read_text()}enable_model_api=true\n{more}")
    store = Path(shutil.copytree(model_store, folder / "model_store"))
    with started(folder, store, config) as server:
        yield server


@pytest.fixture(scope="session")
def torchserve(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real TorchServe that serves `model_store`, tokens on."""
    with started(tmp_path_factory.mktemp("server"), model_store) as server:
        yield server


@pytest.fixture
def client(torchserve: RunningServer) -> TorchServe:
    return torchserve.client()


@pytest.fixture
def session(torchserve: RunningServer) -> requests.Session:
    """Plain HTTP with the inference token, as a client of another making would send it."""
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = "Bearer " + json.loads(torchserve.key_file.read_text())["inference"]["key"]
    return session


@pytest.fixture(scope="session")
def digit(run: Path) -> bytes:
    """An encoded image that the model was not trained on."""
    return sorted((run / "golden").glob("*.png"))[0].read_bytes()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real one, without a window."""
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the PATH to look at the page with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()
