"""What a request gets, whichever engine answers it: each test is a sentence of docs/requests.md, told by HTTP alone.

A subclass gives the fixture `engine`. `Contract` holds for everyone who asks, `WholeContract` for what an edge does not
let pass as well.
"""

from __future__ import annotations

import io
import json
import re
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from client import metrics
from handler import golden
from handler.decoding import decode
from handler.settings import HandlerSettings
from tests.conftest import MODEL, wait_for
from tests.images import BAD, GOOD, b64

Answer = dict[str, float]
PREDICT, V1, V2 = f"/predictions/{MODEL}", f"/v1/models/{MODEL}:predict", f"/v2/models/{MODEL}/infer"
EXPLAIN, V1_EXPLAIN, V2_EXPLAIN = f"/explanations/{MODEL}", f"/v1/models/{MODEL}:explain", f"/v2/models/{MODEL}/explain"
MOST_BYTES = 6_553_500
PIXELS = HandlerSettings(channels=1, resize_size=32, crop_size=32)
"""Of the model."""


@dataclass(frozen=True)
class Engine:
    """A server that answers for the model, and what it asks for."""

    url: str
    token: str
    refuses_tokens_by: int = 400
    refuses_forms_by: tuple[int, str] = (400, "InvalidRequest")
    """Status and type, of fields that are no multipart/form-data."""
    metrics_url: str = ""
    counts_within_s: float = 30.0

    def ask(self, method: str, path: str, headers: dict[str, str | None] | None = None, **options: Any) -> Any:
        with requests.Session() as session:
            session.trust_env = False
            headers = {"Authorization": f"Bearer {self.token}", **(headers or {})}
            return session.request(method, self.url + path, headers=headers, timeout=60, **options)

    def post(self, path: str, data: bytes | None = None, **options: Any) -> requests.Response:
        answer: requests.Response = self.ask("POST", path, data=data, **options)
        return answer

    def good(self, path: str, data: bytes | None = None, **options: Any) -> Any:
        """The document of an answer that is one."""
        answer = self.post(path, data, **options)
        assert (answer.status_code, answer.headers.get("content-type")) == (200, "application/json"), answer.text
        return answer.json()

    def refused(self, status: int, kind: str, path: str, data: bytes | None = None, **options: Any) -> str:
        """The message of a refusal, in TorchServe's form."""
        answer = self.post(path, data, **options)
        assert answer.headers.get("content-type") == "application/json"
        document = answer.json()
        assert (answer.status_code, document["code"], document["type"]) == (status, status, kind)
        return str(document["message"])


def v1(*images: bytes, key: str = "b64") -> dict[str, Any]:
    return {"instances": [{key: b64(image)} for image in images]}


def v2(*images: bytes) -> dict[str, Any]:
    data = [b64(image) for image in images]
    return {"id": "7", "inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}]}


def of_v2(document: Any) -> list[Answer]:
    """What the tensors of an answer say of each image."""
    label, probability = (np.array(output["data"]).reshape(output["shape"]) for output in document["outputs"][:2])
    return [dict(zip(*row, strict=True)) for row in zip(label, probability.astype(float), strict=True)]


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda call: call(), calls))


def about(answer: Answer) -> Any:
    return pytest.approx(answer, abs=1e-5)


class Contract:
    """What everybody gets who may ask."""

    @pytest.fixture
    def measured(self, run: Path) -> list[tuple[bytes, Answer]]:
        """The golden images, each with the five best of what training measured."""
        answers = golden.read(run / "golden")
        best = [
            dict(sorted(zip(answers.class_names, row, strict=True), key=lambda pair: -pair[1])[:5])
            for row in answers.probabilities.values()
        ]
        return list(zip(golden.images(run / "golden"), best, strict=True))

    @pytest.fixture
    def image(self, measured: list[tuple[bytes, Answer]]) -> bytes:
        return measured[0][0]

    @pytest.fixture
    def expected(self, measured: list[tuple[bytes, Answer]]) -> Answer:
        """The answer to `image`."""
        return measured[0][1]

    def test_an_image_is_answered_as_measured(self, engine: Engine, measured: list[tuple[bytes, Answer]]) -> None:
        """With the most probable classes, in falling order; to 1e-5 what training measured."""
        for image, expected in measured:
            answer = engine.good(PREDICT, image)
            assert answer == about(expected)
            assert list(answer.values()) == sorted(answer.values(), reverse=True)

    def test_every_answer_names_its_model(self, engine: Engine, image: bytes) -> None:
        """A good one, a refusal and an explanation: name, version, digits of a digest; and the client's trace."""
        trace = "0af7651916cd43dd8448eb211c80319c"
        headers: dict[str, str | None] = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        for path, body in ((PREDICT, image), (PREDICT, b"no image"), (EXPLAIN, image)):
            answer = engine.post(path, body, headers=headers)
            assert trace in answer.headers.get("traceresponse", "")
            assert (answer.headers.get("x-model-name"), answer.headers.get("x-model-version")) == (MODEL, "1.0")
            assert re.fullmatch("[0-9a-f]{12}", answer.headers.get("x-model-digest", ""))

    def test_every_kind_of_image_is_taken(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """Formats, grey, palette, alpha, 16 bits, CMYK; all at the same time, so that they share batches."""
        answers = at_once([lambda body=body: engine.good(PREDICT, body) for body in [*GOOD, image] * 2])
        assert all(len(answer) == 5 for answer in answers)
        assert [answer for answer in answers[len(GOOD) :: len(GOOD) + 1] if answer != about(expected)] == []

    @pytest.mark.parametrize("kind", ["application/octet-stream", "image/jpeg", "text/plain", "application/json", None])
    def test_the_bytes_decide_what_an_image_is(
        self, engine: Engine, image: bytes, expected: Answer, kind: str | None
    ) -> None:
        """Not its content type."""
        assert engine.good(PREDICT, image, headers={"Content-Type": kind}) == about(expected)

    @pytest.mark.parametrize("name", BAD)
    def test_a_bad_image_is_the_clients_mistake(self, engine: Engine, name: str) -> None:
        """400, 413 or 415, in TorchServe's form, of at most 500 characters."""
        body, status = BAD[name]
        kind = {400: "InvalidRequest", 413: "ImageTooLarge", 415: "UnsupportedImage"}[status]
        assert 0 < len(engine.refused(status, kind, PREDICT, body)) <= 500

    def test_a_large_body_is_not_read(self, engine: Engine) -> None:
        """One byte above the limit; at the limit it is looked at."""
        assert engine.post(PREDICT, bytes(MOST_BYTES + 1)).status_code == 413
        engine.refused(415, "UnsupportedImage", PREDICT, bytes(MOST_BYTES))

    @pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
    def test_a_request_without_an_image_says_so(self, engine: Engine, image: bytes, headers: dict[str, str]) -> None:
        """No body; or one that is called a form, as `curl --data-binary` does."""
        refusal = engine.refuses_forms_by if headers else (400, "InvalidRequest")
        message = engine.refused(*refusal, PREDICT, image if headers else b"", headers=headers)
        assert "holds no image" in message

    def test_top_k_asks_for_more_or_fewer(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """By the header, or a form's field; never more than there are classes, and not what is no number."""
        assert engine.good(PREDICT, image, headers={"X-Top-K": "3"}) == about(dict(list(expected.items())[:3]))
        assert len(engine.good(PREDICT, files={"image": image}, data={"top_k": "2"})) == 2
        assert len(engine.good(PREDICT, image, headers={"X-Top-K": "100"})) == 10
        assert "top_k" in engine.refused(400, "InvalidRequest", PREDICT, image, headers={"X-Top-K": "many"})

    def test_every_file_of_a_form_is_answered(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """In order, under one name or several, an error in its own place; text beside them is no image."""
        files = [("files", ("a.png", image)), ("files", ("b.png", b"no")), ("c", ("c.png", image, "image/png"))]
        first, second, third = engine.good(PREDICT, files=files, data={"note": "hi", "top_k": "5"})
        assert first == third == about(expected)
        assert (second.keys(), second["code"]) == ({"code", "type", "message"}, 415)
        assert engine.good(PREDICT, files={"any": image}, data={"note": "hi"}) == about(expected)

    @pytest.mark.parametrize(
        "body",
        [
            b"no form", b"--x\r\n",
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nno end',
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n\r\n' * 1100 + b"--x--\r\n",
        ],
        ids=["text", "a boundary", "cut off", "many files"],
    )  # fmt: skip
    def test_a_form_that_is_none_is_the_clients_mistake(self, engine: Engine, body: bytes) -> None:
        """Broken, or with more files than any request."""
        answer = engine.post(PREDICT, body, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert answer.status_code in (400, 415), answer.text

    def test_more_images_than_allowed(self, engine: Engine, image: bytes) -> None:
        """64 are answered, 65 refused."""
        assert len(engine.good(V1, json=v1(*[image] * 64))["predictions"]) == 64
        assert "65 images" in engine.refused(400, "InvalidRequest", V1, json=v1(*[image] * 65))

    @pytest.mark.parametrize("key", ["b64", "data", "body"])
    def test_kserve_v1(self, engine: Engine, image: bytes, expected: Answer, key: str) -> None:
        """Instances in order, a bad one in its own place; a bad one alone is refused."""
        first, second, third = engine.good(V1, json=v1(image, b"no image", image, key=key))["predictions"]
        assert first == third == about(expected)
        assert second["code"] == 415
        engine.refused(415, "UnsupportedImage", V1, json=v1(b"no image", key=key))

    def test_base64_of_every_kind(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """As a data URL, in lines, and in the alphabet of URLs without padding."""
        url = urlsafe_b64encode(image).decode().rstrip("=")
        lines = "\n".join(b64(image)[start : start + 76] for start in range(0, len(b64(image)), 76))
        instances = [{"b64": text} for text in (f"data:image/png;base64,{b64(image)}", lines, url)]
        assert engine.good(V1, json={"instances": instances})["predictions"] == [about(expected)] * 3

    def test_open_inference_v2(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """Labels and probabilities of each image as two tensors, and the request's id; one bad image refuses all."""
        document = engine.good(V2, json=v2(image, image))
        assert (document["id"], document["model_name"], document["model_version"]) == ("7", MODEL, "1.0")
        assert of_v2(document) == [about(expected)] * 2
        engine.refused(415, "UnsupportedImage", V2, json=v2(image, b"no image"))

    def test_pixels_by_open_inference_v2(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """A UINT8 tensor as a list of numbers, and behind the JSON as Triton's clients send it."""
        pixels = decode(image, PIXELS).numpy()
        described: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": [1, *pixels.shape]}
        listed = {"inputs": [{**described, "data": pixels.ravel().tolist()}]}
        assert of_v2(engine.good(V2, json=listed)) == [about(expected)]
        head = json.dumps({"inputs": [{**described, "parameters": {"binary_data_size": pixels.nbytes}}]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        assert of_v2(engine.good(V2, head + pixels.tobytes(), headers=headers)) == [about(expected)]

    @pytest.mark.parametrize("kind", [None, "application/JSON", "text/plain", "application/octet-stream"])
    def test_json_under_another_content_type(self, engine: Engine, image: bytes, kind: str | None) -> None:
        """It is read as JSON where it has `instances` or `inputs`."""
        headers = {"Content-Type": kind}
        best = list(engine.good(PREDICT, image))
        assert list(engine.good(PREDICT, json.dumps(v1(image)).encode(), headers=headers)["predictions"][0]) == best
        assert list(of_v2(engine.good(PREDICT, json.dumps(v2(image)).encode(), headers=headers))[0]) == best

    def test_json_sent_as_a_form_names_the_header(self, engine: Engine, image: bytes) -> None:
        """As `curl -d` does without a header."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = json.dumps(v1(image)).encode()
        message = engine.refused(*engine.refuses_forms_by, PREDICT, body, headers=headers)
        assert "Content-Type: application/json" in message

    @pytest.mark.parametrize("body", [b'{"instances": [', b"null", b'"text"', b"{}", b"[]", b"[1e999]", b"\xff"])
    def test_json_of_another_shape(self, engine: Engine, body: bytes) -> None:
        """What is called JSON and is no request that is known."""
        engine.refused(400, "InvalidRequest", PREDICT, body, headers={"Content-Type": "application/json"})

    def test_each_request_is_answered_alone(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """Good and bad ones in every form at the same time: each gets its own status, the good ones their answers."""
        calls: list[tuple[str, dict[str, Any], int]] = [
            (PREDICT, {"data": image}, 200),
            (V1, {"json": v1(image)}, 200),
            (V2, {"json": v2(image)}, 200),
            (PREDICT, {"data": image, "headers": {"X-Top-K": "many"}}, 400),
            (V1, {"json": v1(b"no image")}, 415),
            *((PREDICT, {"data": body}, status) for body, status in BAD.values()),
        ] * 6
        answers = at_once([lambda call=call: engine.post(call[0], **call[1]) for call in calls])
        assert [answer.status_code for answer in answers] == [status for *_, status in calls]
        every = len(calls) // 6
        assert [answer.json() for answer in answers[::every]] == [about(expected)] * 6
        assert [answer.json()["predictions"] for answer in answers[1::every]] == [[about(expected)]] * 6
        assert [of_v2(answer.json()) for answer in answers[2::every]] == [[about(expected)]] * 6

    def test_an_explanation(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """A grid of numbers as JSON, also as KServe asks for it; a picture for who accepts one; refusals as ever."""
        best = next(iter(expected))
        for path, options in ((EXPLAIN, {"data": image}), (V2_EXPLAIN, {"data": image})):
            explained = engine.good(path, **options)
            assert (explained["class"], len(explained["grid"])) == (best, 14)
        assert engine.good(V1_EXPLAIN, json=v1(image))["explanations"][0]["class"] == best
        picture = engine.post(EXPLAIN, image, headers={"Accept": "image/png"})
        assert picture.headers.get("content-type") == "image/png"
        assert Image.open(io.BytesIO(picture.content)).size == (320, 320)
        engine.refused(415, "UnsupportedImage", EXPLAIN, b"no image", headers={"Accept": "image/png"})
        assert "found 2" in engine.refused(400, "InvalidRequest", EXPLAIN, files={"a": image, "b": image})

    def test_predictions_share_batches_with_explanations(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """Every request gets its own kind of answer, in one piece."""
        paths = [PREDICT, EXPLAIN, PREDICT, PREDICT] * 6
        answers = at_once([lambda path=path: engine.good(path, image) for path in paths])
        for path, answer in zip(paths, answers, strict=True):
            assert len(answer["grid"]) == 14 if path == EXPLAIN else answer == about(expected)

    def test_another_model_or_version_is_not_found(self, engine: Engine, image: bytes, expected: Answer) -> None:
        """404; the version that is served is answered by its number as well."""
        engine.refused(404, "ModelNotFoundException", "/predictions/nobody", image)
        engine.refused(404, "ModelVersionNotFoundException", f"{PREDICT}/9.9", image)
        assert engine.good(f"{PREDICT}/1.0", image) == about(expected)

    def test_readiness(self, engine: Engine) -> None:
        """By Open Inference's paths."""
        assert engine.ask("GET", "/v2/health/ready").json() == {"ready": True}
        assert engine.ask("GET", "/v2/health/live").json() == {"live": True}
        assert {"name", "version"} <= engine.ask("GET", "/v2").json().keys()

    @pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic \u00e9"])
    def test_without_the_token_nothing_is_answered(
        self, engine: Engine, image: bytes, authorization: str | None
    ) -> None:
        """Neither predictions nor readiness."""
        given = authorization.encode("latin-1") if authorization else None
        headers: dict[str, Any] = {"Authorization": given}
        for answer in (
            engine.post(PREDICT, image, headers=headers),
            engine.ask("GET", "/v2/health/ready", headers=headers),
        ):
            assert answer.status_code == engine.refuses_tokens_by
            assert answer.json()["type"] in ("InvalidKeyException", "NotAuthorizedException")


class WholeContract(Contract):
    """And what an edge does not let pass."""

    @pytest.mark.parametrize("path", ["/invocations?top_k=3", f"/models/{MODEL}/invoke?top_k=3&note=hi"])
    @pytest.mark.parametrize("form", [False, True])
    def test_parameters_of_a_url_are_no_images(
        self, engine: Engine, image: bytes, expected: Answer, path: str, form: bool
    ) -> None:
        """Beside a raw body, and beside a form with text; of these `top_k` is heard."""
        body: dict[str, Any] = {"files": {"data": image}, "data": {"note": "hi"}} if form else {"data": image}
        assert engine.good(path, **body) == about(dict(list(expected.items())[:3]))

    def test_health(self, engine: Engine) -> None:
        """`/ping`, as load balancers ask."""
        assert engine.ask("GET", "/ping").json() == {"status": "Healthy"}

    def test_an_unknown_path(self, engine: Engine, image: bytes) -> None:
        """404."""
        engine.refused(404, "ResourceNotFoundException", "/nothing", image)

    def test_a_request_that_waited_too_long_is_refused_and_counted(self, engine: Engine, image: bytes) -> None:
        """504, by the edge's header; metrics count each refusal once, by its code, and requests and predictions."""

        def counted() -> Counter[str]:
            counts: Counter[str] = Counter()
            for sample in metrics.read(engine.metrics_url):
                counts[f"{sample.name} {sample.labels.get('Code', '')}".strip()] += int(sample.value)
            return counts

        late = "classifier_refusals_total 504"
        before = counted()
        for waited_s, status in ((60, 504), (60, 504), (60, 504), (0, 200)):
            headers = {"X-Request-Start": f"t={time.time() - waited_s:.3f}"}
            assert engine.post(PREDICT, image, headers=headers).status_code == status

        def all_are_counted() -> bool:
            after = counted() - before  # each replica tells its own at another time
            return (
                after[late] >= 3 and after["classifier_requests_total"] >= 4 and "classifier_predictions_total" in after
            )

        wait_for(all_are_counted, "the refusals are counted", engine.counts_within_s)
        after = counted() - before
        assert (after[late], after["classifier_requests_total"] >= 4) == (3, True)
        assert 1 <= after["classifier_predictions_total"] <= after["classifier_requests_total"] - 3


def check_marks(engine: Engine, model: str, images: Sequence[bytes]) -> list[bool]:
    """Whether each image is accepted, which every form of request says alike; a refused one is `null`."""
    path = f"/predictions/{model}"
    marks = [engine.post(path, image).headers["x-accepted"] == "true" for image in images]
    files = [("files", (str(number), image)) for number, image in enumerate([*images, b"no image"])]
    form = engine.post(path, files=files)
    shown = [str(mark).lower() for mark in marks]
    assert form.headers["x-accepted"] == ", ".join([*shown, "null"])
    answered = engine.post(f"/v1/models/{model}:predict", json=v1(*images))
    assert answered.headers["x-accepted"] == ", ".join(shown)
    assert (answered.json()["accepted"], answered.json()["predictions"]) == (marks, form.json()[:-1])
    tensor = engine.good(f"/v2/models/{model}/infer", json=v2(*images))["outputs"][2]
    assert (tensor["name"], tensor["datatype"], tensor["data"]) == ("accepted", "BOOL", marks)
    return marks
