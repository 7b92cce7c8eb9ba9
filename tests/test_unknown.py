"""Strangers: how near an image lies to those that were trained on, what that tells, and how many slip through."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cosine_similarity

from archive.run_folder import RunFolder
from dataset import sources
from handler import golden, variants
from handler.acceptance import Acceptance, Scores
from handler.golden import GoldenMismatch
from handler.settings import AcceptSettings, SettingsError
from measure import strangers
from networks.errors import ModelError
from networks.models import cnn_mnist
from tests.commands import invoke
from tests.conftest import MODEL
from tests.images import encode
from tests.made import made
from tests.worker import load, make_context
from train import nearness, pipeline, recipe
from train.evaluate import app

CPU = torch.device("cpu")
STRANGERS = 40


@pytest.fixture(scope="session")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, and a file that is no image."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("strangers"), np.random.default_rng(0)
    for number in range(STRANGERS):
        noise = Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8))
        (folder / f"{number:02}.png").write_bytes(encode(noise, "PNG"))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="session")
def near_run(unknown: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model tells nearness and whose recipe refuses by it."""
    keys = ["training.epochs=3", "serving.workers=1", "serving.accept.known=0.9", f"data.unknown={unknown}"]

    def train(target: Path) -> None:
        pipeline.train(recipe.load(MODEL, keys), MODEL, target, console=Console(quiet=True))

    return made("near", train, tmp_path_factory.mktemp("near") / MODEL)


def pixels(run: Path) -> torch.Tensor:
    """uint8[N,C,H,W] of the golden images."""
    from handler.decoding import decode
    from handler.settings import HandlerSettings

    settings = HandlerSettings.parse(RunFolder(run).read_config()["handler"], "here")
    return torch.stack([decode(image, settings) for image in golden.images(run / "golden")])


def test_every_form_of_the_model_tells_the_same_nearness(near_run: Path) -> None:
    """TorchScript and torch.export, in fp32 and bf16, beside the very probabilities that `forward` gives alone."""
    images, classes = pixels(near_run), 10
    expected = torch.tensor(golden.read(near_run / "golden").nearness)
    assert ((expected > 0.5) & (expected < 1)).all()
    for name in ("model.pt", "model.pt2"):
        load_form = variants.load_torchscript if name == "model.pt" else variants.load_exported_program
        with torch.inference_mode():
            alone = load_form(near_run / name)(images)
        assert alone.shape == (len(images), classes)
        for form, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
            with torch.inference_mode():
                answered = variants.loaders(near_run / name, CPU, with_nearness=True)[form]()(images)
                without = variants.loaders(near_run / name, CPU)[form]()(images)
            assert torch.equal(answered[:, :classes], without)
            assert (answered[:, :classes] - alone).abs().max() <= tolerance
            assert (answered[:, classes] - expected).abs().max() <= tolerance
        assert set(variants.loaders(near_run / name, CPU, with_nearness=True)) == {"fp32", "bf16"}


def test_nearness_is_the_similarity_to_the_nearest_training_image() -> None:
    """By PyTorch's own cosine similarity over all pairs; the mean of both views where mirror images are averaged."""
    torch.manual_seed(0)
    network, images = cnn_mnist(1, 3).eval(), torch.rand(6, 1, 28, 28)
    with torch.inference_mode():
        tapped = nearness.Tapped(network, 3)
        logits, features = tapped(images)
        assert torch.equal(logits, network(images))
        assert torch.equal(logits, network[-1](features))
        bank = features[:4]
        answered = nearness.NearNetwork(tapped, False, bank)(images)
        expected = torch.stack([cosine_similarity(features, other[None]) for other in bank]).max(0).values
        assert torch.allclose(answered[:, 3], expected, atol=1e-6)
        assert torch.allclose(nearness.of_features(features, bank), expected, atol=1e-6)
        mirrored = nearness.NearNetwork(tapped, False, bank)(images.flip(3))
        both = nearness.NearNetwork(tapped, True, bank)(images)
        assert torch.allclose(both, (answered + mirrored) / 2)


def test_a_network_without_a_linear_layer_is_refused() -> None:
    """One line that names the keys that ask for it."""
    with pytest.raises(ModelError, match=r"serving\.accept\.known and --unknown need a network whose classes are"):
        nearness.Tapped(nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten()), 3)


def test_the_images_to_compare_with_are_of_all_classes() -> None:
    """A thousand at most, and of a rare class all; the same ones whenever they are drawn."""
    labels = torch.tensor([0] * 5000 + [1] * 300 + [2] * 3)
    chosen = nearness.bank_indices(labels, 0)
    assert Counter(labels[chosen].tolist()) == {0: 697, 1: 300, 2: 3}
    assert chosen == nearness.bank_indices(labels, 0) != nearness.bank_indices(labels, 1)
    assert sorted(nearness.bank_indices(labels[:20], 0)) == list(range(20))


def test_strangers_are_measured_by_both_scores(near_run: Path, unknown: Path) -> None:
    """AUROC is scikit-learn's on the model's own answers, shares are counts, and the better score is named."""
    document = json.loads((near_run / "metrics.json").read_text())
    measured = document["unknown"]
    assert (measured["images"], measured["refused"], measured["known_images"]) == (STRANGERS, 1, 360)
    from handler.decoding import decode

    settings = recipe.load(MODEL).handler
    model = variants.load_torchscript(near_run / "model.pt", with_nearness=True)
    with torch.inference_mode():
        strange = model(torch.stack([decode(f.read_bytes(), settings) for f in sorted(unknown.glob("[0-9]*.png"))]))
        known = model(pipeline.load(recipe.load(MODEL), MODEL, Console(quiet=True)).test.decode(settings))
    for name, (of_known, of_strangers) in {
        "probability": (known[:, :10].amax(1), strange[:, :10].amax(1)),
        "nearness": (known[:, 10], strange[:, 10]),
    }.items():
        score = measured["scores"][name]
        auroc = roc_auc_score([1] * 360 + [0] * STRANGERS, torch.cat([of_known, of_strangers]).numpy())
        assert score["auroc"] == pytest.approx(auroc, abs=1e-4)
        assert score["auroc_interval"]["lower"] <= auroc <= score["auroc_interval"]["upper"]
        assert (of_known >= score["threshold"] - 1e-6).float().mean() >= 0.95
        passing = int((of_strangers >= score["threshold"]).sum())
        assert (score["accepted_at_95"]["count"], score["accepted_at_95"]["share"]) == (passing, passing / STRANGERS)
        for label in ("known", "strangers"):
            assert sum(score["histogram"][label]) == pytest.approx(1)
    least = document["accept"]["thresholds"]["nearness"]
    assert measured["accepted"]["count"] == int((strange[:, 10] >= least).sum())
    assert measured["better"] == max(measured["scores"], key=lambda name: measured["scores"][name]["auroc"])


def test_the_interval_of_an_auroc_is_as_wide_as_resampling_has_it() -> None:
    """Hanley and McNeil's closed form against 200 resamplings; none leaves 0..1."""
    generator = np.random.default_rng(0)
    known, strange = generator.normal(1.2, 1, 120), generator.normal(0, 1, 80)
    labels = [1] * 120 + [0] * 80
    auroc = float(roc_auc_score(labels, [*known, *strange]))
    drawn = [roc_auc_score(labels, [*generator.choice(known, 120), *generator.choice(strange, 80)]) for _ in range(200)]
    interval = strangers._auroc_interval(auroc, 120, 80)
    assert interval["upper"] - interval["lower"] == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.2)
    assert strangers._auroc_interval(1.0, 5, 5) == {"lower": 1.0, "upper": 1.0}


def test_two_lines_say_what_was_measured() -> None:
    """The shares with their intervals by score, and which score to set where another is served."""
    share = {"count": 10, "share": 0.1, "share_interval": {"lower": 0.05, "upper": 0.2}}
    score = {"auroc": 0.8, "auroc_interval": {"lower": 0.7, "upper": 0.9}, "accepted_at_95": share}
    measured = {
        "images": 100, "known_images": 50, "better": "nearness", "accepted": None,
        "scores": {"probability": score, "nearness": score},
    }  # fmt: skip
    first, second = strangers.describe(measured, AcceptSettings())
    assert first == (
        "100 strangers: where 95% of 50 known images are accepted, so are 10.0% (95% interval 5.0–20.0%) by "
        "probability, whose AUROC is 0.800 (0.700–0.900); 10.0% (95% interval 5.0–20.0%) by nearness, whose AUROC is "
        "0.800 (0.700–0.900)"
    )
    advice = "; nearness tells them better: set serving.accept to {known: 0.95, known_by: nearness}"
    assert second == f"as it is served, nothing marks a stranger{advice}"
    served = {**measured, "accepted": share}
    [_, second] = strangers.describe(served, AcceptSettings(known=0.95, known_by="probability"))
    assert second == f"as it is served, 10 of 100 strangers are accepted (95% interval 5.0–20.0%){advice}"
    assert strangers.describe(served, AcceptSettings(known=0.95))[1].endswith("20.0%)")
    assert strangers.describe(None, AcceptSettings()) == []


def test_a_worker_refuses_strangers(near_run: Path, unknown: Path) -> None:
    """Its marks are those of the thresholds, most strangers are refused, and most digits are not."""
    classifier = load(near_run)
    least = json.loads((near_run / "metrics.json").read_text())["accept"]["thresholds"]["nearness"]
    assert classifier.acceptance == Acceptance(-math.inf, least)
    known = [image.read_bytes() for image in sorted((near_run / "golden").glob("*.png"))]
    bodies = [{"body": image} for image in known + [file.read_bytes() for file in sorted(unknown.glob("[0-9]*.png"))]]
    context = make_context(near_run, len(bodies))
    classifier.handle(bodies, context)
    marks = [context.get_response_headers(index)["x-accepted"] == "true" for index in range(len(bodies))]
    values = golden.read(near_run / "golden").nearness
    assert values is not None
    assert all(
        mark == (value >= least) for mark, value in zip(marks, values, strict=False) if abs(value - least) > 1e-5
    )
    accepted = json.loads((near_run / "metrics.json").read_text())["unknown"]["accepted"]["count"]
    assert sum(marks[len(known) :]) == accepted < STRANGERS / 2
    assert len(classifier.handle([{"body": b"no image"}], make_context(near_run, 1))) == 1


def test_a_worker_whose_nearness_is_another_does_not_load(near_run: Path, tmp_path: Path) -> None:
    """The golden check covers it."""
    changed = Path(shutil.copytree(near_run, tmp_path / "run"))
    file = changed / "golden" / "golden.json"
    document = json.loads(file.read_text())
    document["nearness"][2] -= 0.01
    file.write_text(json.dumps(document))
    with pytest.raises(GoldenMismatch, match=r"02\.png, class 'nearness': 0\.\d+ instead of"):
        load(changed)


def test_probability_refuses_strangers_without_another_training(own_run: Path) -> None:
    """`known_by: probability` serves any run; nearness is refused where the model does not tell it."""
    file = own_run / "model-config.yaml"
    document = yaml.safe_load(file.read_text())
    for known_by in ("probability", "nearness"):
        document["handler"]["accept"] = {"known": 0.9, "known_by": known_by}
        file.write_text(yaml.safe_dump(document))
        if known_by == "nearness":
            with pytest.raises(SettingsError, match="does not tell how near an image is"):
                load(own_run)
        else:
            scores = Scores.read(own_run / "acceptance.json")
            acceptance = load(own_run).acceptance
            assert acceptance is not None
            assert acceptance.counts(scores)[0] == math.ceil(0.9 * len(scores.right))


def test_a_run_is_measured_on_other_strangers(near_run: Path, unknown: Path, tmp_path: Path) -> None:
    """`train.evaluate --unknown`: two lines, the same in JSON with marks, and one line for a folder that has none."""
    digits = sources.digits().train
    for index in range(30):
        file = tmp_path / "digits" / str(int(digits.labels[index])) / digits.names[index]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(digits.encoded[index])
    shown = invoke(app, near_run, "--data", tmp_path / "digits", "--unknown", unknown).stdout
    assert f"{STRANGERS} strangers: where 95% of 30 known images are accepted, so are " in shown
    assert f" of {STRANGERS} strangers are accepted (95% interval" in shown
    document = json.loads(invoke(app, near_run, "--data", tmp_path / "digits", "--unknown", unknown, "--json").stdout)
    assert document["unknown"]["scores"].keys() == {"probability", "nearness"}
    assert document["accepted"]["coverage"] > 0.5
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    shutil.copy(unknown / "broken.png", tmp_path / "broken")
    for folder, why in (("nowhere", "no folder"), ("none", "no image"), ("broken", "none of the 1 images can be")):
        finished = invoke(app, near_run, "--data", tmp_path / "digits", "--unknown", tmp_path / folder)
        [*_, line] = finished.stderr.splitlines()
        assert (finished.exit_code, why in line) == (1, True), finished.stderr
