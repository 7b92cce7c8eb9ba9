"""Load by wrk: a closed loop of keep-alive connections, the same for every server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.programs import output
from benchmarks.serving.bodies import BODIES

_SCRIPT = Path(__file__).with_name("rotate.lua")
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Load:
    """What a number of connections got in some seconds."""

    requests_per_s: float
    """Of good answers."""
    p50_ms: float
    p99_ms: float
    requests: int
    errors: int
    """Bad statuses, broken connections and timeouts."""


def find_wrk() -> str:
    """Raises:
    BenchmarkError: it is not installed.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise BenchmarkError("wrk is missing: install it (Debian and Ubuntu: apt-get install wrk)")
    return wrk


def generate(url: str, headers: Mapping[str, str], bodies: Path, connections: int, seconds: int) -> Load:
    """Post the `bodies` in turns from `connections` connections.

    Raises:
        BenchmarkError: wrk is missing, or failed.
    """
    command = [
        find_wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={_TIMEOUT_S}s", f"--script={_SCRIPT}",
        *(f"-H{name}: {value}" for name, value in headers.items()), url, "--", str(bodies), str(BODIES),
    ]  # fmt: skip
    return parse(output(command, timeout=seconds + 2 * _TIMEOUT_S))


def parse(printed: str) -> Load:
    """The last line that `rotate.lua` wrote."""
    counted: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return Load(
        requests_per_s=(counted["requests"] - counted["bad_status"]) / counted["seconds"],
        p50_ms=counted["p50_ms"],
        p99_ms=counted["p99_ms"],
        requests=counted["requests"],
        errors=counted["bad_status"] + counted["failed"],
    )
