"""The command `ready`: golden answers, one check however many look, and an end in time."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from typer.testing import CliRunner

from client import metrics
from client.torchserve import TorchServe, Workers
from operate import golden
from operate.__main__ import app
from operate.errors import NotAsMeasured
from operate.readiness import exposition
from operate.readiness.checks import INTERVAL_S, GoldenAnswers, ModelCheck, Readiness, Watch
from operate.readiness.probe import ProbeServer
from tests.conftest import MODEL, PATIENCE_S, wait_for
from tests.listening import Quiet, key_file, listening

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


def test_a_watch_asks_once_however_many_look() -> None:
    """Many threads within one interval cost one check; the next interval another."""
    checks = iter(range(10))
    watch = Watch(lambda: Readiness(True, str(next(checks))), interval_s=0.3)
    with ThreadPoolExecutor(16) as pool:
        seen = {readiness.reason for readiness in pool.map(lambda _: watch.look(), range(100))}
    assert seen == {"0"}
    wait_for(lambda: watch.look().reason != "0", "the next check", 10)
    assert next(checks) == 2


def test_a_watch_does_not_wait_for_a_check_that_hangs() -> None:
    """A hanging check is not ready after the limit, is not joined by a second one, and does not hold up who asks."""
    release, begun = threading.Event(), []

    def hang() -> Readiness:
        begun.append(time.monotonic())
        release.wait(2 * PATIENCE_S)
        return Readiness(True, "late")

    watch = Watch(hang, interval_s=0, limit_s=0.2)
    started = time.monotonic()
    looks = [watch.look() for _ in range(20)]
    assert time.monotonic() - started < PATIENCE_S
    assert not any(look.ready for look in looks)
    assert "no answer" in looks[0].reason
    assert len(begun) == 1
    release.set()
    wait_for(lambda: watch.look().ready, "the end of the check that hung", 10)


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
    check = CountedCheck(TorchServe("http://127.0.0.1:1", key_file=tmp_path / "none"), f"{MODEL}/2.0")
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


def test_golden_images_of_another_file_are_taken_once_they_are_answered(reference: Path) -> None:
    """As a promotion replaces them: until then those from before count, and an answer that is neither is wrong."""
    answers = {"cat": 0.7}

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.answer([{"minWorkers": 1, "workers": [{"status": "READY"}]}])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(answers)

    path = key_file(reference, inference={"key": "i"}, management={"key": "m"})
    with listening(Handler) as url:
        check = ModelCheck(TorchServe(url, url, path, retry_s=0), MODEL, golden.GoldenFile(reference))
        (reference / "golden.json").write_text(json.dumps({**GOLDEN, "probabilities": {"a.png": [0.1, 0.6, 0.3]}}))
        ready = [check().ready]
        answers = {"dog": 0.6}
        ready += [check().ready, check().ready]
        answers = {"cat": 0.7}
        readiness = check()
    assert ready == [True, True, True]
    assert (readiness.ready, readiness.reason.partition(":")[0]) == (False, "a.png, class 'cat'")
    assert check.golden is not None
    assert (check.golden.right, check.golden.wrong, check.golden.none) == (3, 1, 0)


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
    assert samples[0].labels["model_name"] == 'a "b"'


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
        assert time.monotonic() - started < PATIENCE_S
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
