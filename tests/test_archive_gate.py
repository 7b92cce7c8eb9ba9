"""What is worse than its recipe allows is not shipped, or tells that it was; and what it is made of is listed."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from archive import gate, sbom
from archive.build import build
from archive.errors import BelowFloor, IncompleteRun
from archive.verify import verify
from tests.conftest import MODEL, run_module
from train import recipe
from train.errors import RecipeError


def set_floors(run: Path, **floors: Any) -> None:
    document = yaml.safe_load((run / "recipe.yaml").read_text())
    document["floors"] = floors
    (run / "recipe.yaml").write_text(yaml.safe_dump(document))


def verdicts(run: Path, size_mb: float = 1.0, p99_ms: float = 1.0) -> dict[str, bool]:
    return {check.name: check.passed for check in gate.judge(run, size_mb, p99_ms)}


def test_recipe_and_gate_know_the_same_floors() -> None:
    """The schema that training checks and the list that the gate compares with."""
    assert set(recipe.FloorsSection.model_fields) == {*gate.SMALLEST, *gate.LARGEST}


def test_floors_travel_with_the_run(run: Path) -> None:
    """What the recipe sets arrives in the run folder, and what it leaves out is not set."""
    assert gate.read_floors(run) == {"acc1": 0.97, "worst_class": 0.85, "ece": 0.05, "size_mb": 5.0}
    for name in recipe.names():
        expected = set() if name == "finetune" else {"acc1", "size_mb"}
        assert expected <= set(recipe.load(name).floors.model_dump(exclude_none=True))


def test_each_floor_is_compared_in_its_own_direction(own_run: Path) -> None:
    """At the bound passes; just beyond it does not; a floor that is not set lets everything pass."""
    measured = json.loads((own_run / "metrics.json").read_text())["test"]
    exact = {"acc1": measured["acc1"], "worst_class": measured["worst_class"]["acc1"], "ece": measured["ece"]}
    set_floors(own_run, **exact, size_mb=1.0, p99_ms=1.0)
    assert all(verdicts(own_run).values())
    for name, worse in {"acc1": 1e-6, "worst_class": 1e-6, "ece": -1e-6, "size_mb": -1e-6, "p99_ms": -1e-6}.items():
        set_floors(own_run, **{name: {**exact, "size_mb": 1.0, "p99_ms": 1.0}[name] + worse})
        assert verdicts(own_run) == {other: other != name for other in verdicts(own_run)}
    set_floors(own_run)
    assert all(verdicts(own_run, 1e9, 1e9).values())


def test_what_cannot_be_compared_does_not_pass(own_run: Path) -> None:
    """NaN is worse than any floor; a floor of another name or type is an error that names it."""
    set_floors(own_run, ece=0.05)
    document = json.loads((own_run / "metrics.json").read_text())
    document["test"]["ece"] = float("nan")
    (own_run / "metrics.json").write_text(json.dumps(document))
    assert not verdicts(own_run)["ece"]
    for floors, complaint in (({"acc5": 0.9}, r"floors\.acc5 is none of"), ({"acc1": "high"}, "must be a number")):
        set_floors(own_run, **floors)
        with pytest.raises(IncompleteRun, match=complaint):
            gate.judge(own_run, 1, 1)
    del document["test"]["worst_class"]
    (own_run / "metrics.json").write_text(json.dumps(document))
    set_floors(own_run)
    with pytest.raises(IncompleteRun, match=r"metrics\.json lacks .*worst_class"):
        gate.judge(own_run, 1, 1)


def write_int8(run: Path, form: str = "model.int8.pt", kept: bool = True, **measured: float) -> None:
    """An int8 file, and what was measured of it: at last these figures, and before them others that were refused."""
    shutil.copy2(run / "model.pt", run / form)
    refused, last = {"acc1": 0.1, "worst_class": 0.0, "ece": 0.9}, {"acc1": 0.99, "worst_class": 0.9, "ece": 0.01}
    told = {"kept": kept, "attempts": [refused, {**last, **measured}]}
    (run / "quantisation.json").write_text(json.dumps({"forms": {form: told}}))


@pytest.mark.parametrize("form", ["model.int8.pt", "model.int8.onnx"])
@pytest.mark.parametrize(("name", "measured"), [("acc1", 0.98), ("worst_class", 0.5), ("ece", 0.04)])
def test_int8_is_held_to_the_floors_of_today(own_run: Path, form: str, name: str, measured: float) -> None:
    """A form that met the floors of its day and not those of the recipe as it is now fails by its name."""
    write_int8(own_run, form, **{name: measured})
    set_floors(own_run, acc1=0.5, worst_class=0.4, ece=0.5)
    assert all(check.passed for check in gate.judge(own_run, 1, 1))
    set_floors(own_run, acc1=0.985, worst_class=0.6, ece=0.03)
    checks = gate.judge(own_run, 1, 1)
    assert [check.label for check in checks if check.form and not check.passed] == [f"{form}: {name}"]


def test_int8_below_a_floor_is_not_shipped(own_run: Path, tmp_path: Path) -> None:
    """The refusal names the form; forced, the archive tells of it."""
    write_int8(own_run, worst_class=0.1)
    with pytest.raises(BelowFloor, match=r"allows: model\.int8\.pt: worst_class 10\.00%, floor 85\.00%\."):
        build(own_run, MODEL, "1.0", tmp_path)
    assert not list(tmp_path.glob("*.mar"))
    built = build(own_run, MODEL, "1.0", tmp_path, force=True)
    with zipfile.ZipFile(built.path) as archive:
        floors = json.loads(archive.read("gate.json"))["floors"]
    assert {"name": "model.int8.pt: worst_class", "bound": 0.85, "passed": False} in floors


def test_int8_that_nobody_measured_is_refused(own_run: Path) -> None:
    """Without a report, with one of another form, or with one that says that it was not kept."""
    complaint = r"quantisation\.json does not tell how accurate model\.int8\.pt is .*or remove model\.int8\.pt"
    write_int8(own_run, kept=False)
    with pytest.raises(IncompleteRun, match=complaint):
        gate.judge(own_run, 1, 1)
    (own_run / "quantisation.json").write_text('{"forms": {"model.int8.onnx": {}}}')
    with pytest.raises(IncompleteRun, match=complaint):
        gate.judge(own_run, 1, 1)
    (own_run / "quantisation.json").unlink()
    with pytest.raises(IncompleteRun, match=complaint):
        gate.judge(own_run, 1, 1)


def test_a_floor_that_makes_no_sense_is_refused_in_the_recipe() -> None:
    """Before anything is trained."""
    with pytest.raises(RecipeError, match=r"floors\.acc1: .*less than or equal to 1, found 97"):
        recipe.load(MODEL, ["floors.acc1=97"])


def test_below_a_floor_nothing_is_shipped_and_force_is_remembered(own_run: Path, tmp_path: Path) -> None:
    """The refusal names floor and figure; forced, the archive says so for good."""
    store = tmp_path / "store"
    store.mkdir()
    set_floors(own_run, acc1=0.97, ece=1e-9, p99_ms=1e-9)
    with pytest.raises(BelowFloor, match=r"ece 0\.0\d+, floor 0\.0000; p99_ms .* ms, floor 0\.0 ms\. .*--force"):
        build(own_run, MODEL, "1.0", store)
    assert not list(store.iterdir())

    built = build(own_run, MODEL, "1.0", store, force=True)
    assert verify(built.path).forced
    with zipfile.ZipFile(built.path) as archive:
        recorded = json.loads(archive.read("gate.json"))
    assert recorded == {
        "forced": True,
        "floors": [
            {"name": "acc1", "bound": 0.97, "passed": True},
            {"name": "ece", "bound": 1e-9, "passed": False},
            {"name": "p99_ms", "bound": 1e-9, "passed": False},
        ],
    }
    assert "forced past its gate" in run_module("archive", "verify", built.path).stdout


def test_what_passes_is_not_marked_as_forced(model_store: Path) -> None:
    """The control: an archive that met its floors."""
    assert not verify(model_store / f"{MODEL}.mar").forced


def test_the_command_shows_floor_and_figure(own_run: Path, tmp_path: Path) -> None:
    """The table is printed whether the archive ships or not."""
    set_floors(own_run, acc1=0.5, worst_class=1)
    refused = run_module("archive", "build", own_run, "--model-store", tmp_path)
    assert refused.returncode == 1
    assert "≥ 50.00%" in refused.stdout
    assert "pass" in refused.stdout
    assert "FAIL" in refused.stdout
    assert refused.stderr.startswith(f"error: {own_run} is worse than its recipe allows: worst_class")
    assert len(refused.stderr.splitlines()) == 1


def test_the_bill_of_materials_is_valid_and_names_what_a_worker_imports(model_store: Path, tmp_path: Path) -> None:
    """By CycloneDX's own schema; packages that the handler imports and those that these need are in it."""
    with zipfile.ZipFile(model_store / f"{MODEL}.mar") as archive:
        archive.extractall(tmp_path)
    text = (tmp_path / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    listed = {component["name"] for component in document["components"]}
    assert {"torch", "torchserve", "pillow", "numpy", "pydantic", "pydantic-core", "python"} <= listed
    assert "pytest" not in listed
    assert not {"serialNumber", "timestamp"} & {*document, *document["metadata"]}
    digests = json.loads((tmp_path / "digests.json").read_text())["members"]
    assert document["metadata"]["component"]["hashes"][0]["content"] == digests["model.pt"]["sha256"]


def test_the_bill_of_materials_follows_the_imports(own_run: Path) -> None:
    """A package that the handler comes to import is listed without anybody thinking of it."""
    assert "requests" not in sbom.imported_packages(own_run)
    (own_run / "new.py").write_text("def fetch():\n    from requests.adapters import HTTPAdapter\n")
    assert sbom.imported_packages(own_run) == ["requests", "torchserve"]
    assert {"urllib3", "idna"} <= set(sbom.with_requirements(["requests"]))


def test_without_provenance_nothing_is_listed(own_run: Path) -> None:
    """A model of unknown origin is named as such."""
    (own_run / "provenance.json").write_text("{}")
    with pytest.raises(IncompleteRun, match=r"provenance\.json does not say"):
        sbom.bill_of_materials(own_run, MODEL, "1.0")
