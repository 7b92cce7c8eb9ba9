"""Doors of an edge for platforms: their port, their paths, no key and no token."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest
import requests

from client.errors import ClientError
from client.torchserve import TorchServe
from operate.edge.door import Platform, configuration
from server.launch import RunningServer
from tests.conftest import MODEL, free_ports
from tests.edges import behind, make_folder, plain_session, running

VERTEX = {"AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2", "AIP_PREDICT_ROUTE": "/v1/endpoints/1:predict"}


@pytest.mark.server
@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx: install your system's package nginx")
@pytest.mark.parametrize(
    ("platform", "variables", "health", "predict"),
    [
        ("sagemaker", {"SAGEMAKER_BIND_TO_PORT": "{port}"}, "/ping", "/invocations"),
        ("vertex", {"AIP_HTTP_PORT": "{port}", **VERTEX}, *VERTEX.values()),
    ],
)
def test_a_platform_is_answered(
    torchserve: RunningServer, client: TorchServe, digit: bytes, tmp_path: Path,
    platform: str, variables: dict[str, str], health: str, predict: str,
) -> None:  # fmt: skip
    """As its containers must: health, an image and JSON without a key, and nothing more than that."""
    port = free_ports()
    folder = make_folder(tmp_path / "edge", port, behind({"a": torchserve}))
    environment = {name: value.format(port=port + 2) for name, value in variables.items()}
    door, other = f"http://127.0.0.1:{port + 2}", f"http://127.0.0.1:{port}"
    instance = {"b64": base64.b64encode(digit).decode()}
    expected = client.predict(MODEL, digit)
    with running(folder, port, "--door", platform, environment=environment), plain_session(key=None) as session:
        assert session.get(door + health, timeout=30).status_code == 200
        image = session.post(door + predict, data=digit, headers={"Content-Type": "image/png"}, timeout=30)
        assert image.json() == pytest.approx(expected, abs=1e-5)
        answer = session.post(door + predict, json={"instances": [instance, instance]}, timeout=30)
        assert [list(each) for each in answer.json()["predictions"]] == [list(expected)] * 2
        # What the door does not have: other methods, and whatever else the edge passes, without a key.
        assert session.get(door + predict, timeout=30).status_code == 405
        assert session.post(f"{door}/predictions/{MODEL}", data=digit, timeout=30).status_code == 401
        assert session.get(f"{door}/models", timeout=30).status_code == 404
        # The edge's other ports do not have the door's paths.
        assert {requests.post(other + path, data=digit, timeout=30).status_code for path in (health, predict)} == {404}


@pytest.mark.parametrize(
    ("platform", "models", "environment", "complaint"),
    [
        (Platform.vertex, ["m"], {}, "AIP_HEALTH_ROUTE=: expected a path"),
        (Platform.vertex, ["m"], {**VERTEX, "AIP_PREDICT_ROUTE": '/a";'}, "AIP_PREDICT_ROUTE="),
        (Platform.vertex, ["m"], {**VERTEX, "AIP_HTTP_PORT": "80 ssl"}, "AIP_HTTP_PORT=80 ssl: expected a port"),
        (Platform.vertex, ["m"], {**VERTEX, "AIP_HEALTH_ROUTE": VERTEX["AIP_PREDICT_ROUTE"]}, "expected two paths"),
        (Platform.sagemaker, ["m", "n"], {}, "serves one model, and servers.yaml lists 2"),
    ],
)
def test_a_door_that_cannot_be_is_said(
    platform: Platform, models: list[str], environment: dict[str, str], complaint: str
) -> None:
    """Which variable, and what was expected; nothing of it reaches nginx."""
    with pytest.raises(ClientError, match=complaint):
        configuration(platform, models, environment)


def test_a_door_without_variables_is_sagemakers_default() -> None:
    """The control for the refusals: port 8080, /ping and /invocations."""
    said = configuration(Platform.sagemaker, ["m"], {})
    assert all(part in said for part in ("listen 8080;", '"/ping"', '"/invocations"', "/predictions/m break;"))
