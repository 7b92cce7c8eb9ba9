"""TorchServe keeps the contract."""

from __future__ import annotations

import pytest

from client.tokens import Tokens
from server.launch import RunningServer
from tests.contract.contract import Engine, WholeContract


class TestTorchServe(WholeContract):
    @pytest.fixture
    def engine(self, torchserve: RunningServer) -> Engine:
        token = Tokens(torchserve.key_file, {}).token("inference").value
        return Engine(torchserve.inference_url, token, metrics_url=torchserve.metrics_url)
