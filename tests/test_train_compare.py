"""Finished runs side by side."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from playwright.sync_api import Browser

from tests.commands import invoke
from tests.conftest import MODEL
from tests.test_report import LAPTOP, PHONE, problems
from train.compare import app

HOSTILE_RUN = "<b>&a" + "-very-long-name" * 4
Change = Callable[[dict[str, Any]], object]


def changed(run: Path, target: Path, recipe: Change = dict, metrics: Change = dict, provenance: Change = dict) -> Path:
    """A copy of a run whose files say something else."""
    shutil.copytree(run, target)
    for name, change, read in (
        ("recipe.yaml", recipe, yaml.safe_load), ("metrics.json", metrics, json.loads),
        ("provenance.json", provenance, json.loads),
    ):  # fmt: skip
        document = read((target / name).read_text())
        change(document)
        (target / name).write_text(json.dumps(document))
    return target


def test_figures_and_what_differs(run: Path, tmp_path: Path) -> None:
    """The most accurate first, the keys that are not alike with their values, and nothing that is alike."""
    better = changed(
        run, tmp_path / "better",
        lambda recipe: recipe["training"].update(epochs=99), lambda metrics: metrics["test"].update(acc1=0.9999),
    )  # fmt: skip
    shown = invoke(app, run, better)
    assert shown.exit_code == 0
    first, second = (line.split()[:2] for line in shown.output.splitlines() if line.startswith((MODEL, "better ")))
    accuracy = json.loads((run / "metrics.json").read_text())["test"]["acc1"]
    assert (first, second) == (["better", "99.99%"], [MODEL, f"{accuracy:.2%}"])
    epochs = yaml.safe_load((run / "recipe.yaml").read_text())["training"]["epochs"]
    [line] = [line for line in shown.output.splitlines() if line.startswith("training.")]
    assert line.split() == ["training.epochs", str(epochs), "99"]
    assert "same images" not in shown.output
    document = json.loads(invoke(app, run, better, "--json").output)
    assert document["differences"] == {"training.epochs": [epochs, 99]}
    assert [entry["figures"]["acc1"] for entry in document["runs"]][1] == 0.9999


def test_keys_and_values_are_whole_however_many_runs(run: Path, tmp_path: Path) -> None:
    """In 80 columns a key stays in one line, and a long value is folded, not cut."""
    value = "/photographs/of/the/garden/in/summer"
    others = [
        changed(run, tmp_path / f"run-{index}", lambda recipe: recipe["data"].update(root=value)) for index in range(4)
    ]
    shown = invoke(app, run, *others).output
    assert "…" not in shown
    [line] = [line for line in shown.splitlines() if line.startswith("data.root ")]
    first = line.split()[2]
    assert value.startswith(first) and len(first) < len(value)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run, and of one that differs in all ways."""
    folder = tmp_path_factory.mktemp("compared")
    other = changed(
        run, folder / HOSTILE_RUN, lambda recipe: recipe["training"].update(epochs=99),
        lambda metrics: metrics["test"].update(acc1=0.9999), lambda provenance: provenance.update(data_sha256="0" * 64),
    )  # fmt: skip
    written = folder / "page.html"
    assert invoke(app, run, other, "--page", written).exit_code == 0
    return written


def test_other_images_are_told(run: Path, tmp_path: Path) -> None:
    """Accuracies on two sets of images cannot be compared."""
    other = changed(run, tmp_path / "other", provenance=lambda provenance: provenance.update(data_sha256="0" * 64))
    assert "not all were measured on the same images" in invoke(app, run, other).output


@pytest.mark.process
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_the_page_shows_it_on_every_screen(
    browser: Browser, page: Path, tmp_path: Path, size: tuple[int, int], scheme: Literal["light", "dark"]
) -> None:
    """On a laptop and a phone, light and dark: no error, no failed request, no overflow."""
    assert problems(browser, page, size, scheme, tmp_path / "page.png") == []


def test_the_page_has_the_figures_and_cannot_become_markup(page: Path) -> None:
    """Accuracy, interval, calibration, time and size of each, what differs, and a name that is escaped."""
    text = page.read_text()
    assert HOSTILE_RUN not in text
    assert "&lt;b&gt;&amp;a" in text
    assert "99.99%" in text
    assert len(re.findall(r"[\d.]+ ms<", text)) == len(re.findall(r"[\d.]+ MB<", text)) == 2
    assert "training.<wbr>epochs</td><td>99</td>" in text
    assert "Not all were measured on the same images" in text


def test_a_page_is_an_html_file(run: Path, tmp_path: Path) -> None:
    """Another name, or a folder that is not there, is one line before anything is measured."""
    for wrong in (tmp_path / "page.pdf", tmp_path / "none" / "page.html"):
        refused = invoke(app, run, "--page", wrong)
        assert refused.exit_code == 1
        assert f"--page {wrong}: name a file that ends in .html" in refused.stderr


@pytest.mark.parametrize("spoil", ["no folder", "no figure", "no labels"])
def test_what_is_no_finished_run_is_one_line(spoil: str, run: Path, tmp_path: Path) -> None:
    """The folder or the figure that is missing, and what to do."""
    place = tmp_path / "spoilt"
    if spoil == "no figure":
        changed(run, place, metrics=lambda metrics: metrics["test"].pop("balanced_acc1"))
    if spoil == "no labels":
        changed(run, place, metrics=lambda metrics: metrics.update(test=None))
    refused = invoke(app, run, place)
    assert refused.exit_code == 1
    expected = {
        "no folder": f"no run folder {place}",
        "no figure": "lacks balanced_acc1: train the run again",
        "no labels": "adopted without labelled images",
    }
    assert expected[spoil] in refused.stderr
