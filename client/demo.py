"""A page to try a served model on: drop, paste, photograph or draw an image, and see what the server makes of it.

    python -m client demo lenet5-digits

prints the address of the page. The browser talks to this process and this process to the server, so that no token
leaves it; the page loads nothing from elsewhere, and what was uploaded is deleted when it ends.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageOps

from client import interrupts
from client.command_line import Model, reports_errors, server_of
from client.errors import ClientError, PageUnusable
from client.torchserve import Prediction, TorchServe

HOST, PORT = "127.0.0.1", 7860
# Somebody looks at the page and can ask again.
_RETRY_S = 2.0
_SIDE, _BRUSH = 320, 16
_FONT = ("system-ui", "sans-serif")

Shown = tuple[Prediction | None, Image.Image | None, str]
"""The bars, the picture of the explanation, and the line below: times and version, or what went wrong."""
NOTHING: Shown = (None, None, "")


@reports_errors
def demo(
    context: typer.Context,
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = PORT,
    host: Annotated[
        str, typer.Option(help="Where the page listens. Whoever reaches it may ask the model, without a token.")
    ] = HOST,
) -> None:
    """Serve a page that shows what a model makes of an image."""
    server = server_of(context, retry_s=_RETRY_S)
    interrupts.catch()  # the uploads must go then too
    with tempfile.TemporaryDirectory(prefix="demo-") as temporary:
        uploads = Path(temporary).resolve()
        gradio = _import_gradio(uploads)
        _launch(gradio, build(gradio, server, model, uploads), host, port)
        print(f"http://{host}:{port}", flush=True)
        threading.Event().wait()


def ask(server: TorchServe, model: str, image: bytes) -> Iterator[Shown]:
    """What the page shows of one image, first without and then with the explanation; errors are shown as well."""
    try:
        version = _version(server, model)
        name = model.partition("/")[0] if version else model
        started = time.perf_counter()
        prediction = server.predict(name, image, version)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    except ClientError as error:
        yield None, None, f"error: {error}"
        return
    line = f"{elapsed_ms:.1f} ms, {name}" + (f" version {version}" if version else "")
    yield prediction, None, line
    try:
        picture = Image.open(io.BytesIO(server.explain_as_png(name, image, version)))
    except ClientError as error:
        yield prediction, None, f"{line}. Not explained: {error}"
    else:
        yield prediction, picture, line


def read_upload(payload: Mapping[str, Any], uploads: Path) -> bytes:
    """The bytes of an uploaded file as they came.

    Raises:
        PageUnusable: the browser names a file that was not uploaded.
    """
    path = Path(payload["path"]).resolve()
    if not path.is_relative_to(uploads):
        raise PageUnusable("only what was uploaded is sent: choose the image again")
    return path.read_bytes()


def encode_drawing(drawing: Image.Image, light_on_dark: bool) -> bytes:
    """Dark strokes on white as PNG, or the other way round."""
    opaque = drawing.convert("RGB")
    buffer = io.BytesIO()
    (ImageOps.invert(opaque) if light_on_dark else opaque).save(buffer, "PNG")
    return buffer.getvalue()


def build(gradio: Any, server: TorchServe, model: str, uploads: Path) -> Any:
    """The page as Gradio's Blocks; `uploads` is where it stores what the browser sends."""

    def on_image(payload: Mapping[str, Any] | None) -> Iterator[Shown]:
        try:
            yield from ask(server, model, read_upload(payload, uploads)) if payload else [NOTHING]
        except PageUnusable as error:
            yield None, None, f"error: {error}"

    def on_drawing(layers: Mapping[str, Any] | None, light_on_dark: bool) -> Iterator[Shown]:
        drawing = layers["composite"] if layers else None
        yield from ask(server, model, encode_drawing(drawing, light_on_dark)) if drawing else [NOTHING]

    with gradio.Blocks(title=model, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {model}")
        with gradio.Row():
            with gradio.Column():
                with gradio.Tab("Image"):
                    image = gradio.Image(label="Drop, paste or choose an image", height=_SIDE, buttons=[])
                with gradio.Tab("Drawing"):
                    pad = gradio.Sketchpad(
                        type="pil", label="Draw", buttons=[], canvas_size=(_SIDE, _SIDE), fixed_canvas=True,
                        layers=False, transforms=(), brush=gradio.Brush(_BRUSH, colors=["#000000"], color_mode="fixed"),
                    )  # fmt: skip
                    light_on_dark = gradio.Checkbox(
                        True, label="Send it light on dark, as most data sets of digits are"
                    )
                    button = gradio.Button("Classify", variant="primary")
            with gradio.Column():
                classes = gradio.Label(label="Classes")
                line = gradio.Textbox(label="Answer", lines=2, interactive=False)
                explanation = gradio.Image(
                    label="Red spoke for the first class, blue against it", height=_SIDE, interactive=False, buttons=[]
                )
        shown = [classes, explanation, line]
        # Without `preprocess` this process neither opens nor changes the image: the server is to judge it.
        image.change(on_image, image, shown, preprocess=False, api_visibility="private")
        button.click(on_drawing, [pad, light_on_dark], shown, api_visibility="private")
    return blocks


def _version(server: TorchServe, model: str) -> str | None:
    """The version that answers, where the server tells."""
    try:
        return str(server.describe(model)["modelVersion"])
    except ClientError:  # who may only predict cannot ask; whatever else is wrong, the prediction will say
        return None


def _import_gradio(uploads: Path) -> Any:
    """Raises: PageUnusable: it is not installed."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(uploads), GRADIO_SHARE="false")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # Gradio asks its own address, and nothing else is asked
    try:
        import gradio
    except ImportError:
        raise PageUnusable("the page needs gradio: pip install 'gradio>=6.31'") from None
    return gradio


def _launch(gradio: Any, blocks: Any, host: str, port: int) -> None:
    """Raises: PageUnusable: nothing can listen there."""
    theme = gradio.themes.Default(font=_FONT, font_mono=("ui-monospace", "monospace"))
    try:
        blocks.launch(
            server_name=host, server_port=port, theme=theme, prevent_thread_lock=True, quiet=True, share=False,
            footer_links=[], ssr_mode=False, run_history=False, mcp_server=False, enable_monitoring=False,
        )  # fmt: skip
    except OSError:
        raise PageUnusable(f"cannot listen on {host}:{port}; try another --port") from None
