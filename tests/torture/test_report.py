"""What was measured gets into docs/reliability.md as it was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.torture import report
from tests.torture.report import Seen
from tests.torture.rows import ROWS, Row

pytestmark = pytest.mark.torture

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_x" time="1.5"><properties>
<property name="back s" value="[3.0, 1.0, 2.5]"/><property name="answers" value="{&quot;200&quot;: 1234}"/>
</properties></testcase>
<testcase classname="tests.test_a" name="test_y[one]" time="1"/>
<testcase classname="tests.test_a" name="test_y[two]" time="1"><failure message="no"/></testcase>
<testcase classname="tests.test_a" name="test_z" time="0"><skipped message="no nginx"/></testcase>
</testsuite></testsuites>"""
ROW = Row("a", "b", ("tests/test_a.py::test_x", "tests/test_a.py::test_y", "tests/test_a.py::test_z"))


@pytest.mark.parametrize("test", [test for row in ROWS for test in row.tests])
def test_every_test_of_a_row_is_there(test: str) -> None:
    """A renamed test would leave its row without a result."""
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE)


def test_a_row_says_what_was_seen(tmp_path: Path) -> None:
    """Median, range and n of several measurements; failures and reasons for skipping are not hidden."""
    (tmp_path / "results.xml").write_text(RESULTS)
    seen = report.read(tmp_path / "results.xml")
    assert seen["tests/test_a.py::test_y"].outcomes == ["passed", "failed"]
    assert report.line(ROW, seen, "today") == (
        "| a | b | back s 2.5 (1 to 3, n = 3); answers 200: 1,234; 2 of 4 tests passed in 4 s; failed; "
        "skipped: no nginx | today |\n"
    )
    assert report.line(ROW, {"tests/test_a.py::test_x": Seen()}, "today") is None
    skipped = Row("a", "b", ("tests/test_a.py::test_z",))
    assert report.line(skipped, seen, "today") is None, "nothing was seen"


def test_rows_that_were_not_run_stay(tmp_path: Path) -> None:
    """A part of the tests rewrites a part of the table; a document without its marks is an error."""
    document = f"before\n{report.BEGIN}\n{report.END}\nafter\n"
    first, second = ROWS[:2]
    once = report.updated(document, {first.what: f"| {first.what} | 1 |\n"})
    twice = report.updated(once, {second.what: f"| {second.what} | 2 |\n"})
    assert f"| {first.what} | 1 |\n| {second.what} | 2 |\n" in twice
    assert twice.startswith("before\n")
    assert twice.endswith("after\n")
    assert twice.count("\n| ") == 1 + len(ROWS), "a heading and each row once"
    with pytest.raises(ValueError, match="results: begin"):
        report.updated("nothing", {})
