"""What tests share: one trained run, its archive, and one TorchServe for the whole session.

The server runs on free ports with its own working and temp directory, beside whatever else runs on the machine.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from archive.build import build
from benchmarks.ports import free_ports
from client.torchserve import TorchServe
from server import launch, processes
from server.launch import RunningServer
from train import pipeline, recipe

ROOT = Path(__file__).parent.parent
MODEL = "lenet5-digits"
CONFIG = ROOT / "config" / "config.cpu.properties"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LAPTOP, PHONE = (1280, 800), (390, 844)
"""Sizes of a browser's window, in pixels."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the server as live, and run those last."""
    for item in items:
        if "torchserve" in getattr(item, "fixturenames", ()):
            item.add_marker("live")
    items.sort(key=lambda item: item.get_closest_marker("live") is not None)


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


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the default recipe, trained once; to be served by one worker, so that tests can count."""
    target = tmp_path_factory.mktemp("runs") / MODEL
    with_one_worker = recipe.load(MODEL, ["serving.workers=1"])
    pipeline.train(with_one_worker, MODEL, target, overwrite=False, console=Console(quiet=True))
    return target


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of `run` that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "own" / run.name))


@pytest.fixture(scope="session")
def model_store(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the archive of `run`."""
    store = tmp_path_factory.mktemp("model_store")
    build(run, MODEL, "1.0", store)
    return store


@pytest.fixture(scope="session")
def torchserve(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real TorchServe that serves `model_store`, tokens on."""
    run_dir = tmp_path_factory.mktemp("server")
    server = launch.start(run_dir, model_store, CONFIG, first_port=free_ports())
    yield server
    processes.stop(run_dir)


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
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()
