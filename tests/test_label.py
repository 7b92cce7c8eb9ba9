"""What a server kept is labelled on a page, and becomes a folder that `evaluate` and training read."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from client.errors import NotCaptured
from client.label import Labelling
from system import labelled_folder
from tests.conftest import ROOT, free_ports

PATIENCE_MS = 60_000


@pytest.fixture
def captured(run: Path, tmp_path: Path) -> Path:
    """Four images as a worker keeps them, and files that are none."""
    folder = tmp_path / "captured"
    folder.mkdir()
    for number, image in enumerate(sorted((run / "golden").glob("*.png"))[:4]):
        name = f"179000000000{number}-{'0' * 32}-0"
        (folder / name).write_bytes(image.read_bytes())
        why = "unsure" if number % 2 else "random"
        (folder / f"{name}.json").write_text(json.dumps({"why": why, "prediction": {"7": 0.6, "1": 0.4}}))
    for name, content in (
        ("gone.json", '{"why": "random", "prediction": {}}'),
        ("broken.json", "{"),
        ("list.json", "[]"),
        (".x.partial-1", ""),
    ):
        (folder / name).write_text(content)
    return folder


def test_what_is_labelled_is_a_folder_to_evaluate_on(captured: Path, tmp_path: Path) -> None:
    """By why it was kept, privately, and gone from where it was; what is passed over is in neither."""
    labelling = Labelling(captured, tmp_path / "labelled")
    first, second, third, fourth = labelling.waiting()
    assert labelling.classes() == ["1", "7"]
    labelling.label(first, "7")
    labelling.label(second, "nine")
    labelling.pass_over(third)
    assert [each.image for each in labelling.waiting()] == [fourth.image]
    assert labelling.classes() == ["1", "7", "nine"]
    found = labelled_folder.read(tmp_path / "labelled" / "random")
    assert [(file.name, name) for file, name in found.images] == [(first.image.name, "7")]
    assert found.left_out == []
    assert [name for _, name in labelled_folder.read(tmp_path / "labelled" / "unsure").images] == ["nine"]
    [file] = (tmp_path / "labelled" / "random" / "7").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not first.image.exists()
    assert (captured / "passed-over" / third.image.name).exists()


@pytest.mark.parametrize("name", ["", ".hidden", "../above", "a/b", "a\\b", "a\nb", "\x1b[2J"])
def test_a_class_is_the_name_of_a_folder(captured: Path, tmp_path: Path, name: str) -> None:
    """Anything else is refused, and the image stays."""
    labelling = Labelling(captured, tmp_path / "labelled")
    with pytest.raises(NotCaptured, match="cannot be a class"):
        labelling.label(labelling.waiting()[0], name)
    assert len(labelling.waiting()) == 4


def test_a_folder_without_captures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotCaptured, match=r"serving\.capture"):
        Labelling(tmp_path, tmp_path / "labelled")


@pytest.mark.process
@pytest.mark.skipif(find_spec("gradio") is None, reason="the package gradio is not installed")
def test_the_page_goes_from_one_to_the_next(browser: Browser, captured: Path, tmp_path: Path) -> None:
    """With the model's answer; what is no class is an error on the page, and the image stays."""
    port = free_ports()
    target = tmp_path / "labelled"
    command = [sys.executable, "-m", "client", "label", str(captured), "--to", str(target), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address == f"http://127.0.0.1:{port}"
            tab = browser.new_page()
            tab.goto(address)
            expect_state(tab, "4 images left; this one was kept as random")
            tab.wait_for_function("[...document.images].some(image => image.naturalWidth == 480)", timeout=PATIENCE_MS)
            tab.get_by_label("Class").fill("a/b")
            tab.get_by_label("Class").press("Tab")
            tab.get_by_role("button", name="Label").click()
            expect_state(tab, "error: 'a/b' cannot be a class: it is the name of a folder")
            tab.get_by_role("button", name="Label").click()
            expect_state(tab, "3 images left; this one was kept as unsure")
            for left in ("2 images left; this one was kept as random", "1 image left; this one was kept as unsure"):
                tab.get_by_role("button", name="Pass over").click()
                expect_state(tab, left)
            tab.get_by_role("button", name="Label").click()
            expect_state(tab, "Nothing is left to label.")
            tab.close()
        finally:
            process.terminate()
            process.wait(timeout=60)
    assert sorted(file.parent.relative_to(target).as_posix() for file in target.glob("*/*/*")) == [
        "random/7",
        "unsure/7",
    ]


def expect_state(tab: Page, state: str) -> None:
    expect(tab.get_by_label("State")).to_have_value(state, timeout=PATIENCE_MS)


def test_kept_while_labelled(captured: Path, tmp_path: Path) -> None:
    """What a worker adds meanwhile is shown, and one label of two at once is an error or none."""
    labelling = Labelling(captured, tmp_path / "labelled")
    first = labelling.waiting()[0]
    failed: list[BaseException] = []

    def label() -> None:
        try:
            labelling.label(first, "7")
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=label) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) <= 1
    assert [file.name for file in (tmp_path / "labelled" / "random" / "7").iterdir()] == [first.image.name]
    assert len(labelling.waiting()) == 3
