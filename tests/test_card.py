"""`MODEL_CARD.md`: the run's own figures, what its author adds, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from archive import card
from archive.members import is_known
from archive.run_folder import RunFolder
from tests.conftest import MODEL
from train import recipe
from train.errors import RecipeError


def written(run: Path, **author: str) -> str:
    document = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**document, "card": author}))
    card.write(RunFolder(run), MODEL)
    return (run / "MODEL_CARD.md").read_text()


def change(run: Path, **metrics: Any) -> None:
    document = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**document, **metrics}))


def test_the_card_has_the_runs_figures_and_says_what_is_not_stated(own_run: Path) -> None:
    """As training writes it: accuracy with its interval, the worst class, counts, provenance; it may be archived."""
    page = (own_run / "MODEL_CARD.md").read_text()
    metrics = json.loads((own_run / "metrics.json").read_text())
    measured = metrics["test"]
    assert f"| Accuracy | {measured['acc1']:.2%} (95% interval " in page
    worst = measured["worst_class"]
    assert f"| Worst class | {worst['name']}: {worst['acc1']:.1%}" in page
    counts = [metrics["data"]["classes"][split][3] for split in ("train", "val", "test")]
    assert f"| 3 | {counts[0]} | {counts[1]} | {counts[2]} |\n" in page
    assert json.loads((own_run / "provenance.json").read_text())["data_sha256"] in page
    assert page.count("Its author has not said") == 2
    assert "ask its author before you use it" in page
    assert yaml.safe_load(page.split("---")[1])["license"] == "unknown"
    assert page.startswith("---\n")
    assert "\n\n\n" not in page
    assert is_known("MODEL_CARD.md")


def test_what_the_author_adds_stands_in_its_place(own_run: Path) -> None:
    """As Markdown; the licence in what hubs read as well, whatever characters it has."""
    page = written(own_run, purpose="For **digits**.", data="Scanned.", limits="No letters.", licence='my: "own"')
    assert "## Purpose\n\nFor **digits**.\n" in page
    assert "## Data\n\nScanned.\n" in page
    assert "## Limits\n\nNo letters.\n\n- It knows 10 classes." in page
    assert yaml.safe_load(page.split("---")[1])["license"] == 'my: "own"'
    assert "not stated" not in page.lower()


def test_figures_that_are_not_there_are_not_made_up(own_run: Path) -> None:
    """A model that was measured on nothing, and one that was measured on little."""
    change(own_run, test=None, data={"train": 0, "val": 0, "test": 4, "folds": 0, "skipped": [], "classes": {}})
    page = written(own_run)
    assert page.count("accuracy is unknown") == 2
    assert "%" not in page
    assert "Trained on" not in page


def test_what_is_accepted_is_a_limit(own_run: Path) -> None:
    """Only a model with thresholds marks answers; of strangers the card says how many pass."""
    assert "or marked" not in written(own_run)
    interval = {"lower": 0.9, "upper": 0.95}
    selected = {"coverage": 0.98, "coverage_interval": interval, "error_rate": 0.1, "error_rate_interval": interval}
    strangers = {"images": 60, "accepted": {"count": 55, "share_interval": interval}}
    change(own_run, accept={"thresholds": {"probability": 0.6}, "test": selected}, unknown=strangers)
    page = written(own_run)
    assert "What is none of them is taken for one of them, or marked as not accepted.\n" in page
    assert "- Of 60 images of something else it accepts 55 (95% interval 90.0–95.0%).\n" in page
    assert (
        "- Of the held-out images, 98.0% (95% interval 90.0–95.0%) of the answers are accepted, 10.00% of those" in page
    )
    change(own_run, accept={"unattainable": "it cannot"}, unknown={**strangers, "accepted": None})
    assert "it accepts 60, as it marks none.\n" in written(own_run)


def test_names_are_no_markdown(own_run: Path) -> None:
    """A class of strange characters neither breaks a table nor becomes markup."""
    assert card.plain("a|b <i>*x*\n") == r"a\|b \<i\>\*x\*\\n"
    labels = json.loads((own_run / "index_to_name.json").read_text())
    (own_run / "index_to_name.json").write_text(json.dumps({**labels, "3": "<script>|"}))
    assert r"| \<script\>\| |" in written(own_run)


def test_the_section_is_checked() -> None:
    """A mistyped key is an error that names the one that was meant."""
    assert recipe.load(MODEL, ["card.licence=mit"]).card.licence == "mit"
    with pytest.raises(RecipeError, match=r"licence"):
        recipe.load(MODEL, ["card.license=mit"])
