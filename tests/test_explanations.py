"""Explanations and descriptions: for the request that asks alone, and no other waits for them."""

from __future__ import annotations

import io
import json
import shutil
import socket
import struct
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from ts.context import RequestProcessor

from handler import explanation
from handler.image_classifier import ImageClassifier
from handler.settings import SettingsError
from server.launch import RunningServer
from tests.broken import replaced
from tests.conftest import MODEL
from tests.worker import ask, load, make_context

EXPLAIN = {"explain": "True"}


@pytest.fixture(scope="module")
def classifier(run: Path) -> ImageClassifier:
    return load(run)


def test_attributions_find_the_pixels_that_decide() -> None:
    """A model that looks at one corner alone is explained by that corner, with the sign of its influence."""

    def logits(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images[:, 0, :4, :4].sum((1, 2)), -images[:, 0, -4:, -4:].sum((1, 2))], dim=1)

    pixels = torch.full((1, 28, 28), 100, dtype=torch.uint8)
    for target, cell, sign in ((0, (0, 0), 1), (1, (-1, -1), -1)):
        explained = explanation.explain(logits, pixels, target, time_s=1)
        assert explained.grid.shape == (14, 14)
        assert explained.grid[cell] == sign
        assert explained.grid.abs().sum() == pytest.approx(4)
        assert abs(explained.convergence_delta) < 1e-2


def test_less_time_means_fewer_steps(classifier: ImageClassifier, run: Path) -> None:
    """The bound on time is kept by shortening the path, never below four steps."""
    pixels = classifier.decode([sorted((run / "golden").glob("*.png"))[0].read_bytes()])[0]
    assert explanation.explain(classifier.network, pixels, 0, time_s=1e-9).steps == 4
    assert explanation.explain(classifier.network, pixels, 0, time_s=60).steps == 32


def test_the_requests_of_a_batch_share_the_time(
    classifier: ImageClassifier, run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves 1/16 s a step: two seconds are 28 steps for one request, 12 for each of two, 4 for 32."""
    assert classifier.settings.explanation_time_s == 2
    ticks = count()
    monkeypatch.setattr(explanation, "time", SimpleNamespace(perf_counter=lambda: 0.25 * next(ticks)))
    for size, steps in ((1, 28), (2, 12), (32, 4)):
        answers, statuses = ask(classifier, run, [digit] * size, dict.fromkeys(range(size), EXPLAIN))
        assert statuses == [200] * size
        assert [answer["steps"] for answer in answers] == [steps] * size


def test_time_beyond_the_response_timeout_refuses_to_load(run: Path, tmp_path: Path) -> None:
    """A worker would be ended while it explains; a second below the timeout it loads."""
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    replaced(copied, "model-config.yaml", "responseTimeout: 120", "responseTimeout: 2")
    with pytest.raises(SettingsError, match="explanation_time_s 2 does not fit into the response timeout of 2 s"):
        load(copied)
    replaced(copied, "model-config.yaml", "responseTimeout: 2", "responseTimeout: 3")
    load(copied)


def test_a_black_image_has_nothing_to_explain(classifier: ImageClassifier) -> None:
    """The image that attributions start from gives a grid of zeros, not a division by zero."""
    explained = explanation.explain(classifier.network, torch.zeros(1, 32, 32, dtype=torch.uint8), 0, time_s=1)
    assert explained.grid.abs().max() == 0


def test_a_request_is_explained_alone(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """Every request of a batch that asks is explained, as JSON, wherever it stands; the explained class is its best."""
    [alone], _ = ask(classifier, run, [digit])
    for position in (0, 1):
        batch: list[Any] = [digit, digit]
        answers, statuses = ask(classifier, run, batch, {0: EXPLAIN, 1: EXPLAIN})
        assert statuses == [200, 200]
        explained = answers[position]
        assert explained["class"] == next(iter(alone))
        assert explained["probability"] == pytest.approx(alone[explained["class"]], abs=1e-6)
        assert explained["method"] == "integrated_gradients"
        assert len(explained["grid"]) == len(explained["grid"][0]) == 14
        assert max(abs(value) for row in explained["grid"] for value in row) == 1


def read_message(data: bytes) -> dict[str, tuple[int, dict[str, str], bytes]]:
    """A response of the worker's protocol: request id → status, headers, body."""
    stream = io.BytesIO(data)

    def number() -> int:
        return int(struct.unpack("!i", stream.read(4))[0])

    def text() -> bytes:
        return stream.read(number())

    assert number() == 200
    text()
    answers = {}
    while (length := number()) != -1:
        request_id = stream.read(length).decode()
        text()  # content type
        status = number()
        text()  # phrase
        headers = {text().decode(): text().decode() for _ in range(number())}
        answers[request_id] = (status, headers, text())
    return answers


def test_ordinary_requests_do_not_wait_for_an_explanation(
    classifier: ImageClassifier, run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other requests' answers leave before the explanation begins; the batch then ends with the explained one."""
    [good], _ = ask(classifier, run, [digit])
    [refused], _ = ask(classifier, run, [b"no image"])
    ours, theirs = socket.socketpair()
    context = make_context(run, 3)
    context.request_processor[0] = context.request_processor[2] = RequestProcessor({"Accept": "*/*"})
    context.request_processor[1] = RequestProcessor(dict(EXPLAIN))
    context.request_ids = {0: "first", 1: "asked", 2: "bad"}
    context.cl_socket = ours
    sent_before: list[bytes] = []
    real = explanation.explain

    def watched(*arguments: Any) -> explanation.Explanation:
        sent_before.append(theirs.recv(1 << 16))
        return real(*arguments)

    monkeypatch.setattr(explanation, "explain", watched)
    with ours, theirs:
        answers = classifier.handle([{"body": digit}, {"body": digit}, {"body": b"no image"}], context)
    sent = read_message(sent_before[0])
    assert json.loads(sent["first"][2]) == pytest.approx(good, abs=1e-6)
    assert "ts_stream_next" not in sent["first"][1]
    assert (sent["bad"][0], json.loads(sent["bad"][2])) == (415, refused)
    assert (sent["asked"][2], sent["asked"][1]["ts_stream_next"]) == (b"", "true")
    assert context.request_ids == {1: "asked"}
    assert len(answers) == 3, "TorchServe compares the number of answers with the number of requests"
    assert json.loads(answers[1])["class"] == next(iter(good))


def test_an_explanation_that_fails_is_that_requests_alone(
    classifier: ImageClassifier, run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while explaining is that request's 500, as JSON also where a picture was asked for."""

    def fail(*_: Any) -> None:
        raise MemoryError("too little")

    monkeypatch.setattr(explanation, "explain", fail)
    [answer], statuses = ask(classifier, run, [digit], {0: {**EXPLAIN, "Accept": "image/png"}})
    assert (answer["code"], answer["type"], statuses) == (500, "InternalError", [500])


def test_several_images_are_not_explained(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """The cost of one request is bounded: one image, or a 400 that says so; bad images are refused as ever."""
    answers, statuses = ask(
        classifier, run, [{"a": digit, "b": digit}, b"no image", digit], {0: EXPLAIN, 1: EXPLAIN, 2: {"explain": "no"}}
    )
    assert statuses == [400, 415, 200]
    assert "one image can be explained in a request, found 2" in answers[0]["message"]
    assert len(answers[2]) == 5


def test_a_description_is_one_request_like_any_other(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """`describe` first in a batch describes the model in that request and leaves the others as they are."""
    (description, answer), statuses = ask(classifier, run, [{}, digit], {0: {"describe": "True"}})
    assert statuses == [200, 200]
    assert description["class_names"] == list("0123456789")
    assert description["handler"]["resize_size"] == 32
    assert len(answer) == 5


def test_the_management_api_describes_the_model(torchserve: RunningServer) -> None:
    """`GET /models/NAME?customized=true` shows what the worker says of itself."""
    token = json.loads(torchserve.key_file.read_text())["management"]["key"]
    answer = requests.get(
        f"{torchserve.management_url}/models/{MODEL}",
        params={"customized": "true"}, headers={"Authorization": f"Bearer {token}"}, timeout=30,
    )  # fmt: skip
    assert answer.status_code == 200
    [described] = answer.json()
    assert described["customizedMetadata"]["class_names"] == list("0123456789")
