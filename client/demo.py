"""A page to try a served model on: drop, paste, photograph or draw an image, and see what the server makes of it.

    python -m client demo lenet5-digits

prints the address of the page. The browser talks to this process and this process to the server, so that no token
leaves it; the page loads nothing from elsewhere, and what was uploaded is deleted when it ends.
"""

from __future__ import annotations

import io
import ipaddress
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from client.command_line import Model, server_of
from client.errors import ClientError, NotAuthorized, PageUnusable
from client.torchserve import Prediction, TorchServe
from system import signals
from system.command_line import complain, reports_errors

if TYPE_CHECKING:
    from PIL import Image

HOST, PORT = "127.0.0.1", 7860
MOST_UPLOAD_BYTES = 6_553_500
"""What a server takes by default (`max_request_size`)."""
_MOST_BODY_BYTES = 2 * MOST_UPLOAD_BYTES
"""Of one request of the page, which may carry a drawing as base64."""
_UPLOADS_LOOKED_AT_S, _UPLOADS_KEPT_S = 60, 600
# Somebody looks at the page and can ask again.
_RETRY_S = 2.0
_SIDE, _BRUSH = 320, 16
_FONT = ("system-ui", "sans-serif")

NOT_ACCEPTED = "\u26a0 NOT ACCEPTED: too unsure, or not an image of these classes."
Shown = tuple[Prediction | None, object, str]
"""The bars, the explanation as a Pillow image, and the line below: times and version, or what went wrong."""
NOTHING: Shown = (None, None, "")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI: lets only the page itself ask, so that no other page of the browser does, and bounds what is sent.

    A page whose name its owner points at this address (DNS rebinding) sends that name as Host, and any other page sends
    its own as Origin. An address as Host cannot be pointed elsewhere.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], host: str) -> None:
        self.app = app
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self.refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refusal
            await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": reason.encode()})

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, or None."""
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 403, "open this page by its address, not by another name"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return 403, "another page may not ask"
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return 411, "say how much is sent"
        if int(length) > _MOST_BODY_BYTES:
            return 413, f"more than {_MOST_BODY_BYTES} bytes"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            ipaddress.ip_address(urlsplit(f"//{host}").hostname or "")
        except ValueError:
            return (
                re.fullmatch(r"([\w.-]+)(:[0-9]+)?", host) is not None and host.partition(":")[0].lower() in self.names
            )
        return True


@reports_errors
def demo(
    context: typer.Context,
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = PORT,
    host: Annotated[
        str, typer.Option(help="Where the page listens. Everyone who reaches it can ask the model without a token.")
    ] = HOST,
) -> None:
    """Open a page to try a served model: drop, paste, photograph or draw an image."""
    server = server_of(context, retry_s=_RETRY_S)
    signals.catch()  # the uploads must go then too
    with tempfile.TemporaryDirectory(prefix="demo-") as temporary:
        uploads = Path(temporary).resolve()
        gradio = import_gradio(uploads)
        launch(gradio, build(gradio, server, model, uploads), host, port)
        print(f"http://{host}:{port}", flush=True)
        threading.Event().wait()


def ask(server: TorchServe, model: str, image: bytes) -> Iterator[Shown]:
    """What the page shows of one image, first without and then with the explanation; errors are shown as well."""
    from PIL import Image  # comes with gradio: the other commands do without both

    try:
        version = _version(server, model)
        name = model.partition("/")[0] if version else model
        started = time.perf_counter()
        answer = server.classify(name, image, version)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    except ClientError as error:
        yield None, None, f"error: {_told(error)}"
        return
    prediction = answer.prediction
    line = f"{elapsed_ms:.1f} ms, {name}" + (f" version {version}" if version else "")
    if answer.accepted is False:
        line = f"{NOT_ACCEPTED} {line}"
    yield prediction, None, line
    try:
        picture = Image.open(io.BytesIO(server.explain_as_png(name, image, version)))
    except ClientError as error:
        yield prediction, None, f"{line}. Not explained: {_told(error)}"
    else:
        yield prediction, picture, line


def _told(error: ClientError) -> str:
    """What the page says of an error; only the terminal names the place of the tokens."""
    if isinstance(error, NotAuthorized):
        complain(error)
        return "the server refuses this page's token; the terminal says why"
    return str(error)


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
    from PIL import ImageOps

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

    with gradio.Blocks(
        title=model, analytics_enabled=False, delete_cache=(_UPLOADS_LOOKED_AT_S, _UPLOADS_KEPT_S)
    ) as blocks:
        gradio.Markdown(f"# {model}")
        with gradio.Row():
            with gradio.Column():
                with gradio.Tab("Image"):
                    image = gradio.Image(label="Drop, paste or choose an image", height=_SIDE, buttons=[])
                with gradio.Tab("Drawing", visible=_reads_drawings(server, model)):
                    pad = gradio.Sketchpad(
                        type="pil", label="Draw", buttons=[], canvas_size=(_SIDE, _SIDE), fixed_canvas=True,
                        layers=False, transforms=(), brush=gradio.Brush(_BRUSH, colors=["#000000"], color_mode="fixed"),
                    )  # fmt: skip
                    light_on_dark = gradio.Checkbox(
                        True, label="Invert: send white strokes on black, as in most data sets of digits"
                    )
                    button = gradio.Button("Classify", variant="primary")
            with gradio.Column():
                classes = gradio.Label(label="Classes")
                line = gradio.Textbox(label="Time and version", lines=2, interactive=False)
                explanation = gradio.Image(show_label=False, height=_SIDE, interactive=False, buttons=[])
                gradio.Markdown("Red regions support the first class, blue regions contradict it.")
        shown = [classes, explanation, line]
        # Without `preprocess` this process neither opens nor changes the image: the server is to judge it.
        image.change(on_image, image, shown, preprocess=False, api_visibility="private")
        button.click(on_drawing, [pad, light_on_dark], shown, api_visibility="private")
    return blocks


def _reads_drawings(server: TorchServe, model: str) -> bool:
    """Whether the model takes grey images, as those of digits do, or does not say what it takes."""
    try:
        return bool(server.describe_worker(model).get("handler", {}).get("channels", 1) == 1)
    except ClientError:  # a client with the inference token alone
        return True


def _version(server: TorchServe, model: str) -> str | None:
    """The version that answers, where the server tells."""
    try:
        return str(server.describe(model)["modelVersion"])
    except ClientError:  # a client with the inference token alone; the prediction reports everything else
        return None


def import_gradio(uploads: Path) -> Any:
    """Raises: PageUnusable: it is not installed."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(uploads), GRADIO_SHARE="false")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # Gradio asks its own address, and nothing else is asked
    try:
        import gradio
    except ImportError:
        raise PageUnusable("the page needs gradio: pip install 'gradio>=6.31'") from None
    return gradio


def launch(gradio: Any, blocks: Any, host: str, port: int) -> None:
    """Raises: PageUnusable: nothing can listen there."""
    middleware = import_module("starlette.middleware").Middleware(Guard, host=host)  # comes with gradio
    theme = gradio.themes.Default(font=_FONT, font_mono=("ui-monospace", "monospace"))
    try:
        blocks.launch(
            server_name=host, server_port=port, theme=theme, prevent_thread_lock=True, quiet=True, share=False,
            footer_links=[], ssr_mode=False, run_history=False, mcp_server=False, enable_monitoring=False,
            max_file_size=MOST_UPLOAD_BYTES, app_kwargs={"middleware": [middleware]},
        )  # fmt: skip
    except OSError:
        raise PageUnusable(f"cannot listen on {host}:{port}; try another --port") from None
