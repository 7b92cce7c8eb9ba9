"""A page that shows what `serving.capture` kept, image by image, to be labelled or passed over.

    python -m client label captured --to labelled
    python -m client evaluate lenet5-digits labelled/random

A labelled image moves to `labelled/random/CLASS` or `labelled/unsure/CLASS`, by why it was kept. Only the first is a
fair sample: the accuracy on it is that on what comes in. `python -m train` takes either folder.
"""

from __future__ import annotations

import json
import tempfile
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.demo import HOST, PORT, import_gradio, launch
from client.errors import NotCaptured
from system import files, signals
from system.command_line import reports_errors
from system.printable import counted, printable

if TYPE_CHECKING:
    from PIL import Image

REASONS = ("random", "unsure")
PASSED_OVER = "passed-over"
_SIDE = 480
_MOST_CHOICES = 1000


@dataclass(frozen=True)
class Captured:
    """One image that was kept."""

    image: Path
    prediction: dict[str, float]
    """The best first."""
    why: str

    @property
    def guess(self) -> str | None:
        return next(iter(self.prediction), None)


class Labelling:
    """The images of a folder that nobody has labelled or passed over.

    Raises:
        NotCaptured: it holds none.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self._folder, self._target = folder, target
        if not self.waiting():
            raise NotCaptured(f"{folder} holds nothing to label: name the folder of serving.capture")

    def waiting(self) -> list[Captured]:
        """In the order in which they came."""
        found = (_read(answer) for answer in sorted(self._folder.glob("*.json")))
        return [captured for captured in found if captured is not None]

    def classes(self) -> list[str]:
        """What the model answered, and what somebody has said."""
        said = {entry.name for why in REASONS for entry in (self._target / why).glob("*") if entry.is_dir()}
        answered = {name for captured in self.waiting() for name in captured.prediction}
        return sorted(said | answered)[:_MOST_CHOICES]

    def label(self, captured: Captured, name: str) -> None:
        """Raises:
        NotCaptured: no folder could be called so.
        """
        if not name or name.startswith(".") or "/" in name or "\\" in name or printable(name) != name:
            raise NotCaptured(f"{printable(name)!r} cannot be a class: it is the name of a folder")
        self._move(captured, self._target / captured.why / name)

    def pass_over(self, captured: Captured) -> None:
        """Put it aside, into a folder beside the others."""
        self._move(captured, self._folder / PASSED_OVER)

    def _move(self, captured: Captured, place: Path) -> None:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write(place / captured.image.name, captured.image.read_bytes(), 0o600)
        captured.image.with_name(f"{captured.image.name}.json").unlink()
        captured.image.unlink()


def _read(answer: Path) -> Captured | None:
    """None where a file is no answer, or its image is gone."""
    image = answer.with_suffix("")
    try:
        document = json.loads(answer.read_text(encoding="utf-8"))
        prediction = {str(name): float(value) for name, value in document["prediction"].items()}
        return Captured(image, prediction, document["why"]) if document["why"] in REASONS and image.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@reports_errors
def label(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of serving.capture.")],
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="Gets a folder for each class.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = PORT,
    host: Annotated[str, typer.Option(help="Where the page listens. Everyone who reaches it sees the images.")] = HOST,
) -> None:
    """Open a page to label the images that a server kept (serving.capture), or to pass them over."""
    signals.catch()
    labelling = Labelling(folder, target)
    with tempfile.TemporaryDirectory(prefix="label-") as temporary:
        gradio = import_gradio(Path(temporary).resolve())
        launch(gradio, build(gradio, labelling), host, port)
        print(f"http://{host}:{port}", flush=True)
        threading.Event().wait()


def build(gradio: Any, labelling: Labelling) -> Any:
    """The page as Gradio's Blocks."""

    def show(said: str = "") -> tuple[Any, ...]:
        waiting = labelling.waiting()
        if not waiting:
            return None, {}, gradio.update(value=None), "", said or "Nothing is left to label."
        first = waiting[0]
        choices = gradio.update(choices=labelling.classes(), value=first.guess)
        line = said or f"{counted(len(waiting), 'image')} left; this one was kept as {first.why}"
        return _picture(first.image), first.prediction, choices, first.image.name, line

    def act(is_labelled: bool, name: str, chosen: str | None) -> tuple[Any, ...]:
        current = next((each for each in labelling.waiting() if each.image.name == name), None)
        try:
            if current is not None and is_labelled:
                labelling.label(current, (chosen or "").strip())
            elif current is not None:
                labelling.pass_over(current)
        except (NotCaptured, OSError) as error:
            return show(f"error: {error}")
        return show()

    with gradio.Blocks(title="Label", analytics_enabled=False) as blocks:
        name = gradio.State("")
        with gradio.Row():
            image = gradio.Image(label="Image", type="pil", format="png", height=_SIDE, interactive=False, buttons=[])
            with gradio.Column():
                answered = gradio.Label(label="What the model answered")
                with gradio.Row():
                    labelled = gradio.Button("Label", variant="primary")
                    passed = gradio.Button("Pass over")
                line = gradio.Textbox(label="State", interactive=False)
                # Its list covers what lies below it.
                chosen = gradio.Dropdown(label="Class", allow_custom_value=True, choices=[])
        shown = [image, answered, chosen, name, line]
        blocks.load(show, None, shown, api_visibility="private")
        labelled.click(partial(act, True), [name, chosen], shown, api_visibility="private")
        passed.click(partial(act, False), [name, chosen], shown, api_visibility="private")
    return blocks


def _picture(file: Path) -> Image.Image | None:
    """So large as the page shows it; None where this environment cannot read it."""
    from PIL import Image, ImageOps  # comes with gradio

    try:
        with Image.open(file) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGB")
            is_small = max(upright.size) < _SIDE
            return ImageOps.contain(
                upright, (_SIDE, _SIDE), Image.Resampling.NEAREST if is_small else Image.Resampling.BICUBIC
            )
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
