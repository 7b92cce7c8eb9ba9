"""Which figures are steady: where a peer's rounds differ by more than 10 %, something else ran on the machine."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.records import Record
from benchmarks.serving.targets import Rounds

MOST_SPREAD = 0.1


class Spread(NamedTuple):
    """Of a peer's requests/s over its rounds, at the number of connections where it is largest."""

    share: float
    """(Most - least) / median."""
    connections: str
    furthest: int
    """The round furthest from the median."""


def by_model(records: Sequence[Record]) -> dict[str, Rounds]:
    """Model → peer → round → the last record without an error."""
    results: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if not record["error"]:
            results[record["model"]][record["peer"]][record["round"]] = record
    return {model: dict(peers) for model, peers in results.items()}


def unsteady(rounds: Rounds) -> dict[str, Spread]:
    """The peers whose rounds differ by more than `MOST_SPREAD`, the worst first."""
    spreads = {peer: _spread(records) for peer, records in rounds.items()}
    found = {peer: spread for peer, spread in spreads.items() if spread.share > MOST_SPREAD}
    return dict(sorted(found.items(), key=lambda item: -item[1].share))


def _spread(records: Mapping[int, Record]) -> Spread:
    found = []
    for connections in next(iter(records.values()))["load"]:
        rates = {number: record["load"][connections]["requests_per_s"] for number, record in records.items()}
        median = statistics.median(rates.values())
        furthest = max(rates, key=lambda number: abs(rates[number] - median))
        found.append(Spread((max(rates.values()) - min(rates.values())) / median, connections, furthest))
    return max(found)
