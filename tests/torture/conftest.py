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
from server import environment, processes
from server.launch import RunningServer
from tests.broken import appended, repacked
from tests.conftest import MODEL, started
from tests.images import encode, gradient

Record = Callable[[str, object], None]

IS_LONG = os.environ.get("TORTURE") == "long"
DEADLY = b"die"
"""The body that ends a worker of the broken archive."""
DEADLY_HANDLER = f"""
import os

KEPT = []
healthy = ImageClassifier.handle

def handle_or_die(self, data, context):
    KEPT.append(data)
    if any({DEADLY!r} in row.values() for row in data):
        os._exit(1)
    return healthy(self, data, context)

ImageClassifier.handle = handle_or_die
"""


@pytest.fixture(scope="session")
def tortured(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of its own: what is done to it must not reach the other tests."""
    with started(tmp_path_factory.mktemp("tortured"), model_store) as server:
        yield server


@pytest.fixture(scope="session")
def broken(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server of the negative controls: its handler keeps every batch, and dies of one body."""
    run_dir = tmp_path_factory.mktemp("broken")
    store = run_dir / "model_store"
    store.mkdir()
    repacked(
        model_store / f"{MODEL}.mar", store, lambda content: appended(content, "image_classifier.py", DEADLY_HANDLER)
    )
    with started(run_dir, store) as server:
        yield server


def start_bare(run_dir: Path, model_store: Path, *options: object) -> None:
    """TorchServe as its own documentation starts it, with snapshots; it may not answer yet."""
    subprocess.run(
        [sys.executable, "-m", "ts.model_server", "--start", "--model-store", str(model_store), *map(str, options)],
        cwd=run_dir, env=environment.for_server(run_dir, "text", False), check=True,
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
