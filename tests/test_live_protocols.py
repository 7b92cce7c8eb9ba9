"""The same model by every protocol that TorchServe speaks: raw, KServe v1 and v2, at batch sizes above one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from client.torchserve import TorchServe
from server.launch import RunningServer
from tests.conftest import MODEL
from tests.images import GOOD, b64


def v2(data: bytes) -> dict[str, Any]:
    return {"id": "7", "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64(data)]}]}


def test_kserve_v1(torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes) -> None:
    """`/v1/models/NAME:predict` answers several instances in order, the bad one in its own place."""
    answer = session.post(
        f"{torchserve.inference_url}/v1/models/{MODEL}:predict",
        json={"instances": [{"b64": b64(digit)}, {"b64": b64(b"no image")}]},
        timeout=30,
    )
    assert answer.status_code == 200
    good, bad = answer.json()["predictions"]
    assert good == pytest.approx(client.predict(MODEL, digit), abs=1e-5)
    assert bad["code"] == 415


@pytest.mark.parametrize("key", ["data", "body"])
def test_kserve_v1_as_torchserves_own_handler_takes_it(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes, key: str
) -> None:
    """Instances with the keys of TorchServe's image_classifier."""
    url = f"{torchserve.inference_url}/v1/models/{MODEL}:predict"
    answer = session.post(url, json={"instances": [{key: b64(digit)}]}, timeout=30)
    assert answer.status_code == 200
    assert answer.json()["predictions"] == [pytest.approx(client.predict(MODEL, digit), abs=1e-5)]


def test_files_of_one_name_are_all_answered(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes
) -> None:
    """Three files under one name are a list of three, in their order; text and `top_k` beside them are no images."""
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    files = [("files", ("a.png", digit)), ("files", ("b.png", b"no image")), ("files", ("c.png", digit, "image/png"))]
    answer = session.post(url, files=files, data={"note": "hi", "top_k": "3"}, timeout=30)
    assert answer.status_code == 200
    first, second, third = answer.json()
    assert first == third
    assert first == pytest.approx(dict(list(client.predict(MODEL, digit).items())[:3]), abs=1e-5)
    assert second["code"] == 415


@pytest.mark.parametrize("path", ["/invocations?model_name={}&top_k=3", "/models/{}/invoke?top_k=3&note=hi"])
@pytest.mark.parametrize("kind", ["raw", "form"])
def test_what_is_no_file_is_no_image(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes, path: str, kind: str
) -> None:
    """A URL's parameters and a form's text beside one image: the answer is about that image alone."""
    body: dict[str, Any] = {"data": digit} if kind == "raw" else {"files": {"data": digit}, "data": {"note": "hi"}}
    answer = session.post(torchserve.inference_url + path.format(MODEL), timeout=30, **body)
    assert answer.status_code == 200
    assert answer.json() == pytest.approx(dict(list(client.predict(MODEL, digit).items())[:3]), abs=1e-5)


def test_open_inference_v2(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes
) -> None:
    """`/v2/models/NAME/infer` answers with labels and probabilities, and gives the request's id back."""
    answer = session.post(f"{torchserve.inference_url}/v2/models/{MODEL}/infer", json=v2(digit), timeout=30)
    assert answer.status_code == 200
    body = answer.json()
    label, probability = body["outputs"]
    assert body["id"] == "7"
    assert dict(zip(label["data"], probability["data"], strict=True)) == pytest.approx(
        client.predict(MODEL, digit), abs=1e-5
    )


def test_protocols_share_batches(torchserve: RunningServer, session: requests.Session, digit: bytes) -> None:
    """Raw, v1, v2 and malformed requests that arrive together are each answered in their own form."""
    base = torchserve.inference_url
    requests_of_each = [
        (f"{base}/predictions/{MODEL}", {"data": digit, "headers": {"Content-Type": "image/png"}}, 200),
        (f"{base}/v1/models/{MODEL}:predict", {"json": {"instances": [b64(digit)]}}, 200),
        (f"{base}/v2/models/{MODEL}/infer", {"json": v2(digit)}, 200),
        (f"{base}/v1/models/{MODEL}:predict", {"json": {"instances": [b64(b"no image")]}}, 415),
        (f"{base}/predictions/{MODEL}", {"data": digit, "headers": {"X-Top-K": "many"}}, 400),
    ] * 10

    def ask(request: tuple[str, dict[str, Any], int]) -> tuple[int, set[str]]:
        url, arguments, _ = request
        answer = session.post(url, timeout=30, **arguments)
        return answer.status_code, set(answer.json())

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, requests_of_each))
    assert [status for status, _ in answers] == [status for *_, status in requests_of_each]
    keys = [keys for _, keys in answers]
    assert all(len(keys) == 5 for keys in keys[0::5])
    assert all(keys == {"predictions"} for keys in keys[1::5])
    assert all(keys == {"id", "model_name", "model_version", "outputs"} for keys in keys[2::5])
    assert all(keys == {"code", "type", "message"} for keys in keys[3::5] + keys[4::5])


@pytest.mark.parametrize("content_type", ["application/octet-stream", "image/jpeg", "text/plain", "application/json"])
def test_an_image_under_any_content_type(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes, content_type: str
) -> None:
    """The bytes decide what an image is, not what the client calls it."""
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    answer = session.post(url, data=digit, headers={"Content-Type": content_type}, timeout=30)
    assert answer.status_code == 200
    assert answer.json() == pytest.approx(client.predict(MODEL, digit), abs=1e-5)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_an_image_by_any_method(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes, method: str
) -> None:
    """TorchServe predicts whatever the method; so the handler answers as it does a POST."""
    answer = session.request(method, f"{torchserve.inference_url}/predictions/{MODEL}", data=digit, timeout=30)
    assert answer.status_code == 200
    assert answer.json() == pytest.approx(client.predict(MODEL, digit), abs=1e-5)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_a_request_without_an_image_says_so(
    torchserve: RunningServer, session: requests.Session, digit: bytes, headers: dict[str, str]
) -> None:
    """No body; or one that is called a form, as by `curl --data-binary`, of which TorchServe passes on nothing."""
    body = digit if headers else b""
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    answer = session.request("POST" if headers else "GET", url, data=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidRequest")
    assert "holds no image" in answer.json()["message"]


@pytest.mark.parametrize("body", [b'{"instances": [', b"null", b'"text"', b"{}", b"[]", b"[1e999]", b"\xff"])
def test_broken_json_is_the_clients_mistake(torchserve: RunningServer, session: requests.Session, body: bytes) -> None:
    """What claims to be JSON and is no request that is known gets a 400 that says so."""
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    answer = session.post(url, data=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidRequest")


def test_top_k_and_model_headers(torchserve: RunningServer, session: requests.Session, digit: bytes) -> None:
    """A header asks for more or fewer classes; the answer's headers say which model gave it."""
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    answer = session.post(url, data=digit, headers={"X-Top-K": "3"}, timeout=30)
    assert len(answer.json()) == 3
    assert (answer.headers["x-model-name"], answer.headers["x-model-version"]) == (MODEL, "1.0")


def test_every_kind_of_image_shares_batches(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes
) -> None:
    """Grey, palette, alpha, 16 bits, CMYK, and every format, at the same time: all are answered."""
    expected = client.predict(MODEL, digit)
    url = f"{torchserve.inference_url}/predictions/{MODEL}"

    def ask(body: bytes) -> dict[str, float]:
        answer = session.post(url, data=body, timeout=30)
        assert answer.status_code == 200
        document: dict[str, float] = answer.json()
        return document

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [*GOOD, digit] * 4))
    assert all(len(answer) == 5 for answer in answers)
    for answer in answers[len(GOOD) :: len(GOOD) + 1]:
        assert answer == pytest.approx(expected, abs=1e-5)


def test_headers_of_one_request_do_not_reach_another(
    torchserve: RunningServer, session: requests.Session, digit: bytes
) -> None:
    """Descriptions, explanations, requests without a body and forms that are none, in the same batches."""
    base = torchserve.inference_url
    kinds: list[tuple[str, dict[str, Any], int, int]] = [
        ("predictions", {"data": digit, "headers": {"describe": "True"}}, 200, 6),
        ("predictions", {"data": digit}, 200, 5),
        ("explanations", {"data": digit}, 200, 6),
        ("predictions", {}, 400, 3),
    ]

    def ask(kind: tuple[str, dict[str, Any], int, int]) -> None:
        path, arguments, status, keys = kind
        answer = session.post(f"{base}/{path}/{MODEL}", timeout=60, **arguments)
        assert (answer.status_code, len(answer.json())) == (status, keys)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, kinds * 10))
    assert session.get(f"{base}/predictions/{MODEL}", timeout=30).status_code == 400
