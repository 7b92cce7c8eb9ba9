"""Training: a recipe becomes a run folder that is complete, reproducible and honest, or nothing at all."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight

from archive.run_folder import RunFolder
from dataset import labelled_images
from handler.variants import load_torchscript
from measure import evaluation
from networks import models
from tests.commands import invoke
from tests.conftest import MODEL, ROOT, run_module
from tests.pages import README_TOLERANCE, blocks
from train import RECIPES, loading, pipeline, recipe, recipe_names, run_folder
from train import __main__ as train_command
from train.errors import RecipeError, RunFolderError, TrainingError
from train.loading import Batch, MemoryBatches, Share
from train.loop import LabelledTensors, Trainer, class_weights
from train.progress import Progress
from train.recipe import TrainingSection

QUIET = Console(quiet=True)
RUN_FOLDER = {
    "recipe.yaml", "weights.safetensors", "model.pt", "model.pt2", "model-config.yaml", "index_to_name.json",
    "metrics.json", "mistakes.csv", "golden", "provenance.json", "report.html", "preview.png", "checkpoints",
    "tensorboard", "reference.json", "acceptance.json", "MODEL_CARD.md",
}  # fmt: skip


def train_quickly(target: Path, *overrides: str, overwrite: bool = False, resume: bool = False) -> Path:
    chosen = recipe.load(MODEL, ["training.epochs=1", *overrides])
    pipeline.train(chosen, MODEL, target, overwrite=overwrite, resume=resume, console=QUIET)
    return target


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


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
    assert (
        record["data_sha256"] == labelled_images.load(chosen.data, chosen.handler, chosen.training.seed).fingerprint()
    )
    assert record["data_sha256"] != labelled_images.load(chosen.data, chosen.handler, seed=1).fingerprint()


@pytest.mark.process
@pytest.mark.slow
def test_same_seed_same_weights(tmp_path: Path) -> None:
    """The seed decides the weights, and nothing else does."""
    first, second, other = (
        weights(train_quickly(tmp_path / name, f"training.seed={seed}"))
        for name, seed in (("first", 7), ("second", 7), ("other", 8))
    )
    assert same(first, second)
    assert not same(first, other)


def test_the_golden_answers_are_the_exported_models(run: Path) -> None:
    """What the worker will compare itself with is what the file on disk gives for the held-out images."""
    chosen = recipe.load(MODEL)
    held_out = labelled_images.load(chosen.data, chosen.handler, chosen.training.seed).test
    golden = json.loads((run / "golden" / "golden.json").read_text())["probabilities"]
    probabilities = evaluation.predict(load_torchscript(run / "model.pt"), held_out, chosen.handler)
    rows = dict(zip((held_out.encoded[index] for index in range(len(held_out))), probabilities, strict=True))
    for name, row in golden.items():
        assert torch.allclose(rows[(run / "golden" / name).read_bytes()], torch.tensor(row), atol=1e-6)


# Everything that a checkpoint must hold: momentum, schedule, average, best epoch and what is random.
RESUMED = (
    "training.epochs=4", "training.ema_decay=0.9", "training.keep=best", "training.seed=3",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    """SIGKILL in the middle: nothing looks finished, and --resume ends with exactly the same weights and history."""
    options = [argument for override in RESUMED for argument in ("--set", override)]
    command = [sys.executable, "-u", "-m", "train", MODEL, "--runs", str(tmp_path), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("epoch   2" in line for line in process.stdout), "training must be under way before it is killed"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / MODEL).exists()
    with pytest.raises(RunFolderError, match="--resume goes on with it"):
        train_quickly(tmp_path / MODEL, *RESUMED)
    with pytest.raises(RunFolderError, match=r"another recipe .*seed: 4"):
        train_quickly(tmp_path / MODEL, *RESUMED[:-1], "training.seed=4", resume=True)

    resumed = train_quickly(tmp_path / MODEL, *RESUMED, resume=True)
    unbroken = train_quickly(tmp_path / "unbroken", *RESUMED)
    assert {path.name for path in resumed.iterdir()} == RUN_FOLDER
    assert same(weights(resumed), weights(unbroken))
    losses = [[epoch["loss"] for epoch in read_metrics(run)["history"]] for run in (resumed, unbroken)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, "unbroken"]


class Interrupted(MemoryBatches):
    """Blank images, until training is interrupted in the second epoch."""

    def __init__(self, count: int, training: TrainingSection) -> None:
        super().__init__(torch.zeros(count, 1, 32, 32, dtype=torch.uint8), torch.zeros(count).long(), training, Share())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if epoch == 2 and len(self.images) == 4:
            raise InterruptedError
        return super().epoch(epoch)


def test_weights_of_classes_equal_scikit_learn() -> None:
    """`balanced`, and none for a class without images; without the key every image counts alike."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    training = TrainingSection(epochs=1, batch_size=4, learning_rate=0.01, class_weights="balanced")
    weights = class_weights(training, labels, 4)
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels.numpy())
    assert weights.tolist() == pytest.approx([expected[0], expected[1], 0, expected[2]])
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert class_weights(training.model_copy(update={"class_weights": None}), labels, 4) is None


class ByBrightness(torch.nn.Linear):
    """A logistic regression of one feature."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward((images.mean((1, 2, 3)).unsqueeze(1) - 128) / 16)


def test_a_rare_class_is_found_with_balanced_weights_or_sampling(tmp_path: Path) -> None:
    """Of 8 images in 200 that overlap with the others most are found, and without either hardly any."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 192 + [1] * 8)
    brightness = 128 + 16 * torch.randn(200, generator=generator) + 24 * labels
    images = brightness.clamp(0, 255).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    val, found = LabelledTensors(torch.zeros(0), torch.zeros(0)), {}
    for rule in ("class_weights", "sampler", ""):
        balanced = {rule: "balanced"} if rule else {}
        training = TrainingSection(epochs=8, batch_size=20, learning_rate=1.5, **balanced)
        torch.manual_seed(0)
        network = ByBrightness()
        trainer = Trainer(
            Fabric(accelerator="cpu"), network, training, 200, RunFolder(tmp_path / f"run-{rule}"),
            class_weights=class_weights(training, labels, 2),
        )  # fmt: skip
        with Progress(QUIET, 200, 8) as progress:
            trainer.fit(MemoryBatches(images, labels, training, Share()), val, progress)
        found[rule] = int(network(images.float())[192:].argmax(1).sum())
    assert min(found["class_weights"], found["sampler"]) >= 6
    assert found[""] <= 2
    with pytest.raises(RecipeError, match="yaml: training: class_weights and sampler would each balance the classes"):
        recipe.load("small-images", ["training.class_weights=balanced", "training.sampler=balanced"])


def test_a_run_resumes_with_another_number_of_steps(tmp_path: Path) -> None:
    """As where one process takes the last batch that several left out: the schedule reaches to the end all the same."""
    training = TrainingSection(epochs=2, batch_size=4, learning_rate=0.01)
    val, progress = LabelledTensors(torch.zeros(0), torch.zeros(0)), Progress(QUIET, 1, 1)

    def trainer(count: int) -> Trainer:
        return Trainer(Fabric(accelerator="cpu"), models.OWN["lenet5"](1, 2), training, count, RunFolder(tmp_path))

    with pytest.raises(InterruptedError):
        trainer(4).fit(Interrupted(4, training), val, progress)
    resumed = trainer(9)
    resumed.resume()
    resumed.fit(Interrupted(9, training), val, progress)
    assert [epoch.epoch for epoch in resumed.history] == [1, 2]
    assert resumed.scheduler is not None
    assert resumed.scheduler.last_epoch == 6


def test_a_run_does_not_resume_on_other_data(tmp_path: Path) -> None:
    """Where an image came or went the split is another one, and images held out now may have been trained on."""
    training = TrainingSection(epochs=2, batch_size=4, learning_rate=0.01)
    val, progress = LabelledTensors(torch.zeros(0), torch.zeros(0)), Progress(QUIET, 1, 1)

    def trainer(data: str) -> Trainer:
        network = models.OWN["lenet5"](1, 2)
        return Trainer(Fabric(accelerator="cpu"), network, training, 4, RunFolder(tmp_path), data)

    with pytest.raises(InterruptedError):
        trainer("these images").fit(Interrupted(4, training), val, progress)
    with pytest.raises(RunFolderError, match="its images or their split are not those that it began with"):
        trainer("other images").resume()
    same_data = trainer("these images")
    same_data.resume()
    assert len(same_data.history) == 1


@pytest.mark.process
def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    """--resume without an unfinished run is an error, not a new run."""
    with pytest.raises(RunFolderError, match="nothing to resume"):
        train_quickly(tmp_path / MODEL, resume=True)


@pytest.mark.process
def test_a_run_that_fails_before_its_first_epoch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to resume, so nothing is kept."""
    monkeypatch.setattr(Trainer, "fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_quickly(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_run_that_fails_after_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at the last step leaves no run folder, and --resume need not train again."""
    with monkeypatch.context() as broken:
        broken.setattr(evaluation, "metrics", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_quickly(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "train_one_epoch", lambda *_: 1 / 0)
        train_quickly(tmp_path / "run", resume=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FOLDER


@pytest.mark.process
def test_two_trainings_into_one_folder_are_kept_apart(tmp_path: Path) -> None:
    """The second is refused while the first is writing."""
    with (
        run_folder.writing(tmp_path / "run", "a: 1", overwrite=False, resume=False),
        pytest.raises(RunFolderError, match="another process"),
    ):
        train_quickly(tmp_path / "run")


@pytest.mark.process
def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    """A learning rate that destroys what was learnt stops the run, and the weights are those of the best epoch."""
    run = train_quickly(
        tmp_path / "run", "training.epochs=30", "training.keep=best", "training.early_stopping_patience=2",
        "training.schedule=constant", "training.learning_rate=0.2",
    )  # fmt: skip
    metrics = read_metrics(run)
    history = metrics["history"]
    assert len(history) < 30
    best = max(history, key=lambda epoch: (epoch["val_acc1"], -epoch["val_loss"]))
    assert metrics["kept_epoch"] == best["epoch"] == len(history) - 2


@pytest.mark.process
def test_a_training_that_diverges_stops(tmp_path: Path) -> None:
    """At the end of the epoch that destroyed the weights, with the key to change; nothing is left."""
    with pytest.raises(TrainingError, match=r"no numbers after epoch 1: lower training\.learning_rate"):
        train_quickly(tmp_path / "run", "training.epochs=3", "training.learning_rate=1000000")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_without_validation_images_everything_else_stays(tmp_path: Path) -> None:
    """A share of 0 trains on all images, keeps the last epoch and does not calibrate."""
    metrics = read_metrics(train_quickly(tmp_path / "run", "data.val_fraction=0"))
    assert metrics["data"]["val"] == 0
    expected = {"temperature": 1.0, "images": 0, "mistakes": 0, "fitted": False}
    assert expected.items() <= metrics["calibration"].items()
    assert metrics["history"][0]["val_acc1"] is None


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_trains(tmp_path: Path, precision: str) -> None:
    """Half the bits in the matrices, fp32 weights in the run folder, and it still learns."""
    run = train_quickly(
        tmp_path / "run", f"training.precision={precision}", "training.epochs=3", "training.channels_last=true"
    )
    assert all(value.dtype == torch.float32 for value in weights(run).values())
    history = read_metrics(run)["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


@pytest.mark.process
def test_training_keeps_to_the_cores_it_is_bound_to(tmp_path: Path) -> None:
    """torch's threads and the workers that read photographs: no more than cores, and no more than before."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(2)
    os.sched_setaffinity(0, {min(cores)})
    try:
        train_quickly(tmp_path / "run", "training.threads=0")
        assert torch.get_num_threads() == 1
        chosen = recipe.load("finetune")
        images = labelled_images.LabelledImages([], [], torch.zeros(0))
        assert loading.StreamedBatches(images, chosen.handler, chosen.training, loading.Share()).workers == 1
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def test_a_training_in_a_pipe_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each time that the interval is over, between those of the epochs."""
    monkeypatch.setattr("train.progress.LINE_INTERVAL_S", 0)
    output = io.StringIO()
    with Progress(Console(file=output), images=50, epochs=2) as progress:
        progress.step(25)
    assert re.fullmatch(r"training 25%, [\d,]+ images/s, \d+:\d\d:\d\d left\n", output.getvalue())
    monkeypatch.setattr("train.progress.LINE_INTERVAL_S", 30)
    quiet = io.StringIO()
    with Progress(Console(file=quiet), images=50, epochs=2) as progress:
        progress.step(25)
    assert quiet.getvalue() == ""


def test_tensorboard_has_every_epoch(run: Path) -> None:
    """The scalars that TensorBoard shows are those of metrics.json."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    history = read_metrics(run)["history"]
    for key in ("loss", "acc1", "val_loss", "val_acc1", "learning_rate"):
        scalars = [event.value for event in events.Scalars(key)]
        assert scalars == pytest.approx([epoch[key] for epoch in history], rel=1e-5)


def test_the_readme_prints_the_answer_that_one_gets(run: Path) -> None:
    """The classes and probabilities that training measured for the image of its request."""
    [request], [answer] = blocks("README.md", "TOKEN="), blocks("README.md", language="json")[:1]
    image, printed = request.partition("golden/")[2].split()[0], json.loads(answer)
    measured = json.loads((run / "golden" / "golden.json").read_text())
    probabilities = dict(zip(measured["class_names"], measured["probabilities"][image], strict=True))
    assert next(iter(printed)) == max(probabilities, key=probabilities.__getitem__)
    assert printed == pytest.approx({name: probabilities[name] for name in printed}, abs=README_TOLERANCE)


def test_every_mistake_is_listed_with_its_file(run: Path) -> None:
    """As many as the confusion matrix has beside its diagonal, the surest first."""
    with (run / "mistakes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    confusion = read_metrics(run)["test"]["confusion"]
    assert len(rows) == sum(map(sum, confusion)) - sum(row[index] for index, row in enumerate(confusion)) > 0
    assert all(row["file"].startswith("digit-") and row["truth"] != row["guess"] for row in rows)
    assert [row["probability"] for row in rows] == sorted((row["probability"] for row in rows), reverse=True)


@pytest.mark.process
def test_the_preview_is_a_picture(run: Path, tmp_path: Path) -> None:
    """The run folder has one, and --preview writes one without training."""
    with Image.open(run / "preview.png") as picture:
        assert picture.width > 500
        assert len(set(picture.convert("L").tobytes())) > 50
    finished = invoke(train_command.app, MODEL, "--preview", tmp_path / "batch.png", "--runs", tmp_path / "runs")
    assert finished.exit_code == 0, finished.stderr
    assert (tmp_path / "batch.png").is_file()
    assert not (tmp_path / "runs").exists()


def read_metrics(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return document


@pytest.mark.process
@pytest.mark.slow
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


@pytest.mark.process
def test_what_is_no_run_folder_is_never_replaced(tmp_path: Path) -> None:
    """A folder of photographs under the run's name stays as it is, with --overwrite too, and nothing lies beside it."""
    photographs = tmp_path / "photos"
    photographs.mkdir()
    (photographs / "ant.jpg").write_bytes(b"irreplaceable")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match="is no run folder, so nothing replaces it"):
            train_quickly(photographs, overwrite=overwrite)
    assert list(tmp_path.rglob("*")) == [photographs, photographs / "ant.jpg"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a/"])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    """It names a folder in --runs: neither --runs itself, nor one above or further below."""
    assert run_folder.named(tmp_path, "a.b") == tmp_path / "a.b"
    with pytest.raises(RunFolderError, match="is no name of a run"):
        run_folder.named(tmp_path, name)


@pytest.mark.parametrize("name", [" ", "-x", "a b", "a\nb", ".hid", "größe", "mytokens", "n" * 201])
def test_a_run_is_called_as_a_model_may_be(tmp_path: Path, name: str) -> None:
    """What no archive could be called is refused before training; the longest name leaves room for a temporary one."""
    run_folder.named(tmp_path, "n" * 200).with_name(f".{'n' * 200}.mar.sig.partial-4194304").touch()
    with pytest.raises(RunFolderError, match="is no name of a run, whose model is called so too"):
        run_folder.named(tmp_path, name)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_documented(name: str) -> None:
    """Each loads, and its first comment is the command that runs it."""
    recipe.load(name)
    assert (RECIPES / f"{name}.yaml").read_text().startswith(f"# python -m train {name}")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.epochs=0", "training: .*epochs: must be above 0, unless freeze is set"),
        ("training.epochs=many", "training.epochs: .*valid integer.*, found 'many'"),
        ("training.epoch=3", r"training.epoch: extra .* permitted, found 3; did you mean training.epochs\?"),
        ("epochs=3", r"epochs: .*; did you mean training.epochs\?"),
        ("training.batch_size_=3", r"; did you mean training.batch_size\?"),
        ("train.epochs=3", r"train: .*; did you mean training\?"),
        ("serving.quite_another=3", r"quite_another: extra inputs are not permitted, found 3; the keys are"),
        ("data.dataset=mnisst", "data.dataset: input should be 'digits', 'mnist'"),
        ("model.mean=[0.1, 0.2]", "model.mean must have one value for each of 1 channels"),
        ("serving.explanation_time_s=120", "explanation_time_s 120 does not fit into the response timeout of 120 s"),
        ("serving.torchserve={batchSize: 2}", "torchserve: batchSize: set by the other keys of serving and input"),
        (
            "input.top_k=3",
            "digits.yaml: input.top_k: extra .*; did you mean serving.top_k.; the keys are channels, resize_size,",
        ),
        ("floors.acc1=0.9", "floors: extra .*; the keys are data, input, model, training, serving, gate"),
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


def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """The file is named."""
    file = tmp_path / "mine.yaml"
    file.write_bytes("# größer\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"mine\.yaml: not UTF-8: .*position 4"):
        recipe.load(str(file))


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--accelerator", "cdua"), "error: --accelerator cdua is not available here (ValueError: You selected"),
        (("--name", ".", "--overwrite"), "error: '.' is no name of a run"),
        (("--preview", "batch"), "error: --preview batch: the picture is a PNG file"),
        (
            ("--set", "input.crop_size=28", "--set", "input.resize_size=28"),
            "error: the network cannot take images of 1×28×28 (",
        ),
        (
            ("--set", "training.epochs=1", "--set", "training.batch_size=130", "--set", "training.warmup_fraction=0.1"),
            "error: training.warmup_fraction 0.1 of 10 steps is a single one",
        ),
    ],
)  # fmt: skip
def test_ordinary_mistakes_are_told_in_one_line(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    """No traceback, and no folder is left."""
    finished = invoke(train_command.app, MODEL, "--runs", tmp_path / "runs", *arguments)
    assert finished.exit_code == 1
    assert finished.stderr.startswith(complaint)
    assert len(finished.stderr.splitlines()) == 1
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    """In one line, before anything is written."""
    finished = invoke(train_command.app, MODEL, "--runs", tmp_path, "--accelerator", "cuda")
    assert finished.exit_code == 1
    assert finished.stderr.startswith("error: --accelerator cuda is not available here (RuntimeError: ")
    assert len(finished.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_unknown_recipe_lists_those_that_exist() -> None:
    """A process of its own prints one line that names the recipes, and no traceback."""
    finished = run_module("train", "lenet")
    assert finished.returncode == 1
    assert MODEL in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
