"""The negative control: an engine that says of everything that it is a 7 fails every sentence of the contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.contract import Engine, WholeContract
from tests.listening import Quiet, listening


class Sevens(Quiet):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({"7": 0.9})

    def do_GET(self) -> None:
        if self.path != "/metrics":
            return self.answer({"7": 0.9})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"classifier_requests_total 7\n")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(Sevens) as url:
        yield url


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="its answers are wrong")
class TestSevens(WholeContract):
    @pytest.fixture
    def engine(self, url: str) -> Engine:
        return Engine(url, "token", metrics_url=url, counts_within_s=0)
