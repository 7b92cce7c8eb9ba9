"""TorchServe's own tests from outside, its Postman collections: with our archive as many pass as with its handler.

TORCHSERVE_SOURCE names a checkout of TorchServe's repository, whose collections register archives from its model zoo.
Here every archive of that zoo is the same LeNet-5, once with our handler and once with TorchServe's.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch

from benchmarks.serving.models import SERVERS
from handler.variants import without_torchscript_warning
from networks import models
from server import processes
from tests.broken import repacked
from tests.conftest import MODEL, free_ports, wait_for
from tests.torture.conftest import Record, start_bare
from train import recipe

NEWMAN = shutil.which("newman")
SOURCE = Path(os.environ.get("TORCHSERVE_SOURCE") or "not given")
COLLECTIONS = SOURCE / "test" / "postman"

pytestmark = [
    pytest.mark.torture,
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(NEWMAN is None, reason="no newman on the PATH: npm install --global newman"),
    pytest.mark.skipif(not COLLECTIONS.is_dir(), reason="TORCHSERVE_SOURCE names no checkout of TorchServe"),
]


@dataclass(frozen=True)
class Judged:
    """A server with the archive of one handler, and what answers for the model zoo."""

    inference_url: str
    management_url: str
    metrics_url: str
    zoo: str

    def port(self, url: str) -> str:
        return url.rpartition(":")[2]


def stock_archive(run: Path, folder: Path, *options: str | Path) -> Path:
    """The network of `run` with TorchServe's own classifier, made as its documents say."""
    chosen = recipe.load(str(run / "recipe.yaml"))
    section = chosen.model.model_copy(update={"weights": str(run / "weights.safetensors")})
    network = models.build(section, chosen.input.channels, 10).network.eval()
    side = chosen.input.crop_size
    with without_torchscript_warning(), torch.no_grad():
        torch.jit.trace(network, torch.zeros(1, chosen.input.channels, side, side)).save(str(folder / "model.pt"))
    subprocess.run(
        [
            Path(sys.executable).with_name("torch-model-archiver"), "--model-name", MODEL, "--version", "1.0",
            "--handler", SERVERS / "stock_grey.py", "--serialized-file", folder / "model.pt",
            "--extra-files", run / "index_to_name.json", "--export-path", folder, *options,
        ],
        check=True,
    )  # fmt: skip
    return folder / f"{MODEL}.mar"


def without_workers(archive: Path, folder: Path) -> Path:
    """The archive with no workers declared, as TorchServe's examples are."""

    def change(content: Path) -> None:
        file = content / "model-config.yaml"
        file.write_text(re.sub(r"^(min|max)Workers:.*\n", "", file.read_text(), flags=re.MULTILINE))

    return repacked(archive, folder, change)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Judged]]:
    """Starts a server as the collections want it, tokens off and the model API on, beside a zoo of one archive."""
    ends: list[Callable[[], object]] = []

    def start(archive: Path) -> Judged:
        folder = tmp_path_factory.mktemp("judged")
        (folder / "store").mkdir()
        zoo = tmp_path_factory.mktemp("zoo")
        names = re.findall(r"[\w-]+\.mar", (COLLECTIONS / "management_data.json").read_text())
        for name in {*names, f"{MODEL}.mar"} - {"invalid-resnet-18.mar"}:
            shutil.copy(archive, zoo / name)
        web = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(zoo)))
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        ends.extend((web.shutdown, thread.join, web.server_close, lambda: processes.stop(folder)))
        port = free_ports()
        inference, management, metrics = (f"http://127.0.0.1:{port + index}" for index in range(3))
        server = Judged(inference, management, metrics, f"http://127.0.0.1:{web.server_address[1]}")
        (folder / "config.properties").write_text(
            f"inference_address={inference}\nmanagement_address={management}\nmetrics_address={metrics}\n"
            f"grpc_inference_port={port + 3}\ngrpc_management_port={port + 4}\n"
            f"metrics_mode=prometheus\nallowed_urls={server.zoo}/.*\n"
        )
        processes.temp_dir(folder).mkdir()
        (folder / "logs").mkdir()
        options = ("--ncs", "--disable-token-auth", "--enable-model-api", "--ts-config", folder / "config.properties")
        start_bare(folder, folder / "store", *options)
        wait_for(lambda: answers(f"{management}/models"), "its management API", 60)
        return server

    yield start
    for end in ends:
        end()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def newman(server: Judged, folder: Path, collection: str, rows: list[dict[str, object]]) -> dict[str, int]:
    """Run a collection over rows of data: how many of its assertions there are, and how many failed."""
    folder.mkdir(exist_ok=True)
    data, changed, report = folder / "data.json", folder / "collection.json", folder / "report.json"
    data.write_text(re.sub(r"https://[^\"&]*?/mar_files", server.zoo, json.dumps(rows)))
    text = (COLLECTIONS / collection).read_text()
    changed.write_text(text.replace("localhost:8082", server.metrics_url.removeprefix("http://")).replace(
        '"8082"', f'"{server.port(server.metrics_url)}"'
    ))  # fmt: skip
    ports = {"mgmt-port": server.port(server.management_url), "pred-port": server.port(server.inference_url)}
    assert NEWMAN is not None
    subprocess.run(
        [
            NEWMAN, "run", changed, "--environment", COLLECTIONS / "environment.json", "--iteration-data", data,
            "--env-var", "hostname=127.0.0.1", *(f"--env-var={key}={port}" for key, port in ports.items()),
            "--reporters", "cli,json", "--reporter-json-export", report,
        ],
        check=False,
    )  # fmt: skip
    counts: dict[str, int] = json.loads(report.read_text())["run"]["stats"]["assertions"]
    return {"assertions": counts["total"], "failed": counts["failed"]}


def row(server: Judged, picture: Path, expected: object) -> dict[str, object]:
    """One model of the zoo as the collections' data describe it."""
    return {
        "url": f"{server.zoo}/{MODEL}.mar",
        "model_name": MODEL,
        "worker": 1,
        "synchronous": "true",
        "file": str(picture),
        "content-type": "application/json",
        "validator": "image_classification",
        "expected": expected,
        "tolerance": 1,
    }


def stock_answer(server: Judged, picture: Path) -> object:
    """What TorchServe's classifier says of the image; registered for it and removed again."""
    models = f"{server.management_url}/models"
    url = {"url": f"{server.zoo}/{MODEL}.mar", "initial_workers": "1", "synchronous": "true"}
    requests.post(models, params=url, timeout=60).raise_for_status()
    answer = requests.post(f"{server.inference_url}/predictions/{MODEL}", data=picture.read_bytes(), timeout=60)
    answer.raise_for_status()
    requests.delete(f"{models}/{MODEL}", timeout=60).raise_for_status()
    return answer.json()


@pytest.mark.parametrize("declared", [False, True], ids=["no workers declared", "one worker declared"])
def test_as_many_pass_as_with_the_stock_handler(
    declared: bool, judged: Callable[[Path], Judged], run: Path, model_store: Path, digit: bytes, tmp_path: Path,
    record: Record,
) -> None:  # fmt: skip
    """The answer that is expected of both is the stock handler's; its explanations are lists of another shape."""
    picture = tmp_path / "digit.png"
    picture.write_bytes(digit)
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    ours.mkdir()
    stock.mkdir()
    archive = model_store / f"{MODEL}.mar"
    options = ("--config-file", run / "model-config.yaml") if declared else ()
    archives = {
        "stock": stock_archive(run, stock, *options),
        "ours": archive if declared else without_workers(archive, ours),
    }
    servers = {name: judged(made) for name, made in archives.items()}
    management = json.loads((COLLECTIONS / "management_data.json").read_text())
    expected = stock_answer(servers["stock"], picture)
    assert isinstance(expected, dict)
    for collection in ("management", "inference", "explanation"):
        file = f"{collection}_api_test_collection.json"
        counts = {}
        for name, server in servers.items():
            rows = [row(server, picture, expected)]
            if collection == "management":
                rows = management
            if collection == "explanation":
                del rows[0]["content-type"]
            counts[name] = newman(server, tmp_path / f"{collection}-{name}", file, rows)
            assert counts[name]["assertions"], "newman ran nothing"
            record(f"{collection}, {'one worker' if declared else 'no worker'} declared, {name}", counts[name])
        assert counts["ours"]["assertions"] == counts["stock"]["assertions"]
        assert counts["ours"]["failed"] <= counts["stock"]["failed"]

    fewer = dict(list(expected.items())[:3])
    control = newman(servers["ours"], tmp_path / "control", file.replace("explanation", "inference"), [
        row(servers["ours"], picture, fewer)
    ])  # fmt: skip
    assert control["failed"] > 0, "the control: an answer of another size fails"
