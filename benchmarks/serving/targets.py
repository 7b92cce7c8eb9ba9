"""What the served classifier is to reach beside its peers and its limits, as ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.models import LENET, RESNET, RESNET_LARGE
from benchmarks.serving.peers import (
    IN_PROCESS,
    IN_PROCESS_INT8,
    NO_OP,
    OPENVINO_INT8,
    OURS,
    OURS_INT8,
    STOCK_BEST,
    STOCK_DEFAULTS,
)

Record = dict[str, Any]
Rounds = Mapping[str, Mapping[int, Record]]
"""Peer → number of the round → what was measured then."""

PYTORCH_PEERS = (STOCK_BEST, "fastapi", "litserve", "mosec", "bentoml", "ray", "mlserver", "pytriton")
_IMAGES_OF_MANY = 32


@dataclass(frozen=True)
class Target:
    """One line of what was wanted and what was reached."""

    text: str
    values: Sequence[float]
    """One of each round in which all that it needs was measured."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    @property
    def verdict(self) -> str:
        if not self.values:
            return "not measured"
        median = statistics.median(self.values)
        reached = median >= self.at_least if self.at_least is not None else median <= (self.at_most or 0)
        return "reached" if reached else "**missed**"


def requests_per_s(connections: int) -> Callable[[Record], float]:
    return lambda record: float(record["load"][str(connections)]["requests_per_s"])


def p50_ms(connections: int) -> Callable[[Record], float]:
    return lambda record: float(record["load"][str(connections)]["p50_ms"])


def p99_ms(connections: int) -> Callable[[Record], float]:
    return lambda record: float(record["load"][str(connections)]["p99_ms"])


def cold_start_s(record: Record) -> float:
    return float(record["cold_start_s"])


def targets(results: Mapping[str, Rounds]) -> list[Target]:
    """Every target, for results by model."""
    resnet, large, lenet = (results.get(model, {}) for model in (RESNET, RESNET_LARGE, LENET))
    return [
        *_against_peers(resnet),
        *_against_peers_at_12_megapixels(large),
        *_against_limits(resnet),
        *_small(lenet),
        *_waiting(resnet, lenet),
    ]


def _against_peers(rounds: Rounds) -> list[Target]:
    found = []
    for connections in (8, 32):
        at, rate, slowest = f"ResNet-18 at {connections}: ", requests_per_s(connections), p99_ms(connections)
        nearest, rates = _smallest({peer: _ratios(rounds, OURS, peer, rate) for peer in PYTORCH_PEERS})
        best, times = _smallest({peer: _ratios(rounds, peer, OURS, slowest) for peer in PYTORCH_PEERS})
        found += [
            Target(f"{at}ours / stock-defaults", _ratios(rounds, OURS, STOCK_DEFAULTS, rate), at_least=5),
            Target(f"{at}p99 of stock-defaults / ours", _ratios(rounds, STOCK_DEFAULTS, OURS, slowest), at_least=1),
            Target(f"{at}ours / {nearest}, the nearest PyTorch peer", rates, at_least=2.2),
            Target(f"{at}p99 of {best}, the best PyTorch peer's / ours", times, at_least=1),
            Target(f"{at}ours-int8 / stock-best", _ratios(rounds, OURS_INT8, STOCK_BEST, rate), at_least=4),
            Target(f"{at}ours-int8 / openvino-int8", _ratios(rounds, OURS_INT8, OPENVINO_INT8, rate), at_least=1),
        ]
    return found


def _against_peers_at_12_megapixels(rounds: Rounds) -> list[Target]:
    found = []
    for connections in (8, 32):
        rates = {peer: _ratios(rounds, OURS, peer, requests_per_s(connections)) for peer in PYTORCH_PEERS}
        nearest, ratios = _smallest(rates)
        text = f"12 megapixels at {connections}: ours / {nearest}, the nearest PyTorch peer"
        found.append(Target(text, ratios, at_least=3))
    return found


def _against_limits(rounds: Rounds) -> list[Target]:
    found = []
    for ours, limit in ((OURS, IN_PROCESS), (OURS_INT8, IN_PROCESS_INT8)):
        shares = _pairs(rounds, ours, limit, lambda a, b: requests_per_s(32)(a) / requests_per_s(8)(b))
        steady = _pairs(rounds, ours, ours, lambda a, b: requests_per_s(8)(a) / requests_per_s(32)(b))
        found += [
            Target(f"ResNet-18: {ours} at 32 / {limit}", shares, at_least=0.9),
            Target(f"ResNet-18: {ours} at 8 / at 32", steady, at_least=0.9),
        ]
    return found


def _small(rounds: Rounds) -> list[Target]:
    def many(record: Record, _: Record) -> float:
        return _IMAGES_OF_MANY * float(record["many_images"]["requests_per_s"]) / requests_per_s(8)(record)

    return [
        *(
            Target(f"LeNet-5 at {n}: ours / no-op", _ratios(rounds, OURS, NO_OP, requests_per_s(n)), at_least=0.9)
            for n in (8, 32)
        ),
        Target(
            f"LeNet-5 at 8: images/s, {_IMAGES_OF_MANY} images a request / one", _pairs(rounds, OURS, OURS, many),
            at_least=5,
        ),
    ]  # fmt: skip


def _waiting(resnet: Rounds, lenet: Rounds) -> list[Target]:
    found = []
    for model, rounds in (("ResNet-18", resnet), ("LeNet-5", lenet)):
        more_ms = _pairs(rounds, OURS, IN_PROCESS, lambda a, b: p50_ms(1)(a) - p50_ms(1)(b))
        starts = _ratios(rounds, OURS, IN_PROCESS, cold_start_s)
        found += [
            Target(f"{model} at 1: p50 of ours − in-process, ms", more_ms, at_most=3),
            Target(f"{model}: cold start of ours / a process that loads the file", starts, at_most=1.3),
        ]
    return found


def _pairs(rounds: Rounds, first: str, second: str, compute: Callable[[Record, Record], float]) -> list[float]:
    """`compute` for each round in which both were measured."""
    both = sorted(set(rounds.get(first, {})) & set(rounds.get(second, {})))
    return [compute(rounds[first][number], rounds[second][number]) for number in both]


def _ratios(rounds: Rounds, first: str, second: str, value: Callable[[Record], float]) -> list[float]:
    return _pairs(rounds, first, second, lambda a, b: value(a) / value(b))


def _smallest(ratios: Mapping[str, list[float]]) -> tuple[str, list[float]]:
    """The peer with the smallest median, and its values."""
    measured = {peer: values for peer, values in ratios.items() if values}
    if not measured:
        return "none", []
    return min(measured.items(), key=lambda item: statistics.median(item[1]))
