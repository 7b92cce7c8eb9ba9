"""HTTP as TorchServe alone takes it; what every engine answers is in `tests/contract`."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from client.torchserve import TorchServe
from server.launch import RunningServer
from tests.conftest import MODEL


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_an_image_by_any_method(
    torchserve: RunningServer, session: requests.Session, client: TorchServe, digit: bytes, method: str
) -> None:
    """TorchServe predicts whatever the method."""
    answer = session.request(method, f"{torchserve.inference_url}/predictions/{MODEL}", data=digit, timeout=30)
    assert answer.status_code == 200
    assert answer.json() == pytest.approx(client.predict(MODEL, digit), abs=1e-5)


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


def test_http_without_a_header_is_answered(torchserve: RunningServer) -> None:
    """The worker tells gRPC by its lack of headers; HTTP/1.0 may lack them too, and must not wait for ever."""
    token = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    port = int(torchserve.inference_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        request = f"GET /predictions/{MODEL} HTTP/1.0\r\nAuthorization: Bearer {token}\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.")
