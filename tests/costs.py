"""What each test costs, held against its marks: a test that starts a process or takes long fails without its mark.

    pytest --costs costs.jsonl        one line of JSON for each test: its seconds and the processes that it started

Seconds of CPU decide, the test's own and those of the processes that it waited for, so that a busy machine changes
little. Where the slow tests run too, a test that lacks the mark `slow` is only named at the end: nobody waits for it
there, and other programs share the cores. A fixture's costs count for each test that takes it; those within `uncounted`
count for none.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import filterfalse
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SLOW_CPU_S, SLOW_S = 10.0, 60.0
"""A test over either is slow. A busy machine makes twice as much of a quiet one's 5 s of CPU; the second is for tests
that wait."""
STARTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.system"}
SERVER = re.compile(
    r"ts\.model_server|forkserver\.py serve|server start|serve\.sh|quickstart\.sh|nginx(?!.* -[tTvV]\b)"
    r"|operate .*\bedge\b"
)
"""Commands that leave or keep a server running."""
LOOKUP = re.compile(r"/ldconfig -p$")
"""What Python asks while a library is imported; whichever test comes first would pay for it."""
LACKS_A_MARK = "lacks a mark"
BEFORE = pytest.StashKey[tuple[float, float]]()


class Cost(NamedTuple):
    """Of a fixture that several tests share."""

    cpu_s: float
    started: list[str]


_started: list[list[str]] = [[]]
"""Commands of the processes started so far: by the test, and on top by the fixture that is being set up."""
_shared: dict[tuple[str, str], Cost] = {}
"""Where a fixture is defined and its name → what it cost."""
_uncounted = [0.0, 0.0]


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event in STARTS:
        command = arguments[1] if event == "subprocess.Popen" else event
        _started[-1].append(command if isinstance(command, str) else " ".join(map(os.fsdecode, command)))


def _seconds() -> tuple[float, float]:
    """Of CPU and of the clock, up to now."""
    return sum(os.times()[:4]) - _uncounted[0], time.monotonic() - _uncounted[1]


@contextmanager
def _apart() -> Iterator[list[str]]:
    """What happens within counts for no test; its processes go into the list."""
    before = _seconds()
    _started.append(started := [])
    try:
        yield started
    finally:
        _started.pop()
        for index, after in enumerate(_seconds()):
            _uncounted[index] += after - before[index]


@contextmanager
def uncounted() -> Iterator[None]:
    """For what is made once and kept: no test pays for it."""
    with _apart():
        yield


def hidden_start(marks: set[str], started: list[str]) -> str | None:
    """The process that a test started without a mark for it."""
    for command in filterfalse(LOOKUP.search, started):
        if SERVER.search(command) and "server" not in marks:
            return f"starts a server without the mark `server`: {command}"
        if not marks & {"process", "server"}:
            return f"starts a process without the mark `process`: {command}"
    return None


def hidden_seconds(marks: set[str], cpu_s: float, clock_s: float) -> str | None:
    """How long a test took without a mark for it."""
    if (cpu_s > SLOW_CPU_S or clock_s > SLOW_S) and "slow" not in marks:
        return f"takes {cpu_s:.1f} s of CPU and {clock_s:.1f} s without the mark `slow`"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", type=Path, metavar="FILE", help="append what each test costs to FILE, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(_listen)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    if fixturedef.scope == "function":
        return (yield)
    before, _ = _seconds()
    with _apart() as started:
        try:
            return (yield)
        finally:
            _shared[fixturedef.baseid, fixturedef.argname] = Cost(_seconds()[0] - before, started)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    _started[:] = [[]]
    item.stash[BEFORE] = _seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    cpu_s, clock_s = (after - before for before, after in zip(item.stash[BEFORE], _seconds(), strict=True))
    started = list(_started[0])
    for (where, name), cost in _shared.items():
        if name in getattr(item, "fixturenames", ()) and item.nodeid.startswith(where):
            cpu_s += cost.cpu_s
            started += cost.started
    if file := item.config.getoption("--costs"):
        row = {"test": item.nodeid, "cpu_s": round(cpu_s, 2), "s": round(clock_s, 2), "started": started}
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    marks = {mark.name for mark in item.iter_markers()}
    if complaint := hidden_start(marks, started):
        pytest.fail(f"{item.nodeid} {complaint}", pytrace=False)
    if complaint := hidden_seconds(marks, cpu_s, clock_s):
        if "not slow" in item.config.option.markexpr:
            pytest.fail(f"{item.nodeid} {complaint}", pytrace=False)
        item.user_properties.append((LACKS_A_MARK, complaint))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        if complaint := dict(report.user_properties).get(LACKS_A_MARK):
            terminalreporter.write_line(f"{report.nodeid} {complaint}")
