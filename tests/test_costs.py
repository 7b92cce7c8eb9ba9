"""The hook that holds tests to their marks fails those that cost more than they say, and no others."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import run_module

CONFTEST = """
from tests import costs
costs.SLOW_CPU_S = 0.4
"""
TESTS = """
import subprocess, sys, time
import pytest
from tests.costs import uncounted

def burn():
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass

def start(*command):
    subprocess.run([sys.executable, "-IS", "-c", "pass", *command], check=True)

@pytest.fixture(scope="module")
def started(): start()

@pytest.fixture(scope="module")
def burnt(): burn()

@pytest.fixture(scope="module")
def kept():
    with uncounted():
        start()
        burn()

def test_cheap(): pass
def test_bad_process(): start()
@pytest.mark.process
def test_process(): start()
@pytest.mark.process
def test_bad_server(): start("-m", "ts.model_server", "--start")
@pytest.mark.server
def test_server(): start("-m", "ts.model_server", "--start")
def test_bad_slow(): burn()
@pytest.mark.slow
def test_slow(): burn()
@pytest.mark.process
def test_bad_child_is_slow():
    burning = "import time\\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-IS", "-c", burning], check=True)
def test_bad_fixture_starts(started): pass
def test_bad_fixture_started_earlier(started): pass
def test_bad_fixture_burns(burnt): pass
def test_kept(kept): pass
@pytest.mark.xfail
def test_fails_anyway(): start(); assert False
"""


LONG = {"bad_slow", "bad_child_is_slow", "bad_fixture_burns"}


@pytest.mark.process
@pytest.mark.parametrize("selected", ["not slow", ""])
def test_a_test_is_held_to_its_marks(tmp_path: Path, selected: str) -> None:
    """Processes, servers and seconds without their mark fail, also by a shared fixture; marked or kept ones pass.

    Where the slow tests run too, those that take long without the mark pass and are named.
    """
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_inner.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers=\n process\n server\n slow\n")
    costs = tmp_path / "costs.jsonl"
    finished = run_module(
        "pytest", "-p", "tests.costs", "-rA", tmp_path, f"--rootdir={tmp_path}", "--costs", costs, "-m", selected,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    outcomes = re.findall(r"^(PASSED|FAILED|XFAIL) .*::test_(\w+)", finished.stdout, flags=re.MULTILINE)
    assert len(outcomes) == TESTS.count("def test_") - bool(selected), finished.stdout
    failing = lambda name: name.startswith("bad_") and (selected or name not in LONG)  # noqa: E731
    for outcome, name in outcomes:
        expected = "FAILED" if failing(name) else "XFAIL" if name == "fails_anyway" else "PASSED"
        assert outcome == expected, finished.stdout
    named = re.findall(r"^test_inner.py::test_(\w+) takes .* without the mark `slow`$", finished.stdout, re.MULTILINE)
    assert set(named) == LONG
    rows = {row["test"].partition("::test_")[2]: row for row in map(json.loads, costs.read_text().splitlines())}
    assert rows["cheap"]["started"] == []
    assert rows["bad_slow"]["cpu_s"] > 0.4
