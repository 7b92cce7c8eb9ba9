"""The stock archive beside the adopted one: what the table says."""

from __future__ import annotations

from benchmarks import stock
from benchmarks.records import Record
from tests.conftest import ROOT


def record(peer: str, number: int, rate: float, p99_ms: float) -> Record:
    load = {"requests_per_s": rate, "p50_ms": 1, "p99_ms": p99_ms, "requests": 9, "errors": 1}
    about = {"date": "2026-11-29", "machine": "a machine", "load_average": 1 + number, "error": None}
    return {"peer": peer, "round": number, **about, "load": {"1": load, "8": {**load, "errors": 0}}, "memory_mb": 7}


def test_ratios_are_taken_within_a_round() -> None:
    """A round that was slow for both changes none; what lacks its other side is left out."""
    sides = [record("stock-best", 0, 10, 90), record("adopted", 0, 30, 40)]
    slow = [record("stock-best", 1, 1, 900), record("adopted", 1, 4, 400), record("adopted", 2, 99, 1)]
    failed = {**record("stock-defaults", 0, 0, 0), "error": "no good answer"}
    text = stock.render([*sides, *slow, failed])
    assert "Without an answer in the time of a load: `stock-defaults` in 1 round." in text
    assert "| `stock-defaults` |" not in text
    assert "with a load average of up to 3.0" in text
    [line] = [line for line in text.splitlines() if line.startswith("| `adopted` |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[:2] == ["17.0 (4.00–30.0)", "3.50 (3.00–4.00)"]
    assert cells[4:] == ["220 (40.0–400)", "220 (40.0–400)", "2", "7.00 (7.00–7.00)", "2"]


def test_the_page_has_the_place() -> None:
    """docs/from-your-model.md can be written again."""
    assert "<!-- stock: begin -->" in (ROOT / "docs" / "from-your-model.md").read_text()
