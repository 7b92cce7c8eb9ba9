"""The report: one page that holds everything, says what `metrics.json` says, and looks right in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser

from archive.run_folder import RunFolder
from dataset.labelled_images import LabelledImages
from measure.report import THUMBNAIL_SIDE, percent, write_report
from system import figures
from tests.conftest import LAPTOP, MODEL, PHONE
from tests.images import encode, gradient
from train import recipe

SECTIONS = [
    "figures", "training", "confusion", "classes", "calibration", "selective", "mistakes", "samples",
    "recipe", "provenance", "serving",
]  # fmt: skip
IMAGES_FROM = {"train": 30, "val": 3, "test": 8}
HOSTILE = "<b onload=\"alert('x')\">&\"' {{ name }}"


def measure(probabilities: torch.Tensor, labels: torch.Tensor, names: list[str]) -> dict[str, Any]:
    """A `metrics.json` for float32[N,K] and int64[N], with an invented history."""
    classes, (confidence, guess) = len(names), probabilities.max(1)
    sharper = (probabilities.log() * 1.6).softmax(1).max(1).values
    right = (guess == labels).tolist()
    history = [
        {
            "epoch": epoch, "loss": 2.3 * 0.8**epoch + 0.02, "acc1": 1 - 0.7 * 0.8**epoch,
            "val_loss": 2.2 * 0.78**epoch + 0.05 + 0.003 * epoch, "val_acc1": 0.97 - 0.6 * 0.75**epoch,
            "learning_rate": 0.01, "images_per_s": 9000.0 + epoch,
        }
        for epoch in range(1, 21)
    ]  # fmt: skip
    return {
        "test": {
            **figures.measure(names, labels.tolist(), guess.tolist(), confidence.tolist()),
            "ece": 0.0123,
            "acc5": float((probabilities.topk(min(5, classes)).indices == labels[:, None]).any(1).double().mean()),
            "nll": 0.03,
            "ece_uncalibrated": 0.0345,
            "reliability_uncalibrated": figures.reliability_bins(sharper.tolist(), right),
        },
        "calibration": {"temperature": 1.6, "images": 144, "mistakes": 12, "fitted": True, "least_mistakes": 10},
        "history": history,
        "kept_epoch": 18,
        "data": {
            "train": 1293,
            "val": 144,
            "test": len(labels),
            "folds": 0,
            "skipped": ["ants/broken.jpg: truncated"],
            "classes": {split: [first + index for index in range(len(names))] for split, first in IMAGES_FROM.items()},
        },
        "export": {"max_abs_difference": 1e-7},
    }


def images(count: int, classes: int, side: int = 8) -> tuple[LabelledImages, torch.Tensor]:
    """Pictures of turning labels, and float32[N,K] that is mostly right about them."""
    labels = torch.arange(count) % classes
    logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(count), labels] += 2.5
    encoded = encode(gradient(side, side), "PNG" if side < 100 else "JPEG")
    names = [f"image-{number:04d}.png" for number in range(count)]
    return LabelledImages(names, [encoded] * count, labels), logits.softmax(1)


def write_run(
    folder: Path,
    class_names: list[str],
    test: LabelledImages,
    probabilities: torch.Tensor,
    metrics: dict[str, Any],
    *,
    name: str = "a-run",
    root: str | None = None,
) -> str:
    """Write the report into `folder` as training does, of a recipe for the data in `root`, and return its HTML."""
    folder.mkdir(parents=True)
    run, chosen = RunFolder(folder), recipe.load(MODEL)
    run.model.write_bytes(bytes(272_383))
    write_report(
        run,
        test,
        probabilities,
        name=name,
        recipe=chosen.model_copy(update={"data": chosen.data.model_copy(update={"root": root})}),
        class_names=class_names,
        metrics=metrics,
        provenance={"seed": 0, "code": {"commit": "0" * 40, "clean": None}, "duration_s": 9.5},
        golden_image="an image.png",
    )
    return run.report.read_text()


def report(folder: Path, class_names: list[str], side: int = 8) -> tuple[str, dict[str, Any]]:
    """The report on twelve images of each class, and its metrics."""
    test, probabilities = images(12 * len(class_names), len(class_names), side)
    metrics = measure(probabilities, test.labels, class_names)
    return write_run(folder, class_names, test, probabilities, metrics), metrics


class Elements(HTMLParser):
    """Every element of a page with its attributes, and all of its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


def without_bdi(page: str) -> str:
    """Without the marks around the names of classes."""
    return re.sub("</?bdi>", "", page)


DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return report(tmp_path_factory.mktemp("report") / "run", DIGITS)


def test_the_page_holds_everything_itself(digits: tuple[str, dict[str, Any]]) -> None:
    """No source, link or style leads out of the file, it has no script, and its policy forbids both."""
    page = Elements(digits[0])
    links = page.having("src") + page.having("href") + re.findall(r"url\(([^)]*)", digits[0])
    assert len(links) > 8
    assert {link.partition(":")[0] for link in links} == {"data"}
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.having("content")


def test_every_section_is_there_in_order(digits: tuple[str, dict[str, Any]]) -> None:
    """Figures, curves, confusion, classes, calibration, pictures, recipe, provenance and serving follow each other."""
    page = Elements(digits[0])
    assert page.having("id") == SECTIONS
    assert page.text.count("a-run") >= 3
    for command in (
        "scripts/archive.sh runs/a-run", "scripts/serve.sh",
        "python -m client predict a-run 'runs/a-run/golden/an image.png'",
    ):  # fmt: skip
        assert command in page.text


def test_figures_are_those_of_the_metrics(digits: tuple[str, dict[str, Any]]) -> None:
    """Accuracy, top-5, worst class, calibration error, images and size stand in the page as measured."""
    page, metrics = digits
    tiles = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)<div class=\"note\">([^<]*)", without_bdi(page))
    test = metrics["test"]
    assert [(label, value) for label, value, _ in tiles] == [
        ("Accuracy", f"{test['acc1']:.2%}"),
        ("Top-5 accuracy", f"{test['acc5']:.2%}"),
        ("Worst class", f"{test['worst_class']['acc1']:.1%}"),
        ("Calibration error", "1.23%"),
        ("Held-out images", "120"),
        ("Model size", "272 kB"),
    ]
    ends = test["acc1_interval"]
    assert tiles[0][2] == f"95% interval {ends['lower'] * 100:.1f}–{ends['upper']:.1%}"
    worst = test["worst_class"]
    assert tiles[2][2].startswith(f"{worst['name']}, of {worst['images']}: 95% interval ")
    alike = f"accuracy is {test['balanced_acc1']:.1%} and the mean F1 score {test['macro_f1']:.1%}."
    assert alike in page
    cells = re.findall(r"<td [^>]*title=\"[^\"]* taken for [^\"]*\">(\d*)</td>", page)
    assert [int(cell or 0) for cell in cells] == [count for row in test["confusion"] for count in row]


def test_pictures_are_small_and_described(tmp_path: Path) -> None:
    """Photographs shrink to thumbnails, tiny images stay as they are and are enlarged crisply; all have a text."""
    for side, crisp, expected in ((8, True, 8), (500, False, THUMBNAIL_SIDE)):
        page = Elements(report(tmp_path / str(side), ["ant", "bee"], side)[0])
        pictures = [attributes for tag, attributes in page.elements if tag == "img"]
        assert len(pictures) >= 8
        for picture in pictures:
            assert (picture.get("class") == "crisp") == crisp
            assert re.fullmatch(
                r"image-\d+\.png: this is “(ant|bee)”, the model says “(ant|bee)” with .*%", picture["alt"] or ""
            )
            data = (picture["src"] or "").partition("base64,")[2]
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (expected, expected)


def test_mistakes_are_the_surest_ones(digits: tuple[str, dict[str, Any]]) -> None:
    """The pictures of mistakes are the twelve that the model was surest of, in falling order, guess beside truth."""
    test, probabilities = images(120, 10)
    confidence, guess = probabilities.max(1)
    wrong = [index for index in confidence.argsort(descending=True).tolist() if guess[index] != test.labels[index]]
    assert len(wrong) > 12
    section = without_bdi(digits[0]).partition('id="mistakes"')[2].partition("</section>")[0]
    shown = re.findall(
        r"guess<span>([^<]*)</span></dt><dd class=\"guess\">(\d).*?<dd class=\"truth\">(\d)", section, re.DOTALL
    )
    expected = [(percent(float(confidence[i])), str(int(guess[i])), str(int(test.labels[i]))) for i in wrong[:12]]
    assert shown == expected
    assert re.findall(r'class="file">([^<]*)', section) == [test.names[index] for index in wrong[:12]]


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    """Class, file and run names, recipe and skipped files come out as the text that they are."""
    test, probabilities = images(24, 2)
    test = LabelledImages([HOSTILE] * 24, test.encoded, test.labels)
    metrics = measure(probabilities, test.labels, [HOSTILE, "bee"])
    metrics["data"]["skipped"] = [HOSTILE]
    content = write_run(tmp_path / "run", [HOSTILE, "bee"], test, probabilities, metrics, name=HOSTILE, root=HOSTILE)
    page = Elements(content)
    assert "b" not in {tag for tag, _ in page.elements}
    assert page.having("onload") == []
    assert page.text.count(HOSTILE) > 10
    assert any(HOSTILE in alt for alt in page.having("alt"))


def test_a_run_without_validation(digits: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Null validation figures leave one curve; without a temperature to fit there is one reliability diagram."""
    metrics = json.loads(json.dumps(digits[1]))
    for epoch in metrics["history"]:
        epoch.update(val_loss=None, val_acc1=None)
    metrics["calibration"] = {"temperature": 1.0, "images": 0, "mistakes": 0, "fitted": False, "least_mistakes": 10}
    test, probabilities = images(120, 10)
    page = write_run(tmp_path / "run", DIGITS, test, probabilities, metrics)
    assert (digits[0].count("<polyline"), page.count("<polyline")) == (5, 3)
    assert (digits[0].count("<svg"), page.count("<svg")) == (5, 4)
    assert (digits[0].count("ECE, from 3.45%"), page.count("ECE, from")) == (1, 0)
    assert "there are no validation images to fit it to" in page


def test_a_calibration_that_got_worse_is_called_so(digits: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The page says which of the two errors is the larger, whatever the temperature was fitted for."""
    metrics = json.loads(json.dumps(digits[1]))
    metrics["test"].update(ece=0.0240, ece_uncalibrated=0.0170)
    page = write_run(tmp_path / "run", DIGITS, *images(120, 10), metrics)
    assert "worse than the 1.70% before the temperature 1.60" in page
    assert "better than the 3.45% before the temperature 1.60" in digits[0]


def test_a_loss_that_overflowed_is_left_out(digits: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Epochs without a finite loss, as 16 bits may give where weights are still good, have an accuracy alone."""
    metrics = json.loads(json.dumps(digits[1]))
    for epoch in metrics["history"]:
        epoch.update(loss=float("inf"), val_loss=float("nan"))
    test, probabilities = images(120, 10)
    page = write_run(tmp_path / "run", DIGITS, test, probabilities, metrics)
    assert Elements(page).having("id") == SECTIONS
    assert (digits[0].count("<polyline"), page.count("<polyline")) == (5, 3)
    assert (digits[0].count("<h3>Loss</h3>"), page.count("<h3>Loss</h3>")) == (1, 0)


def test_a_hundred_classes_stay_readable(tmp_path: Path) -> None:
    """The matrix becomes a picture beside the most confused pairs, and of the bars only both ends are shown."""
    page, metrics = report(tmp_path / "run", [f"class {number}" for number in range(100)])
    assert 'class="matrix"' not in page
    assert page.count('<span class="count">') == 20
    assert "80 classes between" in page
    pairs = re.findall(
        r"<tr><td>class (\d+)</td><td>class (\d+)</td><td class=\"number\">(\d+)</td>", without_bdi(page)
    )
    confusion = torch.tensor(metrics["test"]["confusion"])
    assert [int(confusion[int(truth), int(guess)]) for truth, guess, _ in pairs] == [int(count) for *_, count in pairs]
    most = (confusion - confusion.diag().diag()).flatten().topk(12).values.tolist()
    assert [int(count) for *_, count in pairs] == most


@pytest.mark.parametrize(
    ("share", "text"), [(1, "100%"), (0.9999, ">99.9%"), (0.5, "50.0%"), (0.0001, "<0.1%"), (0, "0%")]
)
def test_only_certainty_reads_as_certain(share: float, text: str) -> None:
    """A share is never rounded to all or nothing."""
    assert percent(share) == text


def problems(
    browser: Browser, page: Path, size: tuple[int, int], scheme: Literal["light", "dark"], screenshot: Path
) -> list[str]:
    """What a reader would find broken, with a screenshot to see it by."""
    found: list[str] = []
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    try:
        tab = context.new_page()
        tab.on("console", lambda message: found.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: found.append(f"script: {error}"))
        tab.on("requestfailed", lambda request: found.append(f"request: {request.url}"))
        tab.goto(page.as_uri(), wait_until="load")
        wide = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        if wide[0] > wide[1]:
            found.append(f"overflow: {wide[0]} pixels in a window of {wide[1]}")
        undecoded = tab.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.alt)")
        found.extend(f"image: {alt}" for alt in undecoded)
        tab.screenshot(path=screenshot, full_page=True)
    finally:
        context.close()
    return found


@pytest.mark.process
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize(
    "class_names", [DIGITS, [f"{HOSTILE} {number}" for number in range(20)], [f"class {n}" for n in range(100)]],
    ids=["10", "20 long", "100"],
)  # fmt: skip
def test_it_looks_right(
    browser: Browser, tmp_path: Path, class_names: list[str], size: tuple[int, int], scheme: Literal["light", "dark"]
) -> None:
    """On a laptop and a phone, light and dark: no error, no failed request, no overflow, every picture decoded."""
    report(tmp_path / "run", class_names)
    screenshot = tmp_path / "report.png"
    assert problems(browser, tmp_path / "run" / "report.html", size, scheme, screenshot) == []
    with Image.open(screenshot) as seen:
        assert seen.width == size[0]


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("script", "style-src", "script-src 'unsafe-inline'; style-src"),
        ("overflow", "<h1>", "<h1 style='width: 2000px'>"),
        ("image", 'src="data:image/png;base64,', 'src="data:image/png;base64,AAAA'),
        ("console", 'src="data:image/png;base64,', 'src="https://localhost/'),
        ("request", "img-src data:", "img-src data: file:"),
    ],
)
def test_a_broken_page_is_noticed(
    browser: Browser, digits: tuple[str, dict[str, Any]], tmp_path: Path, kind: str, old: str, new: str
) -> None:
    """The checks above fail on a script error, a too wide element, a broken image and a load from elsewhere."""
    broken = digits[0].replace(old, new, 1)
    broken = broken.replace(
        "</body>", {"script": "<script>nothing()</script>", "request": "<img src='none.png'>"}.get(kind, "")
    )
    assert broken != digits[0]
    (tmp_path / "broken.html").write_text(broken)
    found = problems(browser, tmp_path / "broken.html", PHONE, "light", tmp_path / "broken.png")
    assert kind in {problem.partition(":")[0] for problem in found}


def test_what_is_accepted_and_what_slips_through_is_shown(digits: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Thresholds with what they keep, and strangers beside known images by each score; else neither."""
    metrics, share = json.loads(json.dumps(digits[1])), {"share": 0.11, "share_interval": {"lower": 0.05, "upper": 0.2}}
    histogram = {"edges": [0, 0.25, 0.5, 1], "known": [0.0, 0.1, 0.9], "strangers": [0.7, 0.2, 0.1]}
    score = {
        "auroc": 0.912, "auroc_interval": {"lower": 0.88, "upper": 0.94}, "accepted_at_95": share,
        "histogram": histogram,
    }  # fmt: skip
    metrics["accept"] = {
        "thresholds": {"probability": 0.8123, "nearness": None},
        "test": figures.selected(120, [True] * 99 + [False]),
    }
    metrics["unknown"] = {
        "images": 70, "known_images": 120, "accepted": share, "scores": {"probability": score, "nearness": score},
    }  # fmt: skip
    page = write_run(tmp_path / "run", DIGITS, *images(120, 10), metrics)
    expected = list(SECTIONS)
    expected.insert(SECTIONS.index("selective") + 1, "unknown")
    assert Elements(page).having("id") == expected
    for text in (
        "Least probability",
        "0.8123",
        "83.3%, 95% interval",
        "1.00%, 95% interval",
        "70 images of none",
        "0.912",
    ):
        assert text in page
    assert "Least nearness" not in page
    assert (page.count('<i class="strangers">'), page.count("<polyline") - digits[0].count("<polyline")) == (2, 4)
    assert "No answer is marked" in digits[0]
    metrics["accept"], metrics["unknown"] = {"unattainable": "cannot be reached"}, None
    assert "cannot be reached" in write_run(tmp_path / "none", DIGITS, *images(120, 10), metrics)
