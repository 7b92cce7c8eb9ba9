"""Servers to be tortured, and how long: seconds by default, what docs/reliability.md states with TORTURE=long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from client.torchserve import TorchServe
from server import launch, processes
from server.launch import RunningServer
from tests.broken import repacked, replaced
from tests.conftest import CONFIG, MODEL, free_ports
from tests.images import encode, gradient

Record = Callable[[str, object], None]

IS_LONG = os.environ.get("TORTURE") == "long"
DEADLY = b"die"
"""The body that ends a worker of the broken archive."""


@pytest.fixture(scope="session")
def tortured(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of its own: what is done to it must not reach the other tests."""
    run_dir = tmp_path_factory.mktemp("tortured")
    yield launch.start(run_dir, model_store, CONFIG, first_port=free_ports())
    processes.stop(run_dir)


@pytest.fixture(scope="session")
def broken(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server of the negative controls: its handler keeps every batch, and dies of one body."""
    run_dir = tmp_path_factory.mktemp("broken")
    store = run_dir / "model_store"
    store.mkdir()
    repacked(model_store / f"{MODEL}.mar", store, _break)
    yield launch.start(run_dir, store, CONFIG, first_port=free_ports())
    processes.stop(run_dir)


def _break(content: Path) -> None:
    first = "        started = time.perf_counter()\n        rows"
    worse = (
        "        globals().setdefault('KEPT', []).append(data)\n"
        f"        if any({DEADLY!r} in row.values() for row in data):\n"
        "            import os; os._exit(1)\n"
    )
    replaced(content, "image_classifier.py", first, worse + first)


def start_bare(run_dir: Path, model_store: Path, *options: object) -> None:
    """TorchServe as its own documentation starts it, with snapshots; it may not answer yet."""
    subprocess.run(
        [sys.executable, "-m", "ts.model_server", "--start", "--model-store", str(model_store), *map(str, options)],
        cwd=run_dir, env=launch._environment(run_dir, "text", False), check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Keeps a figure for docs/reliability.md; a list is several measurements of the same."""

    def keep(name: str, value: object) -> None:
        request.node.user_properties.append((name, json.dumps(value)))

    return keep


@pytest.fixture(scope="session")
def photograph() -> bytes:
    """An image of 200 kB that takes the worker some milliseconds: it, and not the load generator, sets the pace."""
    noise = np.random.default_rng(0).integers(0, 32, (900, 1200, 1)) == 0
    return encode(Image.fromarray(np.asarray(gradient(1200, 900)) ^ noise.astype(np.uint8)), compress_level=1)


def hasty(server: RunningServer) -> TorchServe:
    """A client that asks once."""
    return TorchServe(server.inference_url, server.management_url, server.key_file, retry_s=0)


def processes_of(server: RunningServer) -> set[psutil.Process]:
    """TorchServe and its workers: the same ones afterwards if nothing has crashed."""
    java = processes.find(server.key_file.parent)
    assert java is not None, "TorchServe has ended"
    return {java, *processes.workers(server.key_file.parent)}
