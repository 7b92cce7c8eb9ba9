"""The client without a server: which images it takes, what it writes, which tokens it finds, when it asks again."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from typer.testing import CliRunner

from client import bulk, exposition, golden, metrics
from client.__main__ import app
from client.bulk import Outcome
from client.errors import (
    ClientError,
    ModelNotFound,
    NotAsMeasured,
    NotAuthorized,
    NothingListens,
    OutputUnusable,
    RequestRefused,
    ServerBusy,
    ServerUnreachable,
    WorkerDied,
)
from client.inputs import expand
from client.probe import ProbeServer
from client.readiness import INTERVAL_S, GoldenAnswers, ModelCheck, Readiness, Watch, Workers
from client.results import Results
from client.tokens import Tokens
from client.torchserve import TorchServe
from client.tuning.wire import Wire
from tests.edges import certificate_command

MODEL = "lenet5-digits"
GOOD = Outcome("a.png", prediction={"7": 0.9, "1": 0.1})
BAD = Outcome('b, "b"\n.png', error="415 UnsupportedImage: not\nan image")


def names(*paths: str | Path) -> list[str]:
    return [source.name for source in expand([str(path) for path in paths])]


def test_folders_patterns_and_files_become_images(tmp_path: Path) -> None:
    """Folders to any depth for images alone, patterns as the shell has them, each image once, in order."""
    for name in ("b.png", "a.JPG", "notes.txt", "deep/er/c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    below = [str(tmp_path / name) for name in ("a.JPG", "b.png", "deep/er/c.webp")]
    assert names(tmp_path) == below
    assert names(tmp_path / "**" / "*.webp") == below[2:]
    assert names(tmp_path / "d*") == below[2:]
    assert names(tmp_path / "b.png", tmp_path) == [below[1], below[0], below[2]]
    assert names(tmp_path / "notes.txt", "-", tmp_path / "none.png") == [
        str(tmp_path / "notes.txt"), "-", str(tmp_path / "none.png")
    ]  # fmt: skip


def test_a_file_named_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    """Brackets in a name do not make it vanish."""
    (tmp_path / "cat[1].png").write_bytes(b"")
    assert names(tmp_path / "cat[1].png") == [str(tmp_path / "cat[1].png")]


def test_no_image_is_said(tmp_path: Path) -> None:
    """An empty folder and a pattern without a match are errors that name them."""
    for path, complaint in ((tmp_path, "no image in this folder"), (tmp_path / "*.png", "no file matches")):
        with pytest.raises(ClientError, match=rf"{re.escape(str(path))}: {complaint}"):
            names(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_results_go_on_where_they_end(tmp_path: Path, suffix: str) -> None:
    """Rows are in the file at once, are found again, and say which were errors; odd names survive."""
    path = tmp_path / f"results{suffix}"
    with closing(Results(path, MODEL)) as results:
        assert GOOD.name not in results
        results.write(GOOD)
        results.write(BAD)
        content = path.read_bytes()
    with closing(Results(path, MODEL)) as again:
        assert GOOD.name in again
        assert BAD.name in again
        assert again.failed == 1
    assert path.read_bytes() == content
    assert content.count(b"\n") == (3 if suffix == ".csv" else 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_wherever_a_run_was_killed_its_file_can_go_on(tmp_path: Path, suffix: str) -> None:
    """Cut after any byte, the file is repaired, and writing what it lacks gives the file of an unbroken run."""
    path = tmp_path / f"results{suffix}"
    with closing(Results(path, MODEL)) as results:
        for outcome in (GOOD, BAD):
            results.write(outcome)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with closing(Results(path, MODEL)) as results:
            for outcome in (GOOD, BAD):
                if outcome.name not in results:
                    results.write(outcome)
        assert path.read_bytes() == whole, f"cut after {length} bytes"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("results.txt", "", r"must end in \.jsonl or \.csv"),
        ("results.jsonl", '{"a": 1}\n', "line 1: not a result"),
        ("results.jsonl", "[1]\n", "line 1: not a result"),
        ("results.jsonl", "my only copy", "line 1: not a result"),
        ("results.jsonl", '{"model": "other", "file": "a", "prediction": {}}\n', "the model other"),
        ("results.csv", "name,price\n", "line 1: not a result"),
        ("results.csv", "my only copy", "line 1: not a result"),
        ("results.csv", 'model,file,class,probability,prediction,error\n"open\n', "line 2: not a result"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    """Nobody's file is continued, repaired or emptied by mistake."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(OutputUnusable, match=complaint):
        Results(path, MODEL)
    assert path.read_text() == content


def key_file(folder: Path, **entries: object) -> Path:
    path = folder / "key_file.json"
    path.write_text(json.dumps(entries))
    return path


def test_tokens_of_the_environment_go_first(tmp_path: Path) -> None:
    """A set variable is taken, an empty one is not, and once replaced it is forgotten."""
    path = key_file(tmp_path, inference={"key": "filed"}, management={"key": "filed too"})
    environment = {"TORCHSERVE_INFERENCE_TOKEN": "given", "TORCHSERVE_MANAGEMENT_TOKEN": ""}
    tokens = Tokens(path, environment)
    assert tokens.token("inference").value == "given"
    assert tokens.token("management").value == "filed too"
    assert tokens.place("inference") == "TORCHSERVE_INFERENCE_TOKEN"
    tokens.forget_given("inference")
    assert tokens.token("inference").value == "filed"
    assert Tokens(tmp_path / "none.json", environment).token("inference").value == "given"


def test_a_line_break_after_a_token_is_cut_off(tmp_path: Path) -> None:
    """As a file that was read into the variable ends with; nothing but that is as if it were not set."""
    path = key_file(tmp_path, management={"key": "filed"})
    tokens = Tokens(path, {"TORCHSERVE_INFERENCE_TOKEN": "given\r\n", "TORCHSERVE_MANAGEMENT_TOKEN": "\n"})
    assert tokens.token("inference").value == "given"
    assert tokens.token("management").value == "filed"


@pytest.mark.parametrize("value", ["very\nsecret", "very secret", "vëry-secret", "ὁ-secret"])
def test_what_cannot_be_sent_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Neither in the message nor in the results, where there is no row that a corrected run would skip."""
    monkeypatch.setenv("TORCHSERVE_INFERENCE_TOKEN", value)
    (tmp_path / "a.png").write_bytes(b"image")
    output = tmp_path / "results.jsonl"
    refused = CliRunner().invoke(app, ["predict", MODEL, str(tmp_path / "a.png"), "--output", str(output)])
    assert (refused.exit_code, output.read_text()) == (1, "")
    assert refused.stderr.startswith("error: TORCHSERVE_INFERENCE_TOKEN is set to what cannot be a token")
    assert "secret" not in refused.output


@pytest.mark.parametrize("decimals", ["", ".5", ".123456", ".123456789"])
def test_the_key_file_says_when_a_token_expires(tmp_path: Path, decimals: str) -> None:
    """Java writes as many decimals as it has; none of them, or nothing at all, is in the way."""
    entry = {"key": "k", "expiration time": f"2026-01-02T03:04:05{decimals}Z"}
    path = key_file(tmp_path, inference=entry, management={"key": "k", "expiration time": "soon"}, API={"key": "k"})
    assert Tokens(path, {}).token("inference").expires_at == 1767323045
    assert Tokens(path, {}).token("management").expires_at is None
    assert Tokens(path, {}).token("API").expires_at is None


def test_a_key_file_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """TorchServe empties its file before it writes it; a reader in between gets the token all the same."""
    path = tmp_path / "key_file.json"
    path.write_text("")
    timer = threading.Timer(0.1, key_file, (tmp_path,), {"inference": {"key": "late"}})
    timer.start()
    assert Tokens(path, {}).token("inference").value == "late"
    timer.join()


def test_a_token_is_not_shown(tmp_path: Path) -> None:
    """Neither by repr nor as text, and neither is the client that has it."""
    path = key_file(tmp_path, inference={"key": "very-secret"})
    tokens = Tokens(path, {"TORCHSERVE_MANAGEMENT_TOKEN": "very-secret"})
    client = TorchServe(key_file=path)
    shown = [tokens, vars(tokens), tokens.token("inference"), client, vars(client), vars(client._connection)]
    assert not [thing for thing in shown if "very-secret" in f"{thing!r} {thing!s}"]
    assert tokens.token("inference").value == "very-secret"


GOLDEN = {"tolerance": 0.01, "class_names": ["cat", "dog", "eel"], "probabilities": {"a.png": [0.7, 0.2, 0.1]}}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    (tmp_path / "golden.json").write_text(json.dumps(GOLDEN))
    (tmp_path / "a.png").write_bytes(b"image")
    return tmp_path


@pytest.mark.parametrize("answer", [{"cat": 0.705, "dog": 0.195}, {"cat": 0.7, "dog": 0.2, "eel": 0.1}, {"cat": 0.695}])
def test_a_measured_answer_passes(reference: Path, answer: dict[str, float]) -> None:
    """All classes or the best alone, within the tolerance."""
    [image] = golden.read(reference)
    image.check(answer)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"cat": 0.6, "dog": 0.2}, r"a\.png, class 'cat': 0\.600000 instead of 0\.700000"),
        ({"dog": 0.7, "cat": 0.2}, "class 'dog'"),
        ({"cat": float("nan")}, "class 'cat': nan"),
        ({"cow": 0.7}, "'cow', which training did not know"),
        ({"dog": 0.2}, "lacks 'cat'"),
        ({}, "lacks 'cat'"),
    ],
)
def test_another_answer_is_named(reference: Path, answer: dict[str, float], complaint: str) -> None:
    """Moved, swapped, no number, a foreign class, the best one missing; a larger tolerance forgives the first."""
    [image] = golden.read(reference)
    with pytest.raises(NotAsMeasured, match=complaint):
        image.check(answer)
    golden.read(reference, tolerance=0.2)[0].check({"cat": 0.6, "dog": 0.2})


@pytest.mark.parametrize(
    "content", ["", "{}", '{"tolerance": 1, "class_names": ["a"], "probabilities": {"a.png": []}}']
)
def test_golden_answers_that_cannot_be_read_are_said(reference: Path, content: str) -> None:
    """A broken reference is an error and never a pass."""
    (reference / "golden.json").write_text(content)
    with pytest.raises(NotAsMeasured, match=r"golden\.json"):
        golden.read(reference)


def test_an_archive_brings_its_golden_images(reference: Path, tmp_path: Path) -> None:
    """The same as from the folder; a file that is none, or one that carries none, is an error."""
    archive = tmp_path / "model.mar"
    with zipfile.ZipFile(archive, "w") as members:
        for name in ("golden.json", "a.png"):
            members.write(reference / name, f"golden/{name}")
    assert golden.read(archive) == golden.read(reference)
    assert golden.read(archive, tolerance=0.2)[0].tolerance == 0.2
    with zipfile.ZipFile(archive, "w"):
        pass
    for content in (archive.read_bytes(), b"no archive"):
        archive.write_bytes(content)
        with pytest.raises(NotAsMeasured, match=r"golden\.json in .*model\.mar cannot be read"):
            golden.read(archive)


def test_golden_answers_without_an_image_are_said(reference: Path) -> None:
    """Nothing to compare with is no proof."""
    (reference / "golden.json").write_text(json.dumps({**GOLDEN, "probabilities": {}}))
    with pytest.raises(NotAsMeasured, match="lists no image"):
        golden.read(reference)


PROMETHEUS = r"""# HELP classifier_info x
# TYPE classifier_info gauge
classifier_info{ModelName="m",Version="1.0",Digest="ab\"c",Hostname="h",} 1.0
classifier_stage_seconds_bucket{ModelName="m",Stage="total",le="+Inf",} 4.0
classifier_stage_seconds_count{ModelName="m",Stage="total",} 4.0
classifier_stage_seconds_sum{ModelName="m",Stage="total",} 2.0
classifier_stage_seconds_created{ModelName="m",Stage="total",} 1.7E9
ts_inference_requests_total{model_name="n",model_version="default",hostname="h",} 8.0
ts_inference_latency_microseconds{model_name="n",model_version="default",hostname="h",} 1600.0
Requests2XX{Level="Host",Hostname="h",} 9.0
jvm_threads 5
"""


def test_metrics_become_rows_for_people() -> None:
    """Sums become means, buckets and the JVM's own are left out, a named model has its rows alone."""
    rows = metrics.interesting(metrics.parse(PROMETHEUS))
    assert [(row.name, row.model, row.value) for row in rows] == [
        ("classifier_info", "m", 1),
        ("classifier_stage_seconds_mean", "m", 0.5),
        ("Requests2XX", None, 9),
        ("ts_inference_latency_microseconds_mean", "n", 200),
        ("ts_inference_requests_total", "n", 8),
    ]
    assert rows[0].shown_labels == r"Version=1.0 Digest=ab\"c"
    assert {row.model for row in metrics.interesting(metrics.parse(PROMETHEUS), "n")} == {"n"}


Answer = tuple[int, dict[str, object]]
OK: Answer = (200, {"7": 0.9})
FULL: Answer = (503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker to serve"})
FAILED: Answer = (503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"})
LIMITED: Answer = (429, {"code": 429, "type": "TooManyRequestsException", "message": "Too many requests"})
REMOVED: Answer = (200, {"status": f'Model "{MODEL}" unregistered'})
GONE: Answer = (404, {"code": 404, "type": "ModelNotFoundException", "message": f"Model not found: {MODEL}"})
CONFUSED: Answer = (500, {"code": 500, "type": "InternalServerException", "message": "ConcurrentModificationException"})
UNKNOWN: Answer = (401, {"code": 401, "type": "NotAuthorizedException", "message": "Send a key"})
DIED: Answer = (507, {"code": 507, "type": "InternalServerException", "message": "Worker died."})
DIED_UNSEEN: Answer = (500, {"code": 500, "type": "InternalServerException", "message": "Worker died."})

Serve = Callable[..., tuple[TorchServe, list[Answer]]]


class Quiet(BaseHTTPRequestHandler):
    """Has no line on stderr for each request."""

    def answer(self, document: object, status: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server on this machine that answers as `handler` does."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Serve]:
    """A server that gives the answers it is told to, in order; its client, and the answers still to be given."""

    def serve(*answers: Answer, retry_s: float = 20) -> tuple[TorchServe, list[Answer]]:
        remaining = list(answers)

        class Handler(Quiet):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_DELETE()

            def do_DELETE(self) -> None:
                status, document = remaining.pop(0)
                self.answer(document, status)

        path = key_file(tmp_path, inference={"key": "i"}, management={"key": "m"})
        url = servers.enter_context(listening(Handler))
        return TorchServe(url, "http://127.0.0.1:9", path, retry_s=retry_s), remaining

    with ExitStack() as servers:
        yield serve


@pytest.mark.parametrize("answers", [[FULL, FULL, OK], [DIED, DIED_UNSEEN, OK], [FULL, DIED, OK], [LIMITED, OK]])
def test_what_is_safe_is_asked_again(scripted: Serve, answers: list[Answer]) -> None:
    """A full queue, a worker that was killed and an edge's limit are waited out."""
    client, _ = scripted(*answers)
    assert client.predict(MODEL, b"image") == OK[1]


@pytest.mark.parametrize("answer", [FAILED, (413, {"type": "ImageTooLarge", "message": ""}), (500, {})])
def test_nothing_else_is_asked_again(scripted: Serve, answer: Answer) -> None:
    """What the handler failed at and what was refused would fail again."""
    client, remaining = scripted(answer, OK)
    with pytest.raises(RequestRefused) as refusal:
        client.predict(MODEL, b"image")
    assert refusal.value.status == answer[0]
    assert remaining == [OK]


@pytest.mark.parametrize("url", ["localhost:8080", "http//localhost", "http://localhost:port", "http://[::1"])
def test_what_is_no_address_is_said(tmp_path: Path, url: str) -> None:
    """Once and by its name; no image gets a row that a corrected run would skip, but a file that is missing does."""
    (tmp_path / "a.png").write_bytes(b"image")
    output = tmp_path / "results.jsonl"
    place = ["--url", url, "--key-file", str(key_file(tmp_path, inference={"key": "i"}, management={"key": "m"}))]
    asked = ["predict", MODEL, str(tmp_path / "none.png"), str(tmp_path / "a.png"), "--output", str(output)]
    refused = CliRunner().invoke(app, [*place, "--management-url", "http://127.0.0.1:9", *asked])
    assert refused.exit_code == 1
    assert re.search(rf"^error: {re.escape(url)}\S* is no address of a server.*\n$", refused.stderr, re.MULTILINE)
    [row] = map(json.loads, output.read_text().splitlines())
    assert row["file"] == str(tmp_path / "none.png")
    without = CliRunner().invoke(app, [*place, "models"])
    assert re.fullmatch(rf"error: {re.escape(url)} is no address of a server.*\n", without.stderr)


@pytest.mark.parametrize(
    ("url", "management_url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8081"),
        ("http://models.example/", "http://models.example:81"),
        ("http://[::1]:8080", "http://[::1]:8081"),
        ("https://[fe80::1]:9", "https://[fe80::1]:10"),
    ],
)
def test_management_is_at_the_next_port(url: str, management_url: str) -> None:
    """Of the same host by the same scheme; an IPv6 address keeps its brackets, without which it has no port."""
    assert TorchServe(url).management_url == management_url


def test_a_token_that_cannot_be_sent_is_not_shown(tmp_path: Path) -> None:
    """One of the key file's too, of which `requests` itself would tell."""
    path = key_file(tmp_path, inference={"key": "very\nsecret"})
    with pytest.raises(ClientError, match=r"^cannot ask http://127\.0\.0\.1:9/\S+: InvalidHeader$"):
        TorchServe("http://127.0.0.1:9", key_file=path).predict(MODEL, b"image")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """One that was made by the documented line, with its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on this machine")
    subprocess.run(["bash", "-ec", certificate_command()], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "certificate.pem"


def test_a_private_authority_is_named(certificate: Path, tmp_path: Path) -> None:
    """By option or variable, for calls, metrics and loads alike; without it nothing is sent, and the option is said."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, certificate.with_suffix(".key"))
    path = key_file(tmp_path, management={"key": "m"})

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.answer({"models": [{"modelName": "m"}]})

    with listening(Handler, tls) as url:
        place, own = ["--url", url, "--management-url", url, "--key-file", str(path)], ["--ca", str(certificate)]
        asked = (["models"], ["metrics", "--metrics-url", url])
        for command in asked:
            untrusted = CliRunner().invoke(app, [*place, *command])
            assert untrusted.exit_code == 1
            complaint = rf"error: no TLS with {url} \(.*certificate verify failed.*\): --ca or TORCHSERVE_CA names .*\n"
            assert re.fullmatch(complaint, untrusted.stderr)
            assert CliRunner().invoke(app, [*place, *own, *command]).exit_code == 0
        assert CliRunner().invoke(app, [*place, "models"], env={"TORCHSERVE_CA": str(certificate)}).output == "m\n"
        request = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with closing(Wire(url, certificate)) as wire:
            assert wire.ask(request, time.perf_counter() + 10)[0] == 200
        with closing(Wire(url)) as wire, pytest.raises(ssl.SSLCertVerificationError):
            wire.ask(request, time.perf_counter() + 10)


@pytest.mark.parametrize("name", ["none.pem", "key_file.json"])
def test_a_file_without_certificates_is_said(tmp_path: Path, name: str) -> None:
    """One that is missing and one that holds something else, before anything is asked."""
    key_file(tmp_path, management={"key": "m"})
    refused = CliRunner().invoke(app, ["--ca", str(tmp_path / name), "models"])
    assert refused.exit_code == 1
    assert re.fullmatch(rf"error: \S+{name} is no file of certificates in PEM: .+\n", refused.stderr)


def test_an_answer_that_breaks_off_is_no_row(tmp_path: Path) -> None:
    """A server that ends within its answer is unreachable, which would befall every further image."""

    class Handler(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"7": ')

    (tmp_path / "a.png").write_bytes(b"image")
    with listening(Handler) as url, pytest.raises(ServerUnreachable, match="closed the connection before it answered"):
        client = TorchServe(url, key_file=key_file(tmp_path, inference={"key": "i"}))
        list(bulk.predict(client, MODEL, expand([str(tmp_path / "a.png")]), 1))


@pytest.mark.parametrize("answers", [[REMOVED], [CONFUSED, REMOVED], [CONFUSED, GONE]])
def test_a_failed_removal_is_made_again(scripted: Serve, answers: list[Answer]) -> None:
    """Once, after a 500; that the model is not found then is what was wanted."""
    client, remaining = scripted(*answers)
    managed = TorchServe(client.url, client.url, client._connection.tokens.path)
    assert managed.unregister(MODEL) == f'Model "{MODEL}" unregistered'
    assert remaining == []


@pytest.mark.parametrize(
    ("answers", "error"), [([CONFUSED, CONFUSED, REMOVED], RequestRefused), ([FAILED, REMOVED], RequestRefused),
                           ([GONE, REMOVED], ModelNotFound)],
)  # fmt: skip
def test_another_removal_is_not_made_again(scripted: Serve, answers: list[Answer], error: type[ClientError]) -> None:
    """A second 500, another status and a model that was not found at first are raised."""
    client, remaining = scripted(*answers)
    managed = TorchServe(client.url, client.url, client._connection.tokens.path)
    with pytest.raises(error):
        managed.unregister(MODEL)
    assert remaining == [REMOVED]


def test_an_unknown_key_ends_a_run(scripted: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge's 401 would befall every image: it is raised, says where the key is from, and does not show it."""
    monkeypatch.setenv("TORCHSERVE_INFERENCE_TOKEN", "very-secret")
    client, remaining = scripted(UNKNOWN, OK)
    (tmp_path / "a.png").write_bytes(b"image")
    with pytest.raises(NotAuthorized, match=r"^401 NotAuth\S+: Send a key .*TORCHSERVE_INFERENCE_TOKEN") as refusal:
        list(bulk.predict(client, MODEL, expand([str(tmp_path / "a.png")]), 1))
    assert "very-secret" not in str(refusal.value)
    assert remaining == [OK]


def test_asking_again_ends(scripted: Serve) -> None:
    """When the time is up the last error is raised; an image that kills workers gets three of them."""
    started = time.monotonic()
    client, _ = scripted(*[FULL] * 50, retry_s=0.5)
    with pytest.raises(ServerBusy):
        client.predict(MODEL, b"image")
    assert 0.4 < time.monotonic() - started < 5
    client, remaining = scripted(*[DIED] * 5)
    with pytest.raises(WorkerDied):
        client.predict(MODEL, b"image")
    assert len(remaining) == 2


def test_a_server_that_was_there_is_waited_for(scripted: Serve) -> None:
    """A refused connection is tried again only if the server has answered before; otherwise it is said at once."""
    client, _ = scripted(OK, retry_s=0.5)
    client.predict(MODEL, b"image")
    port = int(client.url.rpartition(":")[2])
    gone = TorchServe("http://127.0.0.1:9", key_file=client._connection.tokens.path, retry_s=60)
    started = time.monotonic()
    with pytest.raises(NothingListens):
        gone.predict(MODEL, b"image")
    assert time.monotonic() - started < 5
    client._connection.urls = {**client._connection.urls, "inference": f"http://127.0.0.2:{port}"}
    started = time.monotonic()
    with pytest.raises(NothingListens):
        client.predict(MODEL, b"image")
    assert time.monotonic() - started > 0.4


def test_a_watch_asks_once_however_many_look() -> None:
    """Many threads within one interval cost one check; the next interval another."""
    checks = iter(range(10))
    watch = Watch(lambda: Readiness(True, str(next(checks))), interval_s=0.3)
    with ThreadPoolExecutor(16) as pool:
        seen = {readiness.reason for readiness in pool.map(lambda _: watch.look(), range(100))}
    assert seen == {"0"}
    deadline = time.monotonic() + 10
    while watch.look().reason == "0":
        assert time.monotonic() < deadline
    assert next(checks) == 2


def test_a_watch_does_not_wait_for_a_check_that_hangs() -> None:
    """A hanging check is not ready after the limit, is not joined by a second one, and does not hold up who asks."""
    release, begun = threading.Event(), []

    def hang() -> Readiness:
        begun.append(time.monotonic())
        release.wait(30)
        return Readiness(True, "late")

    watch = Watch(hang, interval_s=0, limit_s=0.2)
    started = time.monotonic()
    looks = [watch.look() for _ in range(20)]
    assert time.monotonic() - started < 5
    assert not any(look.ready for look in looks)
    assert "no answer" in looks[0].reason
    assert len(begun) == 1
    release.set()
    deadline = time.monotonic() + 10
    while not watch.look().ready:
        assert time.monotonic() < deadline


def test_a_server_that_answers_nonsense_is_not_ready() -> None:
    """Whatever a check stumbles over is a reason, and the next check is made all the same."""
    outcomes = iter([KeyError("workers"), None])

    def check() -> Readiness:
        if error := next(outcomes):
            raise error
        return Readiness(True, "")

    watch = Watch(check, interval_s=0)
    assert watch.ended_at is None
    assert watch.look() == Readiness(False, "the server is not what it should be (KeyError: 'workers')")
    assert watch.ended_at is not None
    assert watch.look().ready


class CountedCheck(ModelCheck):
    """Counts how often it is made."""

    made = 0

    def __call__(self) -> Readiness:
        self.made += 1
        return super().__call__()


@pytest.fixture
def unreachable(tmp_path: Path) -> Iterator[tuple[str, CountedCheck]]:
    """The address of a readiness server whose TorchServe is not there, and its check."""
    check = CountedCheck(TorchServe("http://127.0.0.1:1", key_file=tmp_path / "none"), f"{MODEL}/2.0", [])
    with ProbeServer(("127.0.0.1", 0), check) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", check
        server.shutdown()
        thread.join()


def test_readiness_and_its_metrics_are_one_look(unreachable: tuple[str, CountedCheck]) -> None:
    """However often both are asked; what is not known has no figure."""
    url, check = unreachable
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: requests.get(url + path, timeout=10), ["/readyz", "/metrics"] * 10))
    assert check.made <= 1 + (time.monotonic() - started) / INTERVAL_S
    assert {answer.status_code for answer in answers[::2]} == {503}
    assert set(answers[0].json()) == {"ready", "reason"}
    assert {answer.headers["Content-Type"] for answer in answers[1::2]} == {exposition.CONTENT_TYPE}
    figures = {sample.name: sample for sample in metrics.parse(answers[1].text)}
    assert set(figures) == {"torchserve_model_ready", "torchserve_model_look_timestamp_seconds"}
    assert figures["torchserve_model_ready"].value == 0
    assert figures["torchserve_model_ready"].labels == {"model_name": MODEL, "model_version": "2.0"}
    assert requests.get(f"{url}/metric", timeout=10).status_code == 404


def test_golden_answers_are_counted_by_what_became_of_them() -> None:
    """Right, wrong and none; the buckets are cumulative, and what had no answer is in none but the last."""
    answers = GoldenAnswers().with_answer(0.03, right=True).with_answer(0.3, right=False).without_answer(1.8)
    samples = metrics.parse(exposition.text('a "b"', Readiness(True, "", Workers(1, 2)), 2.0, answers))
    results = {one.labels["result"]: one.value for one in samples if one.name == "torchserve_golden_answers_total"}
    assert results == {"right": 1, "wrong": 1, "none": 1}
    buckets = [(one.labels["le"], one.value) for one in samples if one.name.endswith("_bucket")]
    assert buckets == [
        ("0.01", 0), ("0.025", 0), ("0.05", 1), ("0.1", 1), ("0.25", 1), ("0.5", 2), ("1.0", 2), ("2.0", 2),
        ("+Inf", 3),
    ]  # fmt: skip
    others = {one.name.removeprefix("torchserve_"): one.value for one in samples if len(one.labels) == 2}
    assert others == {
        "model_ready": 1, "model_workers_ready": 1, "model_workers_declared": 2, "model_look_timestamp_seconds": 2,
        "golden_seconds_sum": pytest.approx(2.13), "golden_seconds_count": 3,
    }  # fmt: skip
    assert samples[0].labels["model_name"] == r"a \"b\""


@pytest.mark.parametrize("command", [("scale", MODEL, "10000"), ("register", MODEL, "--workers", "10000")])
def test_more_workers_than_cores_are_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    """Before any server is asked; the message says how to have them all the same."""
    refused = CliRunner().invoke(app, [*command])
    assert refused.exit_code == 1
    assert "--ceiling 10000 allows them" in refused.stderr
    missing = ["--key-file", str(tmp_path / "none.json")]
    allowed = CliRunner().invoke(app, [*missing, *command, "--ceiling", "10000"])
    assert "cannot read the tokens" in allowed.stderr


@pytest.mark.parametrize(
    ("pauses_s", "complaint"),
    [
        ({"GET": 60}, f"{MODEL} is not ready after 2 s: no answer from http://"),
        ({"POST": 60}, "no answer from http://"),
        ({"POST": 1.2}, rf"{MODEL}: [12] of 3 golden images answered within 2 s"),
    ],
)
def test_ready_ends_in_time(tmp_path: Path, pauses_s: dict[str, float], complaint: str) -> None:
    """Whether the server hangs, its worker does, or each answer takes long; a call by itself may take a minute."""
    images = ("a.png", "b.png", "c.png")
    (tmp_path / "golden.json").write_text(
        json.dumps({**GOLDEN, "probabilities": {name: [0.7, 0.2, 0.1] for name in images}})
    )
    for name in images:
        (tmp_path / name).write_bytes(b"image")
    release = threading.Event()

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.answer_late([{"minWorkers": 1, "workers": [{"status": "READY"}]}])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer_late({"cat": 0.7})

        def answer_late(self, document: object) -> None:
            if not release.wait(pauses_s.get(self.command, 0)):
                self.answer(document)

    path = key_file(tmp_path, inference={"key": "i"}, management={"key": "m"})
    with listening(Handler) as url:
        place = ["--url", url, "--management-url", url, "--key-file", str(path)]
        started = time.monotonic()
        late = CliRunner().invoke(app, [*place, "ready", MODEL, "--golden", str(tmp_path), "--timeout-s", "2"])
        assert time.monotonic() - started < 10
        release.set()
    assert late.exit_code == 1
    assert re.match(f"error: {complaint}", late.stderr)


def test_a_taken_probe_port_is_named() -> None:
    """Not a traceback, and how to choose another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        refused = CliRunner().invoke(app, ["ready", MODEL, "--http", str(other.getsockname()[1])])
    assert refused.exit_code == 1
    assert "try another --http PORT" in refused.stderr


def test_a_workerless_registration_is_refused() -> None:
    """TorchServe would accept it and answer 503 to every prediction."""
    with pytest.raises(ValueError, match="at least 1"):
        TorchServe().register(MODEL, workers=0)


def test_no_tokens_name_both_ways(tmp_path: Path) -> None:
    """Who has no key file learns of the variable."""
    with pytest.raises(NotAuthorized, match="or set TORCHSERVE_INFERENCE_TOKEN"):
        TorchServe(key_file=tmp_path / "none.json").predict(MODEL, b"")


DOCUMENT = (Path(__file__).parent.parent / "docs" / "client.md").read_text()
EXAMPLES = [
    *re.findall(r"^python -m client (.+)$", DOCUMENT, flags=re.MULTILINE),
    *((command.epilog or "").partition("python -m client ")[2] for command in app.registered_commands),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_understood(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the document and --help show gets as far as the missing server, key file or folder, in one line."""
    monkeypatch.chdir(tmp_path)
    environment = {"TORCHSERVE_URL": "http://127.0.0.1:9"}
    finished = CliRunner().invoke(app, example.split(), env=environment)
    assert finished.exit_code == 1, finished.stderr
    assert re.fullmatch(r"(error: .*\n)+", finished.stderr)


def test_an_example_that_is_wrong_would_be_found() -> None:
    """An option that does not exist has another exit status."""
    assert CliRunner().invoke(app, ["models", "--nonsense"]).exit_code == 2
