"""The client and a TorchServe of its own, whose worker is stopped and killed, whose tokens expire within seconds."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import yaml
from PIL import Image

from archive.content import ArchiveContent
from client import metrics
from client.__main__ import app
from client.errors import (
    ModelApiOff,
    ModelNotFound,
    NotAuthorized,
    NoWorkers,
    ServerBusy,
    ServerUnreachable,
    WorkerDied,
)
from client.tokens import Token
from client.torchserve import TorchServe
from operate import golden
from operate.errors import NotAsMeasured
from operate.readiness.checks import ANSWER_TIMEOUT_S, ModelCheck
from operate.readiness.probe import ProbeServer
from server.launch import RunningServer
from tests.broken import spoil_golden_answers
from tests.commands import command, command_line, invoke
from tests.conftest import MODEL, ROOT, free_ports, wait_for, with_model_api
from tests.contract.contract import Engine, check_marks
from tests.observed import requests_counted, workers
from tests.test_live_grpc import infer

EXPIRY_S = 6
SHOWS_WITHIN_S = 5


@pytest.fixture(scope="module")
def own(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server to be harmed: model API on, tokens that live for seconds, a queue of four."""
    keys = f"token_expiration_min={EXPIRY_S / 60}\njob_queue_size=4\n"
    with with_model_api(tmp_path_factory.mktemp("harmed"), model_store, keys) as server:
        yield server


@pytest.fixture
def harmed(own: RunningServer) -> Iterator[TorchServe]:
    """A client of that server; its model has one ready worker before and after."""
    client = own.client()
    client.wait_until_ready(MODEL)
    yield client
    for process in workers(client):
        process.resume()
    client.scale(MODEL, 1)


@pytest.fixture
def probe(harmed: TorchServe, own: RunningServer, run: Path) -> Iterator[str]:
    """The address of `ready --http` for the harmed server."""
    server = TorchServe(own.inference_url, own.management_url, own.key_file, timeout_s=ANSWER_TIMEOUT_S, retry_s=0)
    check = ModelCheck(server, MODEL, golden.GoldenFile(run / "golden"))
    with ProbeServer(("127.0.0.1", 0), check) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def readyz(probe: str) -> requests.Response:
    return requests.get(f"{probe}/readyz", timeout=10)


def test_whether_an_answer_is_accepted_is_said_by_every_protocol(own: RunningServer, run: Path) -> None:
    """The header over HTTP, a field of KServe v1, an output of v2 and of gRPC, and the client: all the same marks."""
    store = own.key_file.parent / "model_store"
    content = ArchiveContent(store / f"{MODEL}.mar")
    config = yaml.safe_load(content.read("model-config.yaml"))
    config["handler"]["accept"] = {"error_rate": 0.001}
    content.copy(store / "marked.mar", {"model-config.yaml": yaml.safe_dump(config)})
    client, images = own.client(), sorted((run / "golden").glob("*.png"))
    client.register("marked", model="marked")
    try:
        marks = [client.classify("marked", image.read_bytes()).accepted for image in images]
        assert set(marks) == {True, False}
        engine = Engine(own.inference_url, client.token())
        assert check_marks(engine, "marked", [image.read_bytes() for image in images]) == marks
        data = {"datatype": "BYTES", "shape": [len(images)], "bytes_contents": [image.read_bytes() for image in images]}
        accepted = infer(own, model="marked", **data).outputs[-1]
        assert (accepted.name, list(accepted.contents.bool_contents)) == ("accepted", marks)
        place = ["--url", own.inference_url, "--key-file", own.key_file]
        said = invoke(app, *place, "predict", "marked", run / "golden").stdout
        assert [line.endswith(", not accepted") for line in said.splitlines()] == [not mark for mark in marks]
    finally:
        client.unregister("marked")


@pytest.mark.slow
def test_a_worker_that_hangs_shows_within_seconds(probe: str, harmed: TorchServe, own: RunningServer) -> None:
    """A stopped worker: TorchServe's ping stays Healthy, /readyz is 503 within 5 s, and 200 again when it goes on."""
    assert readyz(probe).status_code == 200
    for _ in range(2):
        [worker] = workers(harmed)
        worker.suspend()
        wait_for(lambda: readyz(probe).status_code == 503, "not ready", SHOWS_WITHIN_S)
        token = json.loads(own.key_file.read_text())["inference"]["key"]
        ping = requests.get(f"{own.inference_url}/ping", headers={"Authorization": f"Bearer {token}"}, timeout=10)
        assert ping.json() == {"status": "Healthy"}
        assert requests.get(f"{probe}/healthz", timeout=10).json() == {"status": "alive"}
        worker.resume()
        wait_for(lambda: readyz(probe).status_code == 200, "ready again", 20)


@pytest.mark.slow
def test_a_killed_worker_shows_within_seconds(probe: str, harmed: TorchServe) -> None:
    """Killed as often as it comes back, the worker is missed within 5 s; left alone, it is back."""
    assert readyz(probe).status_code == 200

    def kill_and_look() -> bool:
        for worker in workers(harmed):
            worker.send_signal(signal.SIGKILL)
        return readyz(probe).status_code == 503

    wait_for(kill_and_look, "not ready", SHOWS_WITHIN_S)
    assert re.search("0 of 1 workers|no answer|Worker died", readyz(probe).json()["reason"])
    wait_for(lambda: readyz(probe).status_code == 200, "ready again", 60)


@pytest.mark.slow
def test_a_wrong_answer_is_not_ready(own: RunningServer, harmed: TorchServe, run: Path, tmp_path: Path) -> None:
    """Another model's golden answers: the workers are READY all the same, and `ready --golden` says what differs."""
    assert command(own, "ready", MODEL, "--golden", run / "golden").stdout.endswith("answered as measured\n")
    shutil.copytree(run / "golden", tmp_path / "golden")
    spoil_golden_answers(tmp_path)
    wrong = command(own, "ready", MODEL, "--golden", tmp_path / "golden")
    assert wrong.returncode == 1
    assert re.search(r"error: \d+\.png, class '\d': 0\.\d+ instead of 0\.\d+", wrong.stderr)
    readiness = ModelCheck(harmed, MODEL, golden.GoldenFile(tmp_path / "golden"))()
    assert not readiness.ready
    assert "instead of" in readiness.reason
    with pytest.raises(NotAsMeasured):
        golden.read(tmp_path / "none")


@pytest.mark.slow
def test_the_metrics_of_the_probe_are_those_of_its_looks(probe: str, harmed: TorchServe) -> None:
    """A worker that is well has answered rightly and in time; one that hangs counts as ready, its model does not."""

    def figures() -> dict[str, float]:
        samples = metrics.parse(requests.get(f"{probe}/metrics", timeout=10).text)
        results = {one.labels["result"]: one.value for one in samples if "result" in one.labels}
        return results | {one.name.removeprefix("torchserve_"): one.value for one in samples if len(one.labels) == 2}

    before = figures()
    assert (before["model_ready"], before["right"], before["wrong"], before["none"]) == (1, 1, 0, 0)
    assert (before["model_workers_ready"], before["model_workers_declared"]) == (1, 1)
    assert 0 < before["golden_seconds_sum"] < ANSWER_TIMEOUT_S
    assert abs(time.time() - before["model_look_timestamp_seconds"]) < SHOWS_WITHIN_S
    [worker] = workers(harmed)
    worker.suspend()
    wait_for(lambda: figures()["none"] >= 1, "a golden image without an answer", 2 * SHOWS_WITHIN_S)
    during = figures()
    assert (during["model_ready"], during["model_workers_ready"], during["wrong"]) == (0, 1, 0)
    worker.resume()
    wait_for(lambda: figures()["model_ready"] == 1, "ready again", 20)


@pytest.mark.slow
def test_the_probe_is_a_command(own: RunningServer, harmed: TorchServe) -> None:
    """`ready --http 0` prints where it listens, and answers there without a token."""
    with subprocess.Popen(
        command_line(own, "ready", MODEL, "--http", "0"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answer = requests.get(url, timeout=10)
        process.terminate()
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert url.startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_tokens_are_renewed_before_they_expire(
    own: RunningServer, harmed: TorchServe, digit: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight threads outlive their tokens twice: no call fails, none uses a token to its end, no log holds one."""
    last_used: dict[Token, float] = {}
    tokens = harmed._connection.tokens
    harmed.predict(MODEL, digit)  # the server's first token may be at its end
    deadline, pause = time.monotonic() + 2.2 * EXPIRY_S, threading.Event()

    def ask(_: int) -> int:
        asked = 0
        while time.monotonic() < deadline:
            last_used[tokens.token("inference")] = time.time()
            assert len(harmed.predict(MODEL, digit)) == 5
            asked += 1
            pause.wait(0.05)
        return asked

    with caplog.at_level(logging.DEBUG), ThreadPoolExecutor(8) as pool:
        assert min(pool.map(ask, range(8))) > 10
    assert 3 <= len(last_used) <= 6, "a renewal for each life, not for each call"
    assert all(used < token.expires_at - 0.5 for token, used in last_used.items() if token.expires_at is not None)
    assert "POST /predictions" in caplog.text
    assert not [token for token in (*last_used, tokens.token("API")) if token.value in caplog.text]


@pytest.mark.slow
def test_an_expired_token_of_the_environment_is_replaced(
    own: RunningServer, harmed: TorchServe, digit: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A refused variable gives way to the key file; without one the message names the variable and no token."""
    monkeypatch.setenv("TORCHSERVE_INFERENCE_TOKEN", "expired-long-ago")
    assert len(own.client().predict(MODEL, digit)) == 5
    alone = TorchServe(own.inference_url, own.management_url, tmp_path / "none.json")
    with pytest.raises(NotAuthorized, match="TORCHSERVE_INFERENCE_TOKEN is refused and cannot be renewed") as refusal:
        alone.predict(MODEL, digit)
    assert "expired-long-ago" not in str(refusal.value)


@pytest.mark.slow
def test_a_full_queue_is_waited_for(own: RunningServer, harmed: TorchServe, digit: bytes) -> None:
    """While the worker hangs the queue fills: asked once is 503, asked again until it goes on is answered."""
    [worker] = workers(harmed)
    worker.suspend()
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(harmed.predict, MODEL, digit) for _ in range(20)]
        wait_for(lambda: is_full(own, digit), "a full queue", 20)
        worker.resume()
        assert all(len(answer.result()) == 5 for answer in asked)


@pytest.mark.slow
@pytest.mark.parametrize("retry_s", [60, 0])
def test_a_killed_worker_costs_no_prediction(
    own: RunningServer, harmed: TorchServe, digit: bytes, retry_s: float
) -> None:
    """The request in a killed worker gets 507; asked again it is answered by the next one, asked once it fails."""
    first = TorchServe(own.inference_url, own.management_url, own.key_file, retry_s=retry_s)
    [worker] = workers(harmed)
    worker.suspend()
    before = requests_counted(own)
    with ThreadPoolExecutor(13) as pool:
        asked = pool.submit(first.predict, MODEL, digit)
        wait_for(lambda: requests_counted(own) > before, "the first request", 10)
        others = [pool.submit(harmed.predict, MODEL, digit) for _ in range(12)]
        wait_for(lambda: is_full(own, digit), "a full queue, so that the worker has the first request", 20)
        worker.send_signal(signal.SIGKILL)
        if retry_s:
            assert len(asked.result()) == 5
        else:
            with pytest.raises(WorkerDied):
                asked.result()
        assert all(len(other.result()) == 5 for other in others)


def is_full(server: RunningServer, digit: bytes) -> bool:
    hasty = TorchServe(server.inference_url, server.management_url, server.key_file, timeout_s=0.5, retry_s=0)
    try:
        hasty.predict(MODEL, digit)
    except ServerBusy:
        return True
    except ServerUnreachable:
        return False
    return False


@pytest.mark.slow
def test_without_workers_the_error_says_so(own: RunningServer, harmed: TorchServe, digit: bytes) -> None:
    """Scaled to zero, a prediction fails at once with the way back; scaled up, it is answered."""
    assert command(own, "scale", MODEL, "0").stdout == f"{MODEL}: 0 workers ready\n"
    started = time.monotonic()
    with pytest.raises(NoWorkers, match=f"python -m client scale {MODEL} 1"):
        harmed.predict(MODEL, digit)
    assert time.monotonic() - started < 5
    assert command(own, "scale", MODEL, "1").returncode == 0
    assert len(harmed.predict(MODEL, digit)) == 5


@pytest.mark.slow
def test_models_come_and_go(own: RunningServer, harmed: TorchServe, digit: bytes) -> None:
    """Unregistered, a model is not found; registered again by its file's path, it has the workers that were asked for
    or the archive's, and answers at once; a default is set."""
    assert "unregistered" in command(own, "unregister", MODEL).stdout
    with pytest.raises(ModelNotFound):
        harmed.predict(MODEL, digit)
    both = command(own, "register", f"model_store/{MODEL}.mar", "--workers", "2", "--ceiling", "2").stdout
    assert both == f"{MODEL}/1.0: 2 workers ready\n"
    assert harmed.ready_workers(MODEL) == 2
    command(own, "unregister", MODEL)
    assert command(own, "register", f"model_store/{MODEL}.mar").stdout == f"{MODEL}/1.0: 1 worker ready\n"
    assert harmed.ready_workers(MODEL) == 1
    assert len(harmed.predict(MODEL, digit)) == 5
    assert '"1.0"' in command(own, "set-default", MODEL, "1.0").stdout
    missing = command(own, "set-default", MODEL, "9.9")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "9.9" in missing.stderr
    unknown = command(own, "register", "nobody")
    assert unknown.returncode == 1
    assert "nobody.mar" in unknown.stderr


def test_the_model_api_is_off_by_default(torchserve: RunningServer, client: TorchServe) -> None:
    """Refused with the line of configuration that would allow it, and nothing is removed."""
    for call in (lambda: client.register(MODEL), lambda: client.unregister(MODEL)):
        with pytest.raises(ModelApiOff, match=r"enable_model_api=true.*config\.cpu\.properties"):
            call()
    assert client.models() == [MODEL]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_killed_run_goes_on(torchserve: RunningServer, run: Path, tmp_path: Path, suffix: str) -> None:
    """Killed in the middle and called again, a run ends with one row for each image, and says what it skipped."""
    golden_images = sorted((run / "golden").glob("*.png"))
    for number in range(400):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(golden_images[number % len(golden_images)], tmp_path / "images" / f"{number:03}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    output = tmp_path / f"results.{suffix}"
    arguments = ("predict", MODEL, tmp_path / "images", "--output", output)
    with subprocess.Popen(
        command_line(torchserve, *arguments, "--concurrency", "1"), cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") > 20, "rows", 60)
        process.kill()
    rows = output.read_bytes().count(b"\n") - (suffix == "csv")
    assert rows < 400
    with output.open("ab") as file:
        file.write(output.read_bytes().splitlines()[-1][:25])
    again = command(torchserve, *arguments)
    assert again.returncode == 1
    assert f"skipped {rows} images" in again.stderr
    assert "bad.png: 415" in again.stderr
    assert again.stdout == f"{output}: 401 rows, 1 error\n"
    files = re.findall(r"\d{3}\.png|bad\.png", output.read_text())
    assert len(files) == len(set(files)) == 401
    done = command(torchserve, *arguments)
    assert (done.returncode, done.stdout) == (1, again.stdout)


def test_progress_is_shown_to_people_and_kept_out_of_pipes(torchserve: RunningServer, run: Path) -> None:
    """With stderr a terminal there is a bar on it, and stdout in a pipe holds rows of JSON alone."""
    images = sorted((run / "golden").glob("*.png"))
    ours, theirs = os.openpty()
    with subprocess.Popen(
        command_line(torchserve, "predict", MODEL, run / "golden", "--json"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ, "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(theirs)
        assert process.stdout is not None
        rows = [json.loads(line) for line in process.stdout]
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert [row["file"] for row in rows] == [str(image) for image in images]
    assert "━" in shown
    assert "prediction" not in shown
    piped = command(torchserve, "predict", MODEL, run / "golden")
    assert piped.stderr == ""
    assert len(piped.stdout.splitlines()) == len(images)


def test_a_reader_that_leaves_is_no_error(torchserve: RunningServer, run: Path) -> None:
    """As `| head -1` does; what cannot be written for another reason is told."""
    line = command_line(torchserve, "predict", MODEL, *[run / "golden"] * 9)
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert MODEL in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
    with Path("/dev/full").open("w") as full:
        told = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr.startswith("error: ")


def test_an_image_on_standard_input(torchserve: RunningServer, digit: bytes) -> None:
    """`-` is one image, and its answer is JSON where that is asked for."""
    answer = subprocess.run(
        command_line(torchserve, "predict", MODEL, "-", "--json"),
        cwd=ROOT,
        input=digit,
        capture_output=True,
        check=True,
    )
    document = json.loads(answer.stdout)
    assert document["file"] == "-"
    assert len(document["prediction"]) == 5


def test_pictures_of_explanations(torchserve: RunningServer, run: Path, tmp_path: Path) -> None:
    """A PNG for each image under names that do not collide, the failed one reported; or numbers with --json."""
    image = sorted((run / "golden").glob("*.png"))[0]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(image, tmp_path / folder / "digit.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    answer = command(torchserve, "explain", MODEL, tmp_path, "--output", tmp_path / "new" / "pictures")
    assert answer.returncode == 1
    assert "bad.png: 415" in answer.stderr
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["digit-explained-2.png", "digit-explained.png"]
    for picture in pictures:
        with Image.open(picture) as image_of_it:
            assert image_of_it.size == (320, 320)
    numbers = json.loads(command(torchserve, "explain", MODEL, image, "--json").stdout)
    assert len(numbers["explanation"]["grid"]) == 14


def test_metrics_are_a_table(torchserve: RunningServer, client: TorchServe, digit: bytes) -> None:
    """`metrics` shows the model's requests; another port says what to name."""
    client.predict(MODEL, digit)
    assert metrics.interesting(metrics.read(torchserve.metrics_url))
    table = command(torchserve, "metrics", MODEL).stdout
    assert re.search(rf"ts_inference_requests_total +{MODEL} +model_version=default +[\d,]+", table)
    wrong = command(torchserve, "metrics", "--metrics-url", f"http://127.0.0.1:{free_ports()}")
    assert "--metrics-url" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_many_threads_share_a_client(client: TorchServe, run: Path) -> None:
    """Each of many concurrent calls through one client gets the answer to its own image."""
    images = golden.read(run / "golden") * 20

    def ask(image: golden.GoldenImage) -> None:
        image.check(client.predict(MODEL, image.data))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, images))


def test_no_token_reaches_the_command_line(torchserve: RunningServer, digit: bytes, tmp_path: Path) -> None:
    """Whatever fails, neither stream of a command holds a token."""
    (tmp_path / "digit.png").write_bytes(digit)
    secrets = [entry["key"] for entry in json.loads(torchserve.key_file.read_text()).values()]
    environment = {**os.environ, "TORCHSERVE_INFERENCE_TOKEN": "also-a-secret"}
    for arguments in (("models",), ("describe", "nobody"), ("predict", "nobody", str(tmp_path / "digit.png"))):
        finished = command(torchserve, *arguments, env=environment)
        for secret in (*secrets, "also-a-secret"):
            assert secret not in finished.stdout + finished.stderr
