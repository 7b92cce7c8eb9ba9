"""What was measured, a line of JSON for each measurement: added as it is had, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from system.cores import cores

Record = dict[str, Any]
_PACKAGES = {"torch": "torch", "torchserve": "ts"}  # a GPU's machine may lack the second


def append(results: Path, record: Record) -> None:
    """A line of its own, whatever a killed run left behind."""
    unfinished = results.is_file() and not results.read_text().endswith("\n")
    with results.open("a") as file:
        file.write(("\n" if unfinished else "") + json.dumps(record) + "\n")


def read(results: Path) -> list[Record]:
    """The records of a file, of which a line may be half-written; none where there is no file."""
    records = []
    for line in results.read_text().splitlines() if results.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def about() -> Record:
    """When and where a record is from, and how busy the machine was before."""
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "error": None,
    }


@cache
def machine() -> str:
    """Processor, memory and software, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name, module in _PACKAGES.items() if find_spec(module))
    software = f"Python {platform.python_version()}, {packages}"
    return f"{cores()} cores of {processor}, {memory:.0f} GiB, {software}"
