"""Ray Serve keeps the contract, with the application that `python -m export --to ray` writes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml

from archive import serving
from client.__main__ import app as client_app
from client.tokens import Tokens
from operate.grpc_door.messages import CLASSES
from server import processes
from tests.commands import invoke
from tests.conftest import MODEL, free_ports, run_module, wait_for
from tests.conftest import started as torchserve_in
from tests.contract.contract import V2, Engine, WholeContract, about, at_once, check_marks, of_v2, v2
from tests.edges import behind, load, make_folder, running
from tests.open_inference import answers_of, call, door_before, infer_request

if missing := [package for package in ("ray", "starlette", "python_multipart") if find_spec(package) is None]:
    pytest.skip(f"needs {', '.join(missing)}: pip install 'ray[serve]' python-multipart", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.server]
STARTS_WITHIN_S = 180.0
UP = re.compile(r"^http://127", re.MULTILINE)
BUSY = re.compile("timed out during startup|not available after")
"""Ray gives up a start after 30 s, and its proxies after 60, which a busy machine needs."""


@dataclass
class RunningRay:
    """An application of Ray Serve, its folder and its process."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.folder.parent / "said").read_text()

    @property
    def engine(self) -> Engine:
        port = yaml.safe_load((self.folder / "serve.yaml").read_text())["http_options"]["port"]
        token = Tokens(self.folder / "key_file.json", {}).token("inference").value
        return Engine(f"http://127.0.0.1:{port}", token, metrics_url=f"http://127.0.0.1:{port + 1}")


def export(run: Path, folder: Path, version: str = "1.0") -> Path:
    """The application as the command writes it, beneath `folder`."""
    finished = run_module("export", run, folder, "--to", "ray", "--name", MODEL, "--version", version)
    assert finished.returncode == 0, finished.stderr
    return folder / MODEL


@contextmanager
def started(application: Path, port: int) -> Iterator[RunningRay]:
    """`python app.py` on this port, until it has ended in order."""
    config = application / "serve.yaml"
    config.write_text(config.read_text().replace("port: 8080", f"port: {port}"))
    ray = start(application)
    for _ in range(2):
        if BUSY.search(ray.said):
            ray = start(application)
    try:
        yield ray
    finally:
        ray.process.terminate()
        ray.process.wait(timeout=STARTS_WITHIN_S)


def start(application: Path) -> RunningRay:
    """`python app.py`, until it serves or has ended."""
    with (application.parent / "said").open("wb") as said:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=application, stdout=said, stderr=said)
    ray = RunningRay(application, process)
    wait_for(lambda: UP.search(ray.said) or process.poll() is not None, "Ray Serve", STARTS_WITHIN_S)
    return ray


@pytest.fixture(scope="module")
def marked_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, with marks on its answers, for two replicas."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("marked") / MODEL))
    serving.change(folder, accept={"error_rate": 0.001}, workers=2)
    return folder


@pytest.fixture(scope="module")
def ray(marked_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRay]:
    with started(export(marked_run, tmp_path_factory.mktemp("ray")), free_ports()) as ray:
        assert ray.process.poll() is None, ray.said
        yield ray


class TestRayServe(WholeContract):
    @pytest.fixture
    def engine(self, ray: RunningRay) -> Engine:
        return ray.engine


def test_answers_are_marked(ray: RunningRay, run: Path) -> None:
    """As the recipe's `serving.accept` wants."""
    images = [path.read_bytes() for path in sorted((run / "golden").glob("*.png"))]
    assert set(check_marks(ray.engine, MODEL, images)) == {True, False}


def test_standard_grpc_clients(ray: RunningRay, run: Path) -> None:
    """Through `python -m operate grpc`, as before TorchServe: answers with their marks, readiness and metadata."""
    image = next((run / "golden").glob("*.png")).read_bytes()
    expected = of_v2(ray.engine.good(V2, json=v2(image)))
    named = {"name": MODEL, "version": "1.0"}
    with door_before(ray.engine.url) as door:
        for version in ("", "1.0"):
            request = infer_request(image, raw=True, model_version=version)
            response = call(door, "ModelInfer", request, ray.engine.token)
            assert answers_of(response) == [about(answer) for answer in expected]
            assert response.outputs[2].name == "accepted"
        assert call(door, "ServerReady", token=ray.engine.token).ready
        assert call(door, "ModelReady", CLASSES["ModelReadyRequest"](**named), ray.engine.token).ready
        described = call(door, "ModelMetadata", CLASSES["ModelMetadataRequest"](**named), ray.engine.token)
        assert [output.name for output in described.outputs] == ["label", "probability", "accepted"]
        with pytest.raises(grpc.RpcError) as refusal:
            call(door, "ModelInfer", infer_request(image), "wrong")
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_replicas_share_the_requests(ray: RunningRay) -> None:
    """As many as the recipe wants workers; each says who it is."""
    assert len(replicas(ray.engine)) == 2


def replicas(engine: Engine) -> set[str]:
    """Those that answer a number of requests."""
    described = [engine.ask("GET", f"/models/{MODEL}").json() for _ in range(40)]
    return {each[0]["workers"][0]["id"] for each in described}


def test_replicas_follow_the_load(run: Path, tmp_path: Path) -> None:
    """Without `serving.workers` a second one comes under load, and no request fails. Ray waits half a minute before it
    adds one, unless it is told otherwise."""
    own = Path(shutil.copytree(run, tmp_path / MODEL))
    serving.change(own, workers=None, batch_size=1)
    application = export(own, tmp_path / "homes")
    config = yaml.safe_load((application / "serve.yaml").read_text())
    deployment = config["applications"][0]["deployments"][0]
    deployment["max_constructor_retry_count"] = 5  # Ray gives up a start that a busy machine makes slow
    deployment["autoscaling_config"].update(
        upscale_delay_s=1, metrics_interval_s=1, look_back_period_s=2, max_replicas=2
    )
    (application / "serve.yaml").write_text(yaml.safe_dump(config))
    image = next((run / "golden").glob("*.png")).read_bytes()
    with started(application, free_ports()) as ray:
        assert len(replicas(ray.engine)) == 1

        def asked() -> set[str]:
            statuses = at_once([lambda: ray.engine.post(f"/predictions/{MODEL}", image).status_code] * 100)
            assert set(statuses) == {200}
            return replicas(ray.engine)

        wait_for(lambda: len(asked()) == 2, "a second replica", STARTS_WITHIN_S)


def test_the_clients_commands(ray: RunningRay, run: Path, tmp_path: Path) -> None:
    """They ask as they ask TorchServe; what changes a server says in one line who does that here."""
    url, images = ray.engine.url, sorted((run / "golden").glob("*.png"))
    place = ["--url", url, "--management-url", url, "--key-file", ray.folder / "key_file.json"]
    for number, image in enumerate(images):
        (tmp_path / str(number % 10)).mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / str(number % 10))
    said = {
        command: invoke(client_app, *place, command, *arguments)
        for command, *arguments in (
            ("predict", MODEL, images[0]), ("evaluate", MODEL, tmp_path), ("models",), ("describe", MODEL),
            ("scale", MODEL, 2), ("register", "more.mar"), ("unregister", MODEL),
        )
    }  # fmt: skip
    for command in ("predict", "evaluate", "models", "describe"):
        assert said[command].exit_code == 0, said[command].output
    assert said["models"].stdout == f"{MODEL}\n"
    assert "variant fp32" in said["describe"].stdout

    def counted() -> bool:
        return "classifier_requests_total" in invoke(client_app, *place, "metrics", MODEL).stdout

    wait_for(counted, "replicas tell Ray their metrics every few seconds")
    for command in ("scale", "register", "unregister"):
        assert said[command].exit_code == 1
        [line] = said[command].stderr.splitlines()
        assert "Ray Serve has no management API" in line


def test_a_new_version_takes_over_without_a_lost_request(ray: RunningRay, marked_run: Path, run: Path) -> None:
    """A second export in the place of the first, and SIGHUP, while somebody asks."""
    image, seen = sorted((run / "golden").glob("*.png"))[0].read_bytes(), [""]
    engine = ray.engine
    export(marked_run, ray.folder.parent, "1.1")
    ray.process.send_signal(signal.SIGHUP)

    def is_new() -> bool:
        answer = engine.post(f"/predictions/{MODEL}", image)
        assert answer.status_code == 200, answer.text
        seen.append(answer.headers["x-model-version"])
        return seen[-20:] == ["1.1"] * 20

    wait_for(is_new, "version 1.1 answers alone", STARTS_WITHIN_S)
    assert "1.0" in seen
    assert ray.engine == engine, "port and token stay"


def test_a_move_loses_no_request(ray: RunningRay, model_store: Path, run: Path, tmp_path: Path) -> None:
    """docs/leaving-torchserve.md under load: both behind the edge, a share moved, the rest, and TorchServe stopped."""
    image, golden = sorted((run / "golden").glob("*.png"))[0].read_bytes(), run / "golden"
    (place := tmp_path / "torchserve").mkdir()
    with torchserve_in(place, model_store) as server:
        port = free_ports()
        documented: dict[str, Any] = behind({"old": server}, golden)
        url = ray.engine.url
        entry = {"name": "new", "url": url, "management_url": url, "key_file": str(ray.folder / "key_file.json")}
        folder = make_folder(tmp_path / "edge", port, documented)
        with running(folder, port) as edge, load(edge, image) as asked:
            digest = edge.predict(image).headers["x-model-digest"]

            def move(old: dict[str, object], new: dict[str, object]) -> None:
                document = {**documented, "servers": [{**documented["servers"][0], **old}, {**entry, **new}]}
                (folder / "partial").write_text(yaml.safe_dump(document))
                (folder / "partial").replace(folder / "servers.yaml")

            def share() -> float:
                answers = [edge.predict(image).headers["x-model-digest"] for _ in range(100)]
                return sum(answer != digest for answer in answers) / 100

            move({"weight": 9}, {})
            wait_for(lambda: 0 < share() < 0.5, "a share is moved")
            move({}, {"weight": 9})
            wait_for(lambda: 0.5 < share() < 1, "most is moved")
            move({"drained": True}, {})
            wait_for(lambda: edge.in_service() == {"new"}, "all is moved")
            assert share() == 1
            processes.stop(place)
            assert edge.predict(image).status_code == 200
        assert asked.failed == {}


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_nobody_else_reaches_it(ray: RunningRay) -> None:
    """The application, its metrics and Ray itself listen on the loopback interface; what Serve's replicas open beside
    that asks for Ray's key."""
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    family = [(main := psutil.Process(ray.process.pid)), *main.children(recursive=True)]
    listening = set()
    for process in family:
        with suppress(psutil.NoSuchProcess):  # some of Ray's end at once
            listening |= {
                (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    assert len(listening) > 5
    for port in (port for address, port in listening if address != "127.0.0.1"):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refusal:
                stub.HandleRequest(serve_pb2.ASGIRequest(), timeout=10)
        assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_model_that_answers_otherwise_is_not_served(run: Path, tmp_path: Path) -> None:
    """The golden check refuses it as the application starts; one line says why."""
    application = export(run, tmp_path / "homes")
    golden = application / "model" / "golden" / "golden.json"
    document = json.loads(golden.read_text())
    name = next(iter(document["probabilities"]))
    document["probabilities"][name].reverse()
    golden.write_text(json.dumps(document))
    with started(application, free_ports()) as ray:
        assert ray.process.wait(timeout=STARTS_WITHIN_S) == 1
    assert "golden" in ray.said.splitlines()[-1]
