"""What does not meet the gate of its recipe is not shipped, or tells that it was; and what it is made of is listed."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from archive import gate, sbom, serving
from archive.__main__ import app
from archive.build import build
from archive.errors import IncompleteRun, ThresholdNotMet
from archive.verify import verify
from tests.commands import invoke
from tests.conftest import MODEL
from train import recipe, recipe_names
from train.errors import RecipeError


def set_gate(run: Path, **thresholds: Any) -> None:
    document = yaml.safe_load((run / "recipe.yaml").read_text())
    document["gate"] = thresholds
    (run / "recipe.yaml").write_text(yaml.safe_dump(document))


def judge(run: Path, size_mb: float = 1.0, p99_ms: float = 1.0) -> list[gate.Check]:
    return gate.judge(serving.read(run).gate, run, size_mb, p99_ms)


def verdicts(run: Path, size_mb: float = 1.0, p99_ms: float = 1.0) -> dict[str, bool]:
    return {check.threshold: check.passed for check in judge(run, size_mb, p99_ms)}


def test_every_threshold_is_judged(own_run: Path) -> None:
    """None of the schema is left out, and the recipe of a training has the same schema."""
    assert [check.threshold for check in judge(own_run)] == list(gate.Gate.model_fields)
    assert recipe.Recipe.model_fields["gate"].annotation is gate.Gate


def test_thresholds_travel_with_the_run(run: Path) -> None:
    """What the recipe sets arrives in the run folder, and what it leaves out is not set."""
    set_by_recipe = {"min_acc1": 0.97, "min_worst_class": 0.85, "max_ece": 0.05, "max_size_mb": 5.0}
    assert serving.read(run).gate.model_dump(exclude_none=True) == set_by_recipe
    for name in recipe_names():
        expected = set() if name in ("finetune", "probe", "small-images") else {"min_acc1", "max_size_mb"}
        assert expected <= set(recipe.load(name).gate.model_dump(exclude_none=True))


def test_each_threshold_is_compared_in_its_own_direction(own_run: Path) -> None:
    """At the bound passes; just beyond it does not; a threshold that is not set lets everything pass."""
    measured = json.loads((own_run / "metrics.json").read_text())["test"]
    exact = {
        "min_acc1": measured["acc1"],
        "min_acc1_lower": measured["acc1_interval"]["lower"],
        "min_worst_class": measured["worst_class"]["acc1"],
        "max_ece": measured["ece"],
        "max_size_mb": 1.0,
        "max_p99_ms": 1.0,
    }
    set_gate(own_run, **{name: min(value, 1.0) for name, value in exact.items()})
    assert all(verdicts(own_run).values())
    for name, value in exact.items():
        set_gate(own_run, **{name: value + (1e-6 if name.startswith("min_") else -1e-6)})
        assert verdicts(own_run) == {other: other != name for other in verdicts(own_run)}
    set_gate(own_run)
    assert all(verdicts(own_run, 1e9, 1e9).values())


def test_what_cannot_be_compared_does_not_pass(own_run: Path) -> None:
    """NaN is worse than any threshold; one of another name or type is an error that names it."""
    set_gate(own_run, max_ece=0.05)
    document = json.loads((own_run / "metrics.json").read_text())
    document["test"]["ece"] = float("nan")
    (own_run / "metrics.json").write_text(json.dumps(document))
    assert not verdicts(own_run)["max_ece"]
    for thresholds, complaint in (
        ({"min_acc5": 0.9}, r"recipe\.yaml: gate\.min_acc5: extra .*; the keys are min_acc1, min_acc1_lower, min_"),
        ({"min_acc1": "high"}, r"gate\.min_acc1: input should be a valid number, found 'high'"),
    ):
        set_gate(own_run, **thresholds)
        with pytest.raises(IncompleteRun, match=complaint):
            judge(own_run)
    del document["test"]["worst_class"]
    (own_run / "metrics.json").write_text(json.dumps(document))
    set_gate(own_run)
    with pytest.raises(IncompleteRun, match=r"metrics\.json lacks .*worst_class"):
        judge(own_run)


FORM, EMPTY_ONNX = "model.int8.onnx", b""


def write_int8(run: Path, kept: bool = True, **measured: float) -> None:
    """An int8 file, and what was measured of it on held-out images; what chose it does not count."""
    (run / FORM).write_bytes(EMPTY_ONNX)
    chosen = {"acc1": 0.1, "acc1_lower": 0.05, "worst_class": 0.0, "ece": 0.9}
    held_out = {"acc1": 0.99, "acc1_lower": 0.97, "worst_class": 0.9, "ece": 0.01}
    told = {"kept": kept, "attempts": [chosen], "held_out": {**held_out, **measured}}
    (run / "quantisation.json").write_text(json.dumps(told))


@pytest.mark.parametrize(("name", "measured"), [("acc1", 0.98), ("worst_class", 0.5), ("ece", 0.04)])
def test_int8_is_held_to_the_thresholds_of_today(own_run: Path, name: str, measured: float) -> None:
    """A form that met the thresholds of its day and not those of the recipe as it is now fails by its name."""
    write_int8(own_run, **{name: measured})
    set_gate(own_run, min_acc1=0.5, min_worst_class=0.4, max_ece=0.5)
    assert all(check.passed for check in judge(own_run))
    set_gate(own_run, min_acc1=0.985, min_worst_class=0.6, max_ece=0.03)
    checks = judge(own_run)
    [failed] = [check.label for check in checks if check.form and not check.passed]
    assert re.fullmatch(rf"{FORM}: (min|max)_{name}", failed)


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_int8_below_a_threshold_is_not_shipped(own_run: Path, tmp_path: Path) -> None:
    """The refusal names the form; forced, the archive tells of it."""
    write_int8(own_run, worst_class=0.1)
    with pytest.raises(
        ThresholdNotMet, match=r"recipe: model\.int8\.onnx: min_worst_class is 85\.00%, measured 10\.00%\. "
    ):
        build(own_run, MODEL, "1.0", tmp_path)
    assert not list(tmp_path.glob("*.mar"))
    built = build(own_run, MODEL, "1.0", tmp_path, force=True)
    with zipfile.ZipFile(built.path) as archive:
        thresholds = json.loads(archive.read("gate.json"))["thresholds"]
    assert {"name": "model.int8.onnx: min_worst_class", "bound": 0.85, "passed": False} in thresholds


def test_int8_that_nobody_measured_is_refused(own_run: Path) -> None:
    """Without a report, with one of an earlier version, or with one that says that it was not kept."""
    complaint = r"quantisation\.json does not tell how accurate model\.int8\.onnx is .*or remove model\.int8\.onnx"
    write_int8(own_run, kept=False)
    with pytest.raises(IncompleteRun, match=complaint):
        judge(own_run)
    (own_run / "quantisation.json").write_text('{"kept": true}')
    with pytest.raises(IncompleteRun, match=complaint):
        judge(own_run)
    (own_run / "quantisation.json").unlink()
    with pytest.raises(IncompleteRun, match=complaint):
        judge(own_run)


def test_a_threshold_that_makes_no_sense_is_refused_in_the_recipe() -> None:
    """Before anything is trained."""
    with pytest.raises(RecipeError, match=r"gate\.min_acc1: .*less than or equal to 1, found 97"):
        recipe.load(MODEL, ["gate.min_acc1=97"])


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_without_its_thresholds_nothing_is_shipped_and_force_is_remembered(own_run: Path, tmp_path: Path) -> None:
    """The refusal names threshold and figure; forced, the archive says so for good."""
    store = tmp_path / "store"
    store.mkdir()
    set_gate(own_run, min_acc1=0.97, max_ece=1e-9, max_p99_ms=1e-9)
    with pytest.raises(
        ThresholdNotMet, match=r"max_ece is 0\.0000, measured 0\.0\d+; max_p99_ms is 0\.0 ms, .*--force"
    ):
        build(own_run, MODEL, "1.0", store)
    assert not list(store.iterdir())

    built = build(own_run, MODEL, "1.0", store, force=True)
    assert verify(built.path).forced
    with zipfile.ZipFile(built.path) as archive:
        recorded = json.loads(archive.read("gate.json"))
    assert recorded == {
        "forced": True,
        "thresholds": [
            {"name": "min_acc1", "bound": 0.97, "passed": True},
            {"name": "max_ece", "bound": 1e-9, "passed": False},
            {"name": "max_p99_ms", "bound": 1e-9, "passed": False},
        ],
    }
    assert "forced past its gate" in invoke(app, "verify", built.path).stdout


def test_what_passes_is_not_marked_as_forced(model_store: Path) -> None:
    """The control: an archive that met its thresholds."""
    assert not verify(model_store / f"{MODEL}.mar").forced


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_the_command_shows_threshold_and_figure(own_run: Path, tmp_path: Path) -> None:
    """The table is printed whether the archive ships or not."""
    set_gate(own_run, min_acc1=0.5, min_worst_class=1)
    refused = invoke(app, "build", own_run, "--model-store", tmp_path)
    assert refused.exit_code == 1
    assert re.search(r"min_acc1 +50\.00%", refused.stdout)
    assert "pass" in refused.stdout
    assert "FAIL" in refused.stdout
    assert refused.stderr.startswith(f"error: {own_run} does not meet the gate of its recipe: min_worst_class")
    assert len(refused.stderr.splitlines()) == 1


def test_the_bill_of_materials_is_valid_and_names_what_a_worker_imports(model_store: Path, tmp_path: Path) -> None:
    """By CycloneDX's own schema; packages that the handler imports and those that these need are in it."""
    # Here, since it takes seconds, which every process of tests would pay for.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    with zipfile.ZipFile(model_store / f"{MODEL}.mar") as archive:
        archive.extractall(tmp_path)
    text = (tmp_path / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    listed = {component["name"] for component in document["components"]}
    assert {"torch", "torchserve", "pillow", "numpy", "pydantic", "pydantic-core", "python"} <= listed
    assert {"netty-codec-http2", "grpc-netty-shaded", "log4j-core", "snakeyaml"} <= listed
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
