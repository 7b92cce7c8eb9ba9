"""Training: a recipe becomes a run folder that is complete, reproducible and honest, or nothing at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.conftest import MODEL, ROOT
from train import datasets, evaluation, pipeline, recipe
from train.errors import RecipeError, RunFolderError

QUIET = Console(quiet=True)
RUN_FOLDER = {
    "recipe.yaml", "weights.safetensors", "model.pt", "model-config.yaml", "index_to_name.json", "metrics.json",
    "golden", "provenance.json",
}  # fmt: skip


def train_quickly(target: Path, *overrides: str, overwrite: bool = False) -> Path:
    chosen = recipe.load(MODEL, ["training.epochs=1", *overrides])
    pipeline.train(chosen, MODEL, target, overwrite=overwrite, console=QUIET)
    return target


def cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "train", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_default_recipe_reaches_its_accuracy(run: Path) -> None:
    """LeNet-5 on the embedded digits: at least 97 % of the held-out images, measured on the exported model."""
    measured = json.loads((run / "metrics.json").read_text())["test"]
    assert measured["acc1"] >= 0.97
    assert measured["images"] == 360
    assert sum(map(sum, measured["confusion"])) == 360


def test_the_run_folder_is_complete(run: Path) -> None:
    """Every file that archive, worker and reader need is there."""
    assert {path.name for path in run.iterdir()} == RUN_FOLDER
    assert json.loads((run / "index_to_name.json").read_text()) == {str(i): str(i) for i in range(10)}


def test_provenance_says_where_a_run_comes_from(run: Path) -> None:
    """Code, data, seed and versions are on record; the data fingerprint follows the data."""
    record = json.loads((run / "provenance.json").read_text())
    assert record["packages"]["torch"] == torch.__version__.partition("+")[0]
    chosen = recipe.load(MODEL)
    assert record["data_sha256"] == datasets.load(chosen.data, chosen.training.seed).fingerprint()
    assert record["data_sha256"] != datasets.load(chosen.data, seed=1).fingerprint()


def test_same_seed_same_weights(tmp_path: Path) -> None:
    """The seed decides the weights, and nothing else does."""
    first, second, other = (
        load_file(train_quickly(tmp_path / name, f"training.seed={seed}") / "weights.safetensors")
        for name, seed in (("first", 7), ("second", 7), ("other", 8))
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["network.0.weight"], other["network.0.weight"])


def test_the_golden_answers_are_the_exported_models(run: Path) -> None:
    """What the worker will compare itself with is what the file on disk gives for the held-out images."""
    chosen = recipe.load(MODEL)
    held_out = datasets.load(chosen.data, chosen.training.seed).test
    golden = json.loads((run / "golden" / "golden.json").read_text())["probabilities"]
    probabilities = evaluation.predict(run / "model.pt", held_out, chosen.input)
    for name, row in zip(held_out.names, probabilities, strict=True):
        if name in golden:
            assert torch.allclose(row, torch.tensor(golden[name]), atol=1e-6)
    assert set(golden) <= set(held_out.names)


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """SIGKILL in the middle: no run folder, and training again needs no clean-up."""
    command = [sys.executable, "-u", "-m", "train", MODEL, "--runs", str(tmp_path), "--set", "training.epochs=100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("epoch   2" in line for line in process.stdout), "training must be under way before it is killed"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / MODEL).exists()
    assert {path.name for path in train_quickly(tmp_path / MODEL).iterdir()} == RUN_FOLDER


def test_a_failing_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after training, at the last step, leaves neither a run folder nor a partial one."""
    monkeypatch.setattr(evaluation, "metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_quickly(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_only_replaced_when_asked(tmp_path: Path) -> None:
    """Training again under the same name refuses; --overwrite replaces the whole folder."""
    target = train_quickly(tmp_path / "run")
    before = (target / "weights.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match="--overwrite"):
        train_quickly(target, "training.seed=1")
    assert (target / "weights.safetensors").read_bytes() == before
    train_quickly(target, "training.seed=1", overwrite=True)
    assert (target / "weights.safetensors").read_bytes() != before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_are_valid_and_documented(name: str) -> None:
    """Each loads, and its first comment is the command that runs it."""
    recipe.load(name)
    assert (recipe.RECIPES / f"{name}.yaml").read_text().startswith(f"# python -m train {name}")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.epochs=0", "training.epochs: input should be greater than 0, found 0"),
        ("training.epochs=many", "training.epochs: .*valid integer.*, found 'many'"),
        ("training.epoch=3", "training.epoch: extra inputs are not permitted, found 3"),
        ("data.dataset=mnisst", "data.dataset: input should be 'digits'"),
        ("model.mean=[0.1, 0.2]", "model.mean must have one value for each of 1 channels"),
        ("epochs", "expected section.key=value"),
        ("training.epochs.more=3", "expected section.key=value"),
    ],
)
def test_wrong_recipe_keys_say_file_key_and_expectation(override: str, complaint: str) -> None:
    """Any wrong key or value is named, with what was expected."""
    with pytest.raises(RecipeError, match=complaint):
        recipe.load(MODEL, [override])


def test_recipe_files_that_are_no_recipes(tmp_path: Path) -> None:
    """A list, broken YAML and a missing file are each named."""
    file = tmp_path / "mine.yaml"
    for text, complaint in (("- a\n", "found list"), ("a: [", "not valid YAML"), ("", "found NoneType")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=rf"mine.yaml: .*{complaint}"):
            recipe.load(str(file))


def test_unknown_recipe_lists_those_that_exist() -> None:
    """The command prints one line that names the recipes, and no traceback."""
    finished = cli("lenet")
    assert finished.returncode == 1
    assert MODEL in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
