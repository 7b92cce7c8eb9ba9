"""What is kept of requests for labelling: what was drawn and no more, privately and bounded, at no request's cost."""

from __future__ import annotations

import base64
import json
import logging
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from archive.errors import IncompleteRun
from archive.serving import read
from handler.image_classifier import ImageClassifier
from tests.worker import ask, load

Worker = Callable[..., ImageClassifier]


@pytest.fixture
def digit(run: Path) -> bytes:
    """One that no probe sends: golden images are not kept."""
    return sorted((run / "golden").glob("*.png"))[0].read_bytes() + b"more"


@pytest.fixture
def worker(run: Path, tmp_path: Path) -> Worker:
    """With what `serving.capture` says; it keeps in `kept` below the test's folder."""

    def loaded(**capture: object) -> ImageClassifier:
        model = Path(shutil.copytree(run, tmp_path / "model", dirs_exist_ok=True))
        config = yaml.safe_load((run / "model-config.yaml").read_text())
        config["handler"]["capture"] = {"folder": str(tmp_path / "kept"), "share": 1.0, **capture}
        (model / "model-config.yaml").write_text(yaml.safe_dump(config))
        return load(model)

    return loaded


def kept(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Images and answers, in the order of their names."""
    answers = sorted((folder / "kept").glob("*.json"))
    assert len([*(folder / "kept").iterdir()]) == 2 * len(answers)
    return [(file.with_suffix("").read_bytes(), json.loads(file.read_text())) for file in answers]


def test_images_are_kept_with_their_answers(worker: Worker, run: Path, tmp_path: Path, digit: bytes) -> None:
    """In every protocol, as they came, for their owner alone; a refused image is not, and no header is."""
    classifier = worker()
    golden = sorted((run / "golden").glob("*.png"))[3].read_bytes()
    other = golden + b"else"
    ask(classifier, run, [golden])
    v1 = {"instances": [{"b64": base64.b64encode(image).decode()} for image in (other, b"none", digit)]}
    headers = {"X-Request-ID": "camera-1", "Authorization": "Bearer secret", "Cookie": "secret"}
    answers, _ = ask(
        classifier, run, [digit, b"no image", {"a": digit, "b": b"", "c": other}, {"body": v1}], {0: headers}
    )
    classifier.capture.flush()
    found = kept(tmp_path)
    assert sorted(image for image, _ in found) == sorted([digit, digit, other, other, digit])
    [mine] = [answer for _, answer in found if answer["id"] == "camera-1"]
    assert mine["prediction"] == answers[0]
    assert (mine["why"], mine["model"], mine["version"]) == ("random", "lenet5-digits", "1.0")
    assert "secret" not in json.dumps(mine)
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "kept").iterdir()} == {0o600}


def test_by_default_nothing_is_kept(run: Path, digit: bytes) -> None:
    """Neither a file nor a reference to an image."""
    classifier = load(run)
    [request] = classifier.read([{"body": digit}], [{"Host": "x"}], [None])
    assert request.encoded == ()
    assert classifier.capture._waiting.empty()


def test_a_share_is_drawn_and_the_unsure_beside_it(
    worker: Worker, run: Path, tmp_path: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says why, so that only the fair sample is measured."""
    classifier = worker(share=0.25, unsure=True)
    draws = iter([0.2, 0.3, 0.24, 0.9])
    monkeypatch.setattr(random, "random", lambda: next(draws))
    requests = classifier.read([{"body": digit}] * 4, [{"Host": "x"}] * 4, [None] * 4)
    classifier.capture.batch(requests, [[{"7": 0.9}], [{"7": 0.9}], [{"7": 0.4}], [{"7": 0.4}]], [None] * 4)
    classifier.capture.flush()
    assert sorted(answer["why"] for _, answer in kept(tmp_path)) == ["random", "random", "unsure"]
    monkeypatch.setattr(random, "random", lambda: 0.9)
    classifier.capture.batch(requests[:2], [[{"7": 0.9}], [{"7": 0.4}]], [[False], [True]])
    classifier.capture.flush()
    assert sorted(answer["accepted"] for _, answer in kept(tmp_path) if answer["accepted"] is not None) == [False]


@pytest.mark.parametrize("broken", ["full", "gone", "forbidden", "slow"])
def test_no_request_fails_for_the_disk(
    worker: Worker, run: Path, tmp_path: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch, broken: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Full, vanished, not writable or slow: all are answered, nothing half is left, and one line says what is lost."""
    classifier = worker(max_mb=0.02 if broken == "full" else 100)
    assert not (tmp_path / "kept").exists()
    if broken == "gone":
        classifier.capture._start()
        shutil.rmtree(tmp_path / "kept")
    elif broken == "forbidden":

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("handler.capture.write_json", refuse)
    elif broken == "slow":
        monkeypatch.setattr("handler.capture._MOST_WAITING", 1)
        monkeypatch.setattr(classifier.capture._waiting, "maxsize", 1)
        monkeypatch.setattr(classifier.capture, "_write", lambda item: held.acquire())
        import threading

        held = threading.Semaphore(0)
    caplog.clear()
    for _ in range(3):
        assert ask(classifier, run, [digit] * 4)[1] == [200] * 4
    if broken == "slow":
        held.release(100)
    classifier.capture.flush()
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert "not kept for labelling" in lines[0].getMessage()
    if broken == "full":
        assert len(kept(tmp_path)) == 2
    elif broken == "forbidden":
        assert kept(tmp_path) == []


def test_a_recipe_that_cannot_keep_is_refused(own_run: Path) -> None:
    """By its key, before anything is archived."""
    recipe = yaml.safe_load((own_run / "recipe.yaml").read_text())
    for capture, said in (({"share": 0.1}, "set capture.folder"), ({"folder": "kept"}, "absolute path")):
        recipe["serving"]["capture"] = capture
        (own_run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(IncompleteRun, match=said):
            read(own_run)
