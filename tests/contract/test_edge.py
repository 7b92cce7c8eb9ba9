"""A TorchServe behind the edge keeps the contract, and so do the edge's doors for platforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.launch import RunningServer
from tests.conftest import free_ports
from tests.contract.contract import PREDICT, V1, V2, Contract, Engine
from tests.edges import KEY, RunningEdge, behind, make_folder, running


@pytest.fixture(scope="module")
def edge(torchserve: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """With a door for SageMaker on its last port."""
    port = free_ports()
    folder = make_folder(tmp_path_factory.mktemp("contract") / "edge", port, behind({"a": torchserve}))
    environment = {"SAGEMAKER_BIND_TO_PORT": str(port + 2)}
    with running(folder, port, "--door", "sagemaker", environment=environment) as edge:
        yield edge


@pytest.fixture(scope="module")
def of_vertex(torchserve: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of another edge's door."""
    port = free_ports()
    folder = make_folder(tmp_path_factory.mktemp("vertex") / "edge", port, behind({"a": torchserve}))
    environment = {"AIP_HTTP_PORT": str(port + 2), "AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/invocations"}
    with running(folder, port, "--door", "vertex", environment=environment):
        yield f"http://127.0.0.1:{port + 2}"


class TestBehindTheEdge(Contract):
    @pytest.fixture
    def engine(self, edge: RunningEdge) -> Engine:
        return Engine(edge.url, KEY, 401, (415, "UnsupportedMediaTypeException"))


class Door(Engine):
    """Takes every kind of prediction on one path, without a key."""

    def ask(self, method: str, path: str, headers: dict[str, str | None] | None = None, **options: Any) -> Any:
        path = "/invocations" if path in (PREDICT, V1, V2) else path
        return super().ask(method, path, {**(headers or {}), "Authorization": None}, **options)


class TestBehindADoor(Contract):
    """All but what the platform has no path for: explanations, other models and versions, readiness."""

    test_every_answer_names_its_model = None
    test_an_explanation = None
    test_predictions_share_batches_with_explanations = None
    test_another_model_or_version_is_not_found = None
    test_readiness = None
    test_without_the_token_nothing_is_answered = None

    @pytest.fixture
    def engine(self, edge: RunningEdge) -> Engine:
        host, port = edge.url.rsplit(":", 1)
        return Door(f"{host}:{int(port) + 2}", "", 401, (415, "UnsupportedMediaTypeException"))


class TestBehindADoorForVertex(TestBehindADoor):
    @pytest.fixture
    def engine(self, of_vertex: str) -> Engine:
        return Door(of_vertex, "", 401, (415, "UnsupportedMediaTypeException"))
