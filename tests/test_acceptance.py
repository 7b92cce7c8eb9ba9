"""`serving.accept`: which answers are marked as accepted, by every protocol, and what is said where none can be."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from client import demo
from client.__main__ import app
from client.torchserve import TorchServe
from handler.acceptance import Acceptance, Scores
from handler.errors import UnsupportedImage
from handler.identity import Identity
from handler.image_classifier import ImageClassifier
from handler.request import Request
from handler.settings import AcceptSettings, HandlerSettings, SettingsError
from system.evaluation import Answer, Evaluation, show
from tests.commands import invoke
from tests.conftest import MODEL
from tests.images import b64
from tests.listening import Quiet, key_file, listening
from tests.worker import load, make_context

SCORES = Scores(probability=[0.9, 0.8, 0.7, 0.6, 0.5], right=[True, True, False, True, False])


@pytest.mark.parametrize(
    ("error_rate", "threshold"), [(0.01, 0.8), (0.24, 0.8), (0.25, 0.6), (0.34, 0.6), (0.4, 0.5), (0.9, 0.5)]
)
def test_the_threshold_accepts_the_most_answers_that_keep_the_error_rate(error_rate: float, threshold: float) -> None:
    """Of 5 answers the 2, 4 or all that are wrong at most so often; a rate that holds further down counts."""
    assert SCORES.choose(AcceptSettings(error_rate=error_rate)).probability == threshold


def test_what_no_threshold_keeps_is_said() -> None:
    """The surest answer is wrong, so 30 % are accepted by none; half are kept by the first two."""
    wrong_first = SCORES.model_copy(update={"right": [False, True, False, True, False]})
    with pytest.raises(SettingsError, match=r"error_rate 0\.3 cannot be reached: of 5 images"):
        wrong_first.choose(AcceptSettings(error_rate=0.3))
    assert wrong_first.choose(AcceptSettings(error_rate=0.5)).probability == 0.6
    with pytest.raises(SettingsError, match=r"accept\.known: this model does not tell"):
        SCORES.choose(AcceptSettings(known=0.95))


def test_known_images_are_accepted_to_the_share_that_is_wanted() -> None:
    """The threshold of nearness is the value that so many images reach, and both thresholds must be reached."""
    scores = Scores(probability=[0.5] * 100, right=[True] * 100, nearness=[index / 100 for index in range(100)])
    for known in (0.5, 0.95, 0.99):
        chosen = scores.choose(AcceptSettings(known=known))
        assert chosen.counts(scores) == (round(100 * known), round(100 - 100 * known))
    both = Acceptance(0.6, 0.5)
    assert [both.accepts(0.6, 0.5), both.accepts(0.59, 1), both.accepts(1, 0.49), both.accepts(math.nan, 1)] == [
        True, False, False, False,
    ]  # fmt: skip
    answered = torch.tensor([[0.7, 0.3, 0.5], [0.7, 0.3, 0.4], [0.5, 0.5, 0.9]])
    assert both.marks(answered, 2) == [True, False, False]
    assert Acceptance(0.6).marks(answered[:, :2], 2) == [True, True, False]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"probability": [0.5], "right": [True, False]}, "2 values of 1 images"),
        ({"probability": []}, "right: field required"),
        ({"probability": [0.5], "right": [True], "sure": 1}, "sure: extra inputs"),
    ],
)
def test_damaged_scores_are_refused(tmp_path: Path, document: dict[str, Any], complaint: str) -> None:
    """The message names the file and what is wrong in it; one that is not there says how to get it."""
    file = tmp_path / "acceptance.json"
    with pytest.raises(SettingsError, match="no images to validate"):
        Scores.read(file)
    file.write_text(json.dumps(document))
    with pytest.raises(SettingsError, match=f"acceptance.json: .*{complaint}"):
        Scores.read(file)


@pytest.mark.parametrize(
    "accept", [{"error_rate": 0}, {"error_rate": 1.5}, {"error_rates": 0.1}, {"known": "most"}, 0.02]
)
def test_the_key_is_read_strictly(accept: Any) -> None:
    """A wrong value or key names itself."""
    with pytest.raises(SettingsError, match=r"accept"):
        HandlerSettings.parse({"channels": 1, "resize_size": 8, "crop_size": 8, "accept": accept}, "here")


def test_nearness_needs_a_form_that_tells_it() -> None:
    """int8 and ONNX give probabilities alone."""
    section = {"channels": 1, "resize_size": 8, "crop_size": 8, "precision": "int8", "accept": {"known": 0.9}}
    with pytest.raises(SettingsError, match=r"accept\.known_by: precision int8 tells no nearness"):
        HandlerSettings.parse(section, "here")


def marking(own_run: Path, **accept: float) -> ImageClassifier:
    """A worker whose recipe has that section `serving.accept`."""
    file = own_run / "model-config.yaml"
    document = yaml.safe_load(file.read_text())
    document["handler"]["accept"] = accept
    file.write_text(yaml.safe_dump(document))
    return load(own_run)


def test_answers_stay_what_they_are_and_say_whether_they_are_accepted(own_run: Path) -> None:
    """The header, and in KServe's forms a field, follow the threshold; labels and probabilities are the same bytes."""
    images = [path.read_bytes() for path in sorted((own_run / "golden").glob("*.png"))]
    plain = load(own_run)
    scores = Scores.read(own_run / "acceptance.json")
    classifier = marking(own_run, error_rate=0.001)
    assert classifier.acceptance == scores.choose(AcceptSettings(error_rate=0.001))
    least = classifier.acceptance.probability
    v2 = {"inputs": [{"datatype": "BYTES", "shape": [2], "data": [b64(images[0]), b64(images[-1])]}]}
    bodies: list[dict[str, Any]] = [
        *({"body": image} for image in images),
        {"first": images[0], "second": b"no image", "third": images[-1]},
        {"body": {"instances": [{"b64": b64(images[0])}, {"b64": b64(b"no image")}]}},
        {"body": v2},
        {"body": b"no image"},
    ]
    contexts = [make_context(own_run, len(bodies)) for _ in range(2)]
    without, marked = (
        each.handle(bodies, context) for each, context in zip((plain, classifier), contexts, strict=True)
    )
    headers = [contexts[1].get_response_headers(index).get("x-accepted") for index in range(len(bodies))]
    assert all("x-accepted" not in contexts[0].get_response_headers(index) for index in range(len(bodies)))
    assert marked[: len(images) + 1] == without[: len(images) + 1]
    sure = [max(json.loads(answer).values()) >= least for answer in marked[: len(images)]]
    assert set(sure) == {True, False}
    assert headers[: len(images)] == [str(mark).lower() for mark in sure]
    first, last = (str(mark).lower() for mark in (sure[0], sure[-1]))
    assert headers[len(images) :] == [f"{first}, null, {last}", f"{first}, null", f"{first}, {last}", None]
    v1_answer, v2_answer = (json.loads(answer) for answer in marked[len(images) + 1 : -1])
    assert v1_answer.pop("accepted") == [sure[0], None]
    assert v1_answer == json.loads(without[len(images) + 1])
    assert v2_answer["outputs"].pop() == {
        "name": "accepted", "datatype": "BOOL", "shape": [2], "data": [sure[0], sure[-1]],
    }  # fmt: skip
    assert v2_answer == json.loads(without[len(images) + 2])


def test_a_worker_without_a_threshold_does_not_load(own_run: Path) -> None:
    """Neither where no threshold keeps the rate, nor where no images chose one."""
    file = own_run / "acceptance.json"
    file.write_text(json.dumps({"probability": [0.9, 0.8], "right": [False, True]}))
    with pytest.raises(SettingsError, match=r"error_rate 0\.02 cannot be reached"):
        marking(own_run, error_rate=0.02)
    file.unlink()
    with pytest.raises(SettingsError, match=r"there is no acceptance\.json"):
        marking(own_run, error_rate=0.02)


class Marking(Quiet):
    """Sure of the images that are called so by their bytes, and right about those alone."""

    def do_POST(self) -> None:
        sure = self.rfile.read(int(self.headers["Content-Length"])).startswith(b"sure")
        body = json.dumps({"cat": 0.9, "dog": 0.1} if sure else {"cat": 0.6, "dog": 0.4}).encode()
        self.send_response(200)
        self.send_header("x-accepted", str(sure).lower())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_client_shows_what_is_not_accepted(tmp_path: Path) -> None:
    """In a line, in JSON and as a column; `evaluate` measures the accepted answers, with their share."""
    for name, content in {
        "cat/1.png": b"sure",
        "cat/2.png": b"sure 2",
        "dog/3.png": b"no",
        "dog/4.png": b"no 2",
    }.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    photos, table, rows = tmp_path / "photos", tmp_path / "results.csv", tmp_path / "results.jsonl"
    tokens = key_file(tmp_path, inference={"key": "i"}, management={"key": "m"})
    with listening(Marking) as url:
        place = ["--url", url, "--management-url", url, "--key-file", tokens]
        shown = invoke(app, *place, "predict", MODEL, photos).stdout.splitlines()
        as_json = invoke(app, *place, "predict", MODEL, photos, "--json").stdout.splitlines()
        for output in (table, rows):
            assert invoke(app, *place, "predict", MODEL, photos, "--output", output).exit_code == 0
        measured = json.loads(invoke(app, *place, "evaluate", MODEL, photos, "--json").stdout)
        said = invoke(app, *place, "evaluate", MODEL, photos).stdout
    assert [line.endswith(", not accepted") for line in shown] == [False, False, True, True]
    assert [json.loads(line)["accepted"] for line in as_json] == [True, True, False, False]
    assert [json.loads(line)["accepted"] for line in rows.read_text().splitlines()] == [True, True, False, False]
    with table.open(newline="") as file:
        assert [row["accepted"] for row in csv.DictReader(file)] == ["true", "true", "false", "false"]
    assert (measured["acc1"], measured["accepted"]["coverage"], measured["accepted"]["error_rate"]) == (0.5, 0.5, 0)
    assert "50.0% (95% interval 15.0–85.0%) of the answers are accepted, 0.00% of those wrong" in said


def test_the_page_warns_of_what_is_not_accepted(tmp_path: Path) -> None:
    """Above the times and the version, also where the image is not explained."""
    tokens = key_file(tmp_path, inference={"key": "i"}, management={"key": "m"})
    with listening(Marking) as url:
        server = TorchServe(url, url, tokens, retry_s=0)
        told = {image: next(demo.ask(server, MODEL, image)) for image in (b"sure", b"no")}
    assert told[b"sure"][0] == {"cat": 0.9, "dog": 0.1}
    assert told[b"no"][0] == {"cat": 0.6, "dog": 0.4}
    assert demo.NOT_ACCEPTED not in told[b"sure"][2]
    assert told[b"no"][2].startswith(demo.NOT_ACCEPTED)


def test_without_marks_nothing_is_said_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of a server that marks none are as before."""
    show(Evaluation(["ant", "bee"], [Answer("1.png", 0, 1, 0.75)]), True, None)
    assert "accepted" not in json.loads(capsys.readouterr().out)


def test_refused_images_have_no_mark() -> None:
    """A request that is refused as a whole says nothing of acceptance."""
    request = Request([torch.zeros(1), UnsupportedImage("no image")], 1, "v1", UnsupportedImage("no image"))
    assert request.answer([], Identity("a", "1", "0"), [True]).accepted == ()
