"""A bounded load on one model of a server, and what became of every request.

    from operate.tuning.load import load

    result = load(TorchServe(), "lenet5-digits", [Path("digit.png").read_bytes()], concurrency=8, duration_s=10)
    print(result.requests_per_s, result.latency_ms(0.99), result.counts)

Two kinds of load, for two questions:

- Without `rate` the loop is closed: each connection sends its next request when the last is answered. How much can the
  server do with so many at a time? While it pauses nobody asks, so latencies look better than clients find them.
- With `rate` it is open: requests are due at even times whatever the server does, and latency counts from the time a
  request was due, not from when a connection was free to send it (Gil Tene's "coordinated omission"). How long do
  clients wait at so many requests a second?

Nothing is asked again: every request counts as what became of it. Only a token that was refused is replaced, once.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from client.errors import ClientError
from client.tokens import is_refused
from client.torchserve import TorchServe
from operate.errors import LoadRefused
from operate.quantiles import quantile
from operate.tuning.wire import MalformedAnswer, Wire
from system.addresses import is_here

MAX_CONCURRENCY, MAX_DURATION_S, MAX_RATE = 256, 600.0, 20_000.0
SUCCESS = "200"
_TOKEN_LOOK_INTERVAL_S = 1.0
# A closed loop must not spin on a server that is not there.
_PAUSE_AFTER_NO_ANSWER_S = 0.05
_WATCH_INTERVAL_S = 0.25


class Answer(NamedTuple):
    """What became of one request."""

    due_s: float
    """When it should have been sent, in seconds since the load began."""
    latency_ms: float
    """From then until the whole answer was there, or the request had failed."""
    outcome: str
    """The HTTP status; or `refused` (connection), `timeout`, `reset`, `unreachable`, `malformed`; or `unsent`, where no
    connection was free within the deadline."""


@dataclass(frozen=True)
class LoadResult:
    """Every request of a load, in no order."""

    answers: Sequence[Answer] = field(repr=False)
    seconds: float
    """From the beginning until the last answer."""

    @property
    def requests(self) -> int:
        return len(self.answers)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Requests by outcome, the most frequent first."""
        return dict(Counter(answer.outcome for answer in self.answers).most_common())

    @property
    def failed(self) -> int:
        return self.requests - self.counts.get(SUCCESS, 0)

    @property
    def requests_per_s(self) -> float:
        """Answered with 200, a second."""
        return self.counts.get(SUCCESS, 0) / self.seconds if self.answers else 0.0

    @cached_property
    def latencies_ms(self) -> list[float]:
        """Of the requests that were answered with 200, in rising order."""
        return sorted(answer.latency_ms for answer in self.answers if answer.outcome == SUCCESS)

    def latency_ms(self, share: float) -> float:
        """The smallest latency that this share of the good answers does not exceed; NaN where there are none."""
        latency_ms = quantile(self.latencies_ms, share)
        return math.nan if latency_ms is None else latency_ms


def load(
    server: TorchServe,
    model: str,
    images: Sequence[bytes],
    concurrency: int = 8,
    duration_s: float = 10.0,
    rate: float | None = None,
    deadline_s: float = 10.0,
    remote: bool = False,
    watch: Callable[[float, int], None] | None = None,
) -> LoadResult:
    """Send images to a model, one after the other and over again, for `duration_s`.

    Args:
        model: NAME or NAME/VERSION.
        images: encoded images, at least one.
        concurrency: connections, and so the most requests at a time.
        rate: requests a second in an open loop; None is a closed loop.
        deadline_s: most time for an answer from when its request was sent, and most that a request may be sent late.
        remote: consent to load a host that is not this one.
        watch: called several times a second with the seconds gone and the requests done.

    Returns:
        After `duration_s`, and at most twice `deadline_s` more for the last answers.

    Raises:
        LoadRefused: out of bounds, or a host that is not this one without consent.
        NotAuthorized: there is no token at the beginning.
    """
    _check_bounds(server.url, images, concurrency, duration_s, rate, deadline_s, remote)
    return _Load(server, model, images, duration_s, rate, deadline_s).run(concurrency, watch)


def _check_bounds(
    url: str, images: Sequence[bytes], concurrency: int, duration_s: float, rate: float | None, deadline_s: float,
    remote: bool,
) -> None:  # fmt: skip
    bounds = {
        "concurrency": (concurrency, MAX_CONCURRENCY),
        "duration": (duration_s, MAX_DURATION_S),
        "rate": (MAX_RATE if rate is None else rate, MAX_RATE),
        "deadline": (deadline_s, MAX_DURATION_S),
    }
    for name, (value, most) in bounds.items():
        if not 0 < value <= most:
            raise LoadRefused(f"{name}: expected more than 0 and at most {most:g}, found {value:g}")
    if not images:
        raise LoadRefused("a load needs at least one image")
    if not remote and not is_here(url):
        host = urlsplit(url).hostname or ""
        raise LoadRefused(f"{host} is not this machine: --yes-remote loads it, if its owner has agreed")


class _Load:
    """One load while it runs; each connection is a thread."""

    def __init__(
        self, server: TorchServe, model: str, images: Sequence[bytes], duration_s: float, rate: float | None,
        deadline_s: float,
    ) -> None:  # fmt: skip
        self._server, self._images, self._rate, self._deadline_s = server, images, rate, deadline_s
        self._numbers = itertools.count()
        self._token = server.token()
        parts = urlsplit(server.url)
        self._head = (
            f"POST {parts.path}/predictions/{quote(model)} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            "Accept: application/json\r\nContent-Type: application/octet-stream\r\n"
            f"X-Envoy-Expected-Rq-Timeout-Ms: {max(1, int(1e3 * deadline_s))}\r\n"
        )
        self._stop = threading.Event()
        self._start = self._looked_at_token = time.perf_counter()
        self._end = self._start + duration_s

    def run(self, concurrency: int, watch: Callable[[float, int], None] | None) -> LoadResult:
        server = self._server
        wires = [Wire(server.url, server.certificate_authority) for _ in range(concurrency)]
        rows: list[list[tuple[float, float, str]]] = [[] for _ in wires]
        threads = [threading.Thread(target=self._work, args=pair) for pair in zip(wires, rows, strict=True)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(_WATCH_INTERVAL_S)
                    if watch is not None:
                        watch(time.perf_counter() - self._start, sum(map(len, rows)))
        finally:
            self._stop.set()
            for thread, wire in zip(threads, wires, strict=True):
                while thread.is_alive():  # one that was about to connect has done so since
                    wire.close()
                    thread.join(_WATCH_INTERVAL_S)
                wire.close()
        answers = [Answer(*row) for part in rows for row in part]
        return LoadResult(answers, max((row.due_s + row.latency_ms / 1e3 for row in answers), default=0.0))

    def _work(self, wire: Wire, rows: list[tuple[float, float, str]]) -> None:
        while True:
            number = next(self._numbers)
            due = time.perf_counter() if self._rate is None else self._start + number / self._rate
            if due >= self._end or self._stop.wait(max(0.0, due - time.perf_counter())):
                return
            outcome = self._outcome(wire, self._images[number % len(self._images)], due)
            rows.append((due - self._start, (time.perf_counter() - due) * 1e3, outcome))
            if self._rate is None and not outcome.isdigit():
                self._stop.wait(_PAUSE_AFTER_NO_ANSWER_S)

    def _outcome(self, wire: Wire, image: bytes, due: float) -> str:
        now = time.perf_counter()
        # One that had no time left would only keep the next from being answered.
        if now >= due + self._deadline_s:
            return "unsent"
        deadline = now + self._deadline_s
        try:
            token = self._current_token()
            status, body = wire.ask(self._request(token, image), deadline)
            if is_refused(status, body) and self._replace_token(token):
                status, body = wire.ask(self._request(self._token, image), deadline)
        except TimeoutError:
            return "timeout"
        except ConnectionRefusedError:
            return "refused"
        except ConnectionError:
            return "reset"
        except OSError:
            return "unreachable"
        except MalformedAnswer:
            return "malformed"
        return str(status)

    def _request(self, token: str, image: bytes) -> bytes:
        return f"{self._head}Authorization: Bearer {token}\r\nContent-Length: {len(image)}\r\n\r\n".encode() + image

    def _current_token(self) -> str:
        """Looked at once a second and not at every request: a renewal comes earlier than that before the end."""
        now = time.perf_counter()
        if now - self._looked_at_token > _TOKEN_LOOK_INTERVAL_S:
            self._looked_at_token = now
            with suppress(ClientError):  # a server that is away for a moment has no key file either
                self._token = self._server.token()
        return self._token

    def _replace_token(self, refused: str) -> bool:
        """Whether there is another one now."""
        with suppress(ClientError):
            self._token = self._server.token(refused=refused)
        return self._token != refused
