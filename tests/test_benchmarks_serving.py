"""The serving benchmark: what it sends, what it counts, what it starts and stops, and what it makes of the numbers."""

from __future__ import annotations

import email
import email.policy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from tritonclient.utils import serialize_byte_tensor
from typer import Typer
from typer.testing import CliRunner

from benchmarks import allocator, document, handler, records, training
from benchmarks.errors import BenchmarkError, ReportError, SetupError, StartFailed
from benchmarks.ports import free_ports
from benchmarks.records import Record
from benchmarks.serving import bodies, load, measure, models, report
from benchmarks.serving.__main__ import app
from benchmarks.serving.bodies import FORMS
from benchmarks.serving.home import Home
from benchmarks.serving.peers import Peer, Plan
from benchmarks.serving.process import Server, family
from benchmarks.serving.targets import targets
from client.torchserve import TorchServe
from server import processes
from server.launch import RunningServer
from tests.conftest import MODEL
from tests.listening import Quiet, listening

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")

ANSWERING = """
import itertools, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
most = int(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
count = itertools.count(1)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = b'{"cat": 0.7, "dog": 0.3}'
        self.send_response(500 if body == b"bad" or next(count) > most else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *arguments): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
PEER = Peer(lambda launch: Plan((sys.executable, "-c", ANSWERING, str(launch.port))))


def record(model: str, peer: str, number: int, rates: list[float], **more: object) -> Record:
    """A measurement with those requests/s at 1, 8 and 32, and times that follow from them."""
    loads = {
        str(connections): {
            "requests_per_s": rate, "p50_ms": 1e3 * connections / rate, "p99_ms": 2e3 * connections / rate, "errors": 0
        }
        for connections, rate in zip((1, 8, 32), rates, strict=True)
    }  # fmt: skip
    about = {"round": number, "model": model, "peer": peer, "date": "2026-11-21", "machine": "a machine", "error": None}
    return {**about, "load": loads, "cold_start_s": 2.0, "memory_mb": 100.0, **more}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Bodies and the expected answer of a model that `PEER` answers for."""
    home = Home(tmp_path / "home")
    bodies.write(home.bodies("pets", "raw"), FORMS["raw"], [b"good"])
    home.expected.write_text(json.dumps({"pets": {"cat": 0.71, "dog": 0.29}}))
    return home


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "server"
    directory.mkdir()
    return directory


@pytest.fixture
def port(directory: Path) -> Iterator[int]:
    """Where a server that answers 500 to the body "bad" listens."""
    port = free_ports()
    server = Server(Plan((sys.executable, "-c", ANSWERING, str(port))), directory)
    server.await_answer(lambda: requests.post(f"http://127.0.0.1:{port}", b"good", timeout=5).ok)
    yield port
    server.stop()


def test_the_line_of_the_load_generator() -> None:
    """Good answers alone count as requests/s; bad ones and broken connections are errors."""
    line = '{"requests": 300, "seconds": 2.0, "p50_ms": 1.5, "p99_ms": 9.25, "bad_status": 20, "failed": 3}'
    assert load.parse(f"Running 2s test\n\n{line}\n") == load.Load(140.0, 1.5, 9.25, 300, 23)


@pytest.mark.process
@needs_wrk
@pytest.mark.parametrize(("images", "bad_share"), [([b"good"], 0.0), ([b"good", b"bad"], 0.5), ([b"bad"], 1.0)])
def test_the_bodies_are_sent_in_turns(port: int, tmp_path: Path, images: list[bytes], bad_share: float) -> None:
    """Half of the requests fail where every second body is refused, and all or none where all or none are."""
    bodies.write(tmp_path / "bodies", FORMS["raw"], images)
    got = load.generate(f"http://127.0.0.1:{port}", FORMS["raw"].all_headers, tmp_path / "bodies", 2, 1)
    assert got.requests > 20
    assert got.errors / got.requests == pytest.approx(bad_share, abs=0.05)


@pytest.mark.process
@needs_wrk
def test_a_load_that_cannot_begin_says_why(tmp_path: Path) -> None:
    """Without a server there is no result, but an error with the address."""
    bodies.write(tmp_path, FORMS["raw"], [b"good"])
    port = free_ports()
    with pytest.raises(BenchmarkError, match=f"^.*wrk .*http://127.0.0.1:{port}.*: .*refused"):
        load.generate(f"http://127.0.0.1:{port}", {}, tmp_path, 1, 1)


def test_triton_gets_what_its_own_client_sends() -> None:
    """The images are serialised as by tritonclient, after a description of the announced length that fits them."""
    images = [b"first", b"second image"]
    form = FORMS["triton"]
    body = form.encode(images)
    length = int(form.headers["Inference-Header-Content-Length"])
    theirs = serialize_byte_tensor(np.array([[image] for image in images], dtype=object)).item()
    assert body[length:] == theirs
    [described] = json.loads(body[:length])["inputs"]
    assert (described["shape"], described["parameters"]) == ([2, 1], {"binary_data_size": len(theirs)})


def test_a_form_carries_its_images() -> None:
    """A parser of MIME finds every image, byte for byte, in order."""
    form = FORMS["multipart"]
    images = [b"\xff\xd8 one\r\n", b"--two"]
    head = f"Content-Type: {form.content_type}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + form.encode(images), policy=email.policy.HTTP).iter_parts()
    assert [part.get_payload(decode=True) for part in parts] == images


@pytest.mark.parametrize(
    ("answer", "tolerance", "agrees"),
    [
        ({"cat": 0.68, "dog": 0.3}, 0.05, True),
        ({"cat": 0.6, "dog": 0.4}, 0.05, False),
        ({"dog": 0.71, "cat": 0.29}, 0.05, False),
        ({"anything": 1.0}, None, True),
    ],
)  # fmt: skip
def test_a_right_answer(answer: dict[str, float], tolerance: float | None, agrees: bool) -> None:
    """The best class and its probability decide, but for a server whose answer means nothing."""
    assert measure.agrees(answer, {"cat": 0.7, "dog": 0.3}, tolerance) is agrees


def answering() -> set[int]:
    """The peers that run on this machine, those of other test runs among them."""
    return {each.pid for each in psutil.process_iter(["cmdline"]) if ANSWERING in (each.info["cmdline"] or [])}


@pytest.mark.slow
@pytest.mark.process
@needs_wrk
def test_a_peer_is_measured(home: Home, directory: Path) -> None:
    """A real server under real load gives requests at every concurrency, a cold start and memory, and is gone after."""
    before = answering()
    measured = measure.serve(home, "pets", PEER, directory, 1)
    assert set(measured["load"]) == {"1", "8", "32"}
    assert all(got["requests_per_s"] > 10 and got["errors"] == 0 for got in measured["load"].values())
    assert 0 < measured["cold_start_s"] < 60
    assert measured["memory_mb"] > 5
    assert answering() <= before


@pytest.mark.process
@needs_wrk
@pytest.mark.slow
def test_a_server_that_answers_once_is_not_measured(home: Home, directory: Path) -> None:
    """A load without a good answer would have the best percentiles; it is an error instead."""
    once = Peer(lambda launch: Plan((sys.executable, "-c", ANSWERING, str(launch.port), "1")))
    with pytest.raises(BenchmarkError, match="no good answer to 1 connections in 1 s"):
        measure.serve(home, "pets", once, directory, 1)


@pytest.mark.process
def test_a_server_that_ends_is_said_so(home: Home, directory: Path) -> None:
    """Instead of waiting, the status and the log are named."""
    failing = Peer(lambda launch: Plan((sys.executable, "-c", "raise SystemExit(3)")))
    with pytest.raises(StartFailed, match=r"ended after \d+ s with 3: see .*console\.log"):
        measure.serve(home, "pets", failing, directory, 1)


@pytest.mark.parametrize(("answers", "fits"), [([{}] * 32, True), ([{}] * 31, False), ({"cat": 1.0}, False)])
def test_of_several_images_each_must_be_answered(tmp_path: Path, answers: object, fits: bool) -> None:
    """Or a server that drops all but one would seem thirty times as fast."""

    class Answering(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(answers)

    (tmp_path / "00.bin").write_bytes(b"a form")
    with listening(Answering) as url, nullcontext() if fits else pytest.raises(BenchmarkError, match="32 images"):
        measure.check_every_image(tmp_path, url, {})


@pytest.mark.process
def test_what_a_server_left_in_the_background_is_stopped(directory: Path) -> None:
    """A process in a session of its own is found by its mark; one that another started is left alone."""
    command = f"setsid {sys.executable} -c 'import time; time.sleep(600)' & echo started; wait"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    server = Server(Plan(("bash", "-c", command)), directory)
    try:
        server.await_answer(lambda: len(server.family()) >= 2)
        found = server.family()
        assert bystander.pid not in {process.pid for process in found}
    finally:
        server.stop()
    try:
        assert not any(processes.is_alive(process) for process in found)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_that_drops_the_mark_is_weighed(torchserve: RunningServer, client: TorchServe, tmp_path: Path) -> None:
    """Java, the workers and whom they were forked from, by its working directory; in another folder there is none."""
    run_dir = torchserve.key_file.parent
    found = {process.pid: process for process in family(run_dir, "no mark")}
    workers = [worker["pid"] for worker in client.describe(MODEL)["workers"]]
    assert {*workers, processes.find(run_dir).pid} < found.keys()
    assert found[workers[0]].ppid() in found
    assert family(tmp_path, "no mark") == []


@needs_wrk
def test_the_served_classifier_under_load(
    torchserve: RunningServer, client: TorchServe, digit: bytes, tmp_path: Path
) -> None:
    """Requests with a token are answered, one image or many, and those without are counted as errors."""
    token = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    for name in ("raw", "multipart-32"):
        bodies.write(tmp_path / name, FORMS[name], [digit])
        headers = {**FORMS[name].all_headers, "Authorization": f"Bearer {token}"}
        got = load.generate(url, headers, tmp_path / name, 2, 1)
        assert (got.requests > 0, got.errors) == (True, 0)
    refused = load.generate(url, FORMS["raw"].all_headers, tmp_path / "raw", 2, 1)
    assert refused.errors == refused.requests > 0


def test_a_round_goes_on_where_it_was(tmp_path: Path) -> None:
    """What succeeded is not measured again; what failed is, and its new failure is a line of its own."""
    home = Home(tmp_path)
    known = [record("resnet18", name, 0, [1, 2, 3]) for name in ("in-process", "in-process-int8")]
    known[1]["error"] = "once"
    home.results.write_text("".join(f"{json.dumps(one)}\n" for one in known) + '{"half')
    said: list[str] = []
    measure.rounds(home, ["resnet18"], ["in-process", "in-process-int8"], 1, 2, said.append)
    [line] = said
    assert "in-process-int8" in line
    assert "No such file" in line
    assert len(records.read(home.results)) == 3
    assert records.read(home.results)[2]["error"] in line


def test_the_round_that_is_furthest_off_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all its peers, until the figures are steady; what never becomes steady is named and gets a mark."""
    rates = {"ours": [100, 99, 70, 101], "fastapi": [50, 50, 36, 49, 50, 80, 20, 80, 20]}
    monkeypatch.setattr(records, "about", lambda: {"error": None, "date": "2026-11-21", "machine": "a machine"})

    def measured(home: Home, model: str, name: str, seconds: int) -> Record:
        made = record(model, name, 0, [rates[name].pop(0)] * 3)
        return {key: made[key] for key in ("load", "cold_start_s", "memory_mb")}

    monkeypatch.setattr(measure, "measure", measured)
    home, said = Home(tmp_path), []
    assert measure.rounds(home, ["resnet18"], list(rates), 3, 2, said.append) == []
    assert [line for line in said if "again" in line] == [
        "ours with resnet18 at 8: its rounds differ by 30%; round 3 is measured again"
    ]
    [failed] = measure.rounds(home, ["resnet18"], ["fastapi"], 5, 2, said.append)
    assert failed == "fastapi with resnet18 on a machine that is quiet enough"
    assert len([line for line in said if "again" in line]) == 1 + measure.MOST_REPEATS
    text = report.render(records.read(home.results))
    assert "| fastapi \\* |" in text
    assert "| ours |" in text
    assert "\\* Its rounds differ by more than 10%" in text


def test_targets_are_ratios_within_a_round() -> None:
    """The machine was half as fast in the second round: each ratio is 3, which that of extremes is not."""
    rounds = {
        "ours": {n: record("resnet18", "ours", n, [speed, 60 * speed, 90 * speed]) for n, speed in enumerate((1, 0.5))},
        "fastapi": {n: record("resnet18", "fastapi", n, [1, 20 * s, 90 * s]) for n, s in enumerate((1, 0.5))},
        "litserve": {n: record("resnet18", "litserve", n, [1, 10 * s, 10 * s]) for n, s in enumerate((1, 0.5))},
    }
    found = {target.text: target for target in targets({"resnet18": rounds})}
    at_8 = found["ResNet-18 at 8: ours / fastapi, the nearest PyTorch peer"]
    assert list(at_8.values) == [3.0, 3.0]
    assert at_8.verdict == "reached"
    assert found["ResNet-18 at 32: ours / fastapi, the nearest PyTorch peer"].verdict == "**missed**"
    steady = found["ResNet-18: ours at 8 / at 32"]
    assert list(steady.values) == pytest.approx([2 / 3, 2 / 3])
    assert steady.verdict == "**missed**"
    assert found["LeNet-5 at 8: ours / no-op"].verdict == "not measured"


def test_images_of_many_and_time_beside_the_limit() -> None:
    """32 images in each of 40 requests/s are 12.8 times 100 images/s; 10 ms are 2 ms more than 8."""
    ours = record("lenet5", "ours", 0, [100, 100, 100], many_images={"requests_per_s": 40})
    limit = record("lenet5", "in-process", 0, [125, 900, 900], cold_start_s=1.0)
    found = {target.text: target for target in targets({"lenet5": {"ours": {0: ours}, "in-process": {0: limit}}})}
    assert list(found["LeNet-5 at 8: images/s, 32 images a request / one"].values) == pytest.approx([12.8])
    assert list(found["LeNet-5 at 1: p50 of ours − in-process, ms"].values) == pytest.approx([2.0])
    start = found["LeNet-5: cold start of ours / a process that loads the file"]
    assert (list(start.values), start.verdict) == ([2.0], "**missed**")


def test_the_report_states_median_spread_and_number(tmp_path: Path) -> None:
    """Between the markers stands what was measured, and nothing else of the document changes."""
    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- serving: begin -->\nstale figures\n<!-- serving: end -->\nafter\n")
    records = [record("resnet18", "ours", n, [10, rate, 30]) for n, rate in enumerate((22.5, 24, 23))]
    records.append({**record("resnet18", "ray", 0, [1, 1, 1]), "error": "no right answer"})
    report.write(document, records)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- serving: end -->\nafter\n")
    assert "stale figures" not in text
    costs, times = re.findall(r"^\| ours \|.*", text, flags=re.MULTILINE)
    assert costs.split(" | ")[1:4] == ["10.0 (10.0–10.0)", "23.0 (22.5–24.0)", "30.0 (30.0–30.0)"]
    assert costs.endswith("| 0 | 100 (100–100) | 2.00 (2.00–2.00) | 3 |")
    assert times.count("(") == 6
    assert "2026-11-21, on a machine" in text
    assert "Not measured: ray with resnet18." in text


def test_a_report_has_something_to_say_and_a_place(tmp_path: Path) -> None:
    """Without results or without the markers the document stays as it was."""
    document = tmp_path / "benchmarks.md"
    document.write_text("no markers\n")
    with pytest.raises(ReportError, match="lacks the lines"):
        report.write(document, [record("resnet18", "ours", 0, [1, 2, 3])])
    with pytest.raises(ReportError, match="nothing was measured"):
        report.write(document, [{**record("resnet18", "ours", 0, [1, 2, 3]), "error": "failed"}])
    assert document.read_text() == "no markers\n"


def test_the_document_has_the_markers(tmp_path: Path) -> None:
    """docs/benchmarks.md can be written again."""
    for name in ("serving", "finetuning"):
        document.replace(Path(shutil.copy(report.DOCUMENT, tmp_path)), name, "")


def test_too_few_photographs_are_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "photographs" / "one.jpg")
    with pytest.raises(SetupError, match="holds 1 JPEG photographs, needed are 60"):
        models.write_images(Home(tmp_path / "home"), tmp_path / "photographs")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (app, ["run", "FOLDER", "--only", "nobody"], "error: --only nobody: expected one of ours, "),
        (
            app,
            ["run", "FOLDER", "--model", "resnet"],
            "error: --model resnet: expected one of resnet18, resnet18-12mp, lenet5",
        ),
        (app, ["run", "FOLDER"], "is not set up: python -m benchmarks.serving setup "),
        (app, ["report", "FOLDER"], "error: nothing was measured yet: "),
        (training.app, ["loader", "lenet", "--data", "FOLDER"], "error: no recipe "),
        (training.app, ["tutorial", "--data", "FOLDER"], "error: "),
        (handler.app, ["jpeg", "--images", "FOLDER", "--weights", "FOLDER/none"], "holds no JPEG photograph"),
    ],
)
def test_mistakes_are_said_in_one_line(command: Typer, arguments: list[str], message: str, tmp_path: Path) -> None:
    """Exit 1, no traceback, and what to do; by every benchmark."""
    result = CliRunner().invoke(command, [part.replace("FOLDER", str(tmp_path)) for part in arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_its_load_generator_nothing_is_started(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once before the rounds, and not for every server in turn."""
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["run", str(home.path), "--only", "ours", "--only", "in-process"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: wrk is missing: install it")
    assert not home.results.exists()


def test_a_run_that_could_not_measure_all_fails(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is named once, after the rounds; the limits in process need no load generator."""
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ("--only", "in-process", "--model", "lenet5", "--rounds", "2")
    result = CliRunner().invoke(app, ["run", str(home.path), *options])
    assert result.exit_code == 1
    assert result.stderr == "error: not measured: in-process with lenet5; the same command tries them again\n"
    assert len(records.read(home.results)) == 2


@pytest.mark.parametrize(("command", "arguments"), [(handler.app, ["stages"]), (allocator.app, [])])
def test_a_folder_that_is_no_run_is_refused(command: Typer, arguments: list[str], tmp_path: Path) -> None:
    """By the benchmarks of the handler too, before they load anything."""
    result = CliRunner().invoke(command, [*arguments, str(tmp_path)])
    assert result.exit_code == 2
    assert "lacks model-config.yaml" in re.sub(r"[\s│]+", " ", result.stderr)
