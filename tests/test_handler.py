"""The handler without Java: batches through a context that behaves as TorchServe's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ts.service import Service

from handler.budget import Budget
from handler.decoding import decode
from handler.golden import GoldenMismatch
from handler.image_classifier import ImageClassifier
from handler.request import Request
from handler.settings import HandlerSettings, SettingsError
from tests.conftest import MODEL
from tests.images import BAD, b64
from tests.worker import ask, load


@pytest.fixture(scope="module")
def classifier(run: Path) -> ImageClassifier:
    return load(run)


@pytest.mark.parametrize("size", range(1, 33))
def test_every_batch_size_answers_every_request(classifier: ImageClassifier, run: Path, size: int) -> None:
    """Whatever the size of the batch, each request gets the answer that it gets alone."""
    images = [path.read_bytes() for path in sorted((run / "golden").glob("*.png"))]
    batch = [images[i % len(images)] for i in range(size)]
    answers, statuses = ask(classifier, run, batch)
    assert statuses == [200] * size
    for i, answer in enumerate(answers):
        [alone], _ = ask(classifier, run, [batch[i]])
        assert list(answer) == list(alone)
        assert answer == pytest.approx(alone, abs=1e-6)


def test_answers_are_the_top_k_in_falling_order(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """The usual body of TorchServe's image_classifier: {label: probability}, the best first."""
    [answer], _ = ask(classifier, run, [digit])
    assert len(answer) == 5
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert set(answer) <= set("0123456789")


@pytest.mark.parametrize("position", [0, 3, 7])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone(
    classifier: ImageClassifier, run: Path, digit: bytes, name: str, position: int
) -> None:
    """Seven good requests beside a bad one are answered to the last digit as without it."""
    body, code = BAD[name]
    good, _ = ask(classifier, run, [digit] * 7)
    batch = [digit] * 7
    batch.insert(position, body)
    answers, statuses = ask(classifier, run, batch)
    refused = answers.pop(position)
    assert refused["code"] == code == statuses.pop(position)
    assert refused.keys() == {"code", "type", "message"}
    assert answers == good
    assert statuses == [200] * 7


def test_a_batch_of_bad_requests_only(classifier: ImageClassifier, run: Path) -> None:
    """No good request at all is no reason to fail."""
    answers, statuses = ask(classifier, run, [body for body, _ in BAD.values()])
    assert statuses == [code for _, code in BAD.values()] == [answer["code"] for answer in answers]


def test_several_files_in_one_request_are_a_list(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """A multipart request of several files is answered in order, with the error in its own place."""
    request = {"first": bytearray(digit), "second": bytearray(b"no image"), "third": bytearray(digit)}
    [[first, second, third]], statuses = ask(classifier, run, [request])
    assert statuses == [200]
    assert first == pytest.approx(third, abs=1e-6)
    assert second["code"] == 415


@pytest.mark.parametrize("request_fields", [{}, {"body": {"instances": []}}, {"body": "text"}])
def test_requests_without_an_image_are_the_clients_mistake(
    classifier: ImageClassifier, run: Path, digit: bytes, request_fields: dict[str, Any]
) -> None:
    """No body, JSON or text: a 4xx for that request, and the neighbour is answered."""
    (refused, answer), (status, neighbour) = ask(classifier, run, [request_fields, digit])
    assert refused["code"] == status
    assert 400 <= status < 500
    assert neighbour == 200
    assert len(answer) == 5


def test_each_request_may_ask_for_its_own_top_k(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """A header decides for its request alone; a value that is no count is that request's 400."""
    answers, statuses = ask(
        classifier,
        run,
        [digit] * 5,
        {0: {"X-Top-K": "2"}, 2: {"x-top-k": "99"}, 3: {"x-top-k": "-1"}, 4: {"x-top-k": "²"}},
    )
    assert statuses == [200, 200, 200, 400, 400]
    assert [len(answer) for answer in answers[:3]] == [2, 5, 10]
    assert "top_k: expected a whole number from 1, found '-1'" in answers[3]["message"]
    forms = [{"image": digit, "top_k": bytearray(b"2")}, {"image": digit, "top_k": "none"}]
    (two, refused), statuses = ask(classifier, run, forms)
    assert statuses == [200, 400]
    assert len(two) == 2
    assert "'none'" in refused["message"]


def parameter(name: str, value: bytes, content_type: str = "") -> dict[str, Any]:
    """A field as TorchServe's frontend sends it to a worker; text of a form and of a URL has no content type."""
    return {"name": name, "contentType": content_type, "value": bytearray(value)}


def retrieved(*parameters: dict[str, Any]) -> dict[str, Any]:
    """What the handler gets of a request with these fields."""
    request = {"requestId": b"1", "headers": [], "parameters": list(parameters)}
    _, [fields], _ = Service.retrieve_data_for_inference([request])
    assert isinstance(fields, dict)
    return fields


def test_files_of_one_name_all_arrive() -> None:
    """In their order, also where a client has taken the name that one of them is given."""
    names = ["image", "image 2", "image", "image", "image 2", "image 2 4"]
    files = [parameter(name, b"%d" % place, "image/png") for place, name in enumerate(names)]
    assert list(retrieved(*files).values()) == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_what_is_no_file_is_no_image(digit: bytes) -> None:
    """Text beside a file, parameters of a URL beside a raw body; without either, as over gRPC, all that was sent."""
    text, file = parameter("note", b"hi"), parameter("data", digit, "image/png")
    assert retrieved(file, text) == retrieved(text, file) == retrieved(file) == {"data": digit}
    for content_type in ("", "image/png"):
        raw = parameter("body", digit, content_type)
        assert retrieved(parameter("model_name", MODEL.encode()), raw) == {"body": digit}
    assert retrieved(parameter("first", digit), text) == {"first": digit, "note": b"hi"}
    assert retrieved(text) == {"note": b"hi"}


def test_the_field_top_k_is_heard_beside_files(digit: bytes) -> None:
    """It is no file; where it comes twice, the last counts."""
    file, *top_k = parameter("data", digit, "image/png"), parameter("top_k", b"2"), parameter("top_k", b"3")
    assert retrieved(*top_k, file) == {"data": digit, "top_k": b"3"}
    assert retrieved(parameter("data", digit), top_k[0]) == {"data": digit, "top_k": b"2"}


def test_too_many_images_in_a_request_are_that_requests_400(
    classifier: ImageClassifier, run: Path, digit: bytes
) -> None:
    """Whatever the protocol, nobody waits for thousands of images of one client."""
    form = {str(index): digit for index in range(65)}
    v1 = {"body": {"instances": [b64(digit)] * 65}}
    v2 = {"body": {"inputs": [{"datatype": "BYTES", "data": [b64(digit)] * 65}]}}
    answers, statuses = ask(classifier, run, [form, v1, v2, digit])
    assert statuses == [400, 400, 400, 200]
    assert all("65 images in one request are more than the 64 allowed" in answer["message"] for answer in answers[:3])


def test_an_answer_that_torchserve_cannot_send_is_that_requests_400(
    classifier: ImageClassifier, run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe would end the worker for a longer answer; the neighbour has its own."""
    monkeypatch.setattr("handler.request._MOST_BYTES", 300)
    answers, statuses = ask(classifier, run, [digit, {"a": digit, "b": digit, "c": digit}])
    assert statuses == [200, 400]
    assert "ask for fewer images or classes" in answers[1]["message"]


def test_kserve_v1_in_a_batch(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """Predictions in order, errors in their own places, whatever else is in the batch."""
    [alone], _ = ask(classifier, run, [digit])
    request = {"instances": [{"b64": b64(digit)}, {"b64": "?"}, b64(digit), {"b64": b64(b"no image")}, 7, {}]}
    (first, v1), statuses = ask(classifier, run, [digit, {"body": request}])
    assert statuses == [200, 200]
    assert first == pytest.approx(alone, abs=1e-6)
    predictions = v1["predictions"]
    assert predictions[0] == pytest.approx(alone, abs=1e-6)
    assert predictions[2] == pytest.approx(predictions[0], abs=1e-6)
    assert [predictions[i]["code"] for i in (1, 3, 4, 5)] == [400, 415, 400, 400]


@pytest.mark.parametrize("key", ["data", "body"])
def test_kserve_v1_as_torchserves_own_handler_takes_it(
    classifier: ImageClassifier, run: Path, digit: bytes, key: str
) -> None:
    """A client written for TorchServe's image_classifier is answered as one that says `b64`."""
    both = [{"body": {"instances": [{name: b64(digit)}]}} for name in ("b64", key)]
    (usual, other), statuses = ask(classifier, run, both)
    assert statuses == [200, 200]
    assert other["predictions"] == [pytest.approx(usual["predictions"][0], abs=1e-6)]


def test_open_inference_v2_takes_bytes_and_pixels(classifier: ImageClassifier, run: Path, digit: bytes) -> None:
    """Encoded images and decoded pixels give the same labels and probabilities as a raw request."""
    [alone], _ = ask(classifier, run, [digit])
    pixels = decode(digit, classifier.settings)
    as_bytes = {"id": "42", "inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": [b64(digit)] * 2}]}
    as_pixels = {
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 1, 32, 32], "data": pixels.flatten().tolist()}]
    }
    (from_bytes, from_pixels), statuses = ask(classifier, run, [{"body": as_bytes}, {"body": as_pixels}])
    assert statuses == [200, 200]
    assert from_bytes["id"] == "42"
    assert "id" not in from_pixels
    for response, count in ((from_bytes, 2), (from_pixels, 1)):
        assert (response["model_name"], response["model_version"]) == ("lenet5-digits", "1.0")
        label, probability = response["outputs"]
        assert label["shape"] == probability["shape"] == [count, 5]
        assert label["data"] == list(alone) * count
        assert probability["data"] == pytest.approx(list(alone.values()) * count, abs=1e-6)


@pytest.mark.parametrize(
    "document",
    [
        {"instances": []},
        {"instances": "abc"},
        {"instances": [{"b64": "?"}]},
        {"inputs": []},
        {"inputs": [1]},
        {"inputs": [{"datatype": "BYTES", "data": []}]},
        {"inputs": [{"datatype": "BYTES", "data": ["?"]}]},
        {"inputs": [{"datatype": "FP32", "shape": [1, 1, 32, 32], "data": [0.5] * 1024}]},
        {"inputs": [{"datatype": "UINT8", "shape": [1, 1, 28, 28], "data": [0] * 784}]},
        {"inputs": [{"datatype": "UINT8", "shape": [1, 1, 32, 32], "data": [0] * 7}]},
        {"inputs": [{"datatype": "UINT8", "shape": [1, 1, 32, 32], "data": [256] * 1024}]},
        {"inputs": [{"datatype": "UINT8", "shape": [1, 1, 32, 32], "data": [[0], [0, 1]]}]},
        {"inputs": [{"datatype": "UINT8", "shape": [None, 1, 32, 32], "data": [0] * 1024}]},
        {"inputs": [{"datatype": "UINT8", "shape": ["N", 1, 32, 32], "data": [0] * 1024}]},
        {"inputs": [{"datatype": "UINT8", "shape": [1, 1.0, 32.0, 32.0], "data": [0] * 1024}]},
        {"inputs": [{"datatype": "UINT8", "shape": [10**30, 1, 32, 32], "data": [0] * 1024}]},
        {"images": []},
        [1, 2],
        7,
    ],
    ids=str,
)
def test_json_of_another_shape_is_that_requests_400(
    classifier: ImageClassifier, run: Path, digit: bytes, document: Any
) -> None:
    """Every wrong shape of JSON is the client's mistake, said in words, and the neighbour is answered."""
    (refused, answer), statuses = ask(classifier, run, [{"body": document}, digit])
    assert statuses == [400, 200]
    assert refused["type"] == "InvalidRequest"
    assert len(answer) == 5


@pytest.mark.parametrize(
    "body", [{"image": b"", "top_k": b"9" * 5000}, {"body": "\ud800"}], ids=["digits", "surrogate"]
)
def test_what_python_itself_stumbles_over_is_that_requests_4xx(
    classifier: ImageClassifier, run: Path, digit: bytes, body: Any
) -> None:
    """A number with too many digits to convert, text that has no bytes: refused, and the neighbour is answered."""
    (refused, answer), statuses = ask(classifier, run, [body, digit])
    assert (refused["code"], statuses) == (statuses[0], [statuses[0], 200])
    assert 400 <= statuses[0] < 500
    assert len(answer) == 5


def test_a_mistake_of_ours_is_one_requests_500(
    classifier: ImageClassifier, run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reading a request may raise, the neighbours in the batch get their answers."""
    read = Request._read

    def stumble(fields: Any, *more: Any) -> Request:
        if fields["body"] == b"odd":
            raise ZeroDivisionError
        return read(fields, *more)

    monkeypatch.setattr(Request, "_read", stumble)
    (answer, failed), statuses = ask(classifier, run, [digit, b"odd"])
    assert (failed["type"], statuses) == ("InternalError", [200, 500])
    assert len(answer) == 5


def test_too_little_memory_for_a_request_is_its_500(
    classifier: ImageClassifier, run: Path, digit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that there is no memory for is not the client's mistake, and the neighbour is answered."""

    def run_out(data: bytes, settings: HandlerSettings, budget: Budget) -> torch.Tensor:
        if data == b"large":
            raise MemoryError
        return decode(data, settings, budget)

    monkeypatch.setattr("handler.request.decode", run_out)
    (answer, failed), statuses = ask(classifier, run, [digit, b"large"])
    assert (failed["type"], statuses) == ("InternalError", [200, 500])
    assert len(answer) == 5


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_golden_check_refuses_changed_weights(own_run: Path) -> None:
    """An archive whose model is not the measured one does not load."""
    model = torch.jit.load(str(own_run / "model.pt"))
    with torch.no_grad():
        next(iter(model.parameters())).mul_(0.5)
    model.save(str(own_run / "model.pt"))
    with pytest.raises(GoldenMismatch, match=r"\d+\.png, class '\d': .* instead of"):
        load(own_run)


def test_golden_check_refuses_swapped_labels(own_run: Path) -> None:
    """Nor does one whose labels were changed."""
    mapping = json.loads((own_run / "index_to_name.json").read_text())
    mapping["0"], mapping["1"] = mapping["1"], mapping["0"]
    (own_run / "index_to_name.json").write_text(json.dumps(mapping))
    with pytest.raises(GoldenMismatch, match="labels are"):
        load(own_run)


def test_golden_check_refuses_a_changed_resize(own_run: Path) -> None:
    """Nor one that prepares images differently."""
    edit(own_run / "model-config.yaml", "resize_size: 32", "resize_size: 40")
    with pytest.raises(GoldenMismatch, match="instead of"):
        load(own_run)


def test_golden_check_needs_golden_images(own_run: Path) -> None:
    """Taking the golden answers away does not take the check away."""
    shutil.rmtree(own_run / "golden")
    with pytest.raises(GoldenMismatch, match="cannot be read"):
        load(own_run)


@pytest.mark.parametrize(
    ("mapping", "complaint"),
    [
        (None, "missing or empty"),
        ({"0": "a", "2": "b"}, "must number its classes"),
        ({"0": "a", "1": "a"}, "names two classes alike: .*a.*: give each a name of its own"),
    ],
)
def test_labels_must_number_every_class_once(own_run: Path, mapping: dict[str, str] | None, complaint: str) -> None:
    """A mapping that cannot name every output refuses to load."""
    file = own_run / "index_to_name.json"
    file.unlink() if mapping is None else file.write_text(json.dumps(mapping))
    with pytest.raises(ValueError, match=complaint):
        load(own_run)


def test_too_few_labels_refuse_to_load(own_run: Path) -> None:
    """Labels and model outputs must be equally many."""
    mapping = json.loads((own_run / "index_to_name.json").read_text())
    del mapping["9"]
    (own_run / "index_to_name.json").write_text(json.dumps(mapping))
    with pytest.raises(GoldenMismatch):
        load(own_run)


def test_unknown_settings_refuse_to_load(own_run: Path) -> None:
    """A misspelt key is an error, not a default."""
    edit(own_run / "model-config.yaml", "top_k:", "topk:")
    with pytest.raises(SettingsError, match="topk"):
        load(own_run)
