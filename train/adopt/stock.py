"""An archive for TorchServe's own `image_classifier`: its network, and what that very handler answers.

The handler runs in this process, by TorchServe's code and without Java.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import ExifTags, Image

from archive import stock
from archive.stock import StockArchive
from handler.variants import without_torchscript_warning
from networks import weights
from networks.errors import ModelError
from system.errors import reason
from train.adopt import files
from train.adopt.source import Source


def open_archive(mar: Path, run_model_file: bool) -> Source:
    """The network of an archive, with the stock handler's answers.

    Args:
        run_model_file: whether the code in it that builds the network may be run, as TorchServe runs it.

    Raises:
        ArchiveError: it is for another handler, or damaged.
        ModelError: it would run code that nobody has allowed, or the handler cannot load it.
    """
    with tempfile.TemporaryDirectory(prefix="adopt-") as temporary:
        archive = stock.unpack(mar, Path(temporary, "model"))
        serialized = archive.folder / archive.serialized_file
        if archive.model_file is None:
            files.check_data(serialized, ".pt")
        else:
            weights.read(serialized)  # as data: what holds more is refused
            if not run_model_file:
                raise ModelError(
                    f"{mar} builds its network by code of its own, {archive.model_file}, which TorchServe runs: read "
                    f"it (unzip -p {mar} {archive.model_file}), then add --run-model-file"
                )
        handler, context = _initialized(mar, archive)
    about = files.about("stock .mar", mar)
    about |= {"handler": stock.HANDLER, "model_file": archive.model_file, "serialized_file": archive.serialized_file}
    source = Source(handler.model, about, class_names=archive.class_names)
    if archive.model_file is None:
        source.for_export = lambda example: files.program_of(handler.model, example)
    source.answers = lambda images: [_answer(handler, context, data) for data in images]
    return source


def why_other(data: bytes, answered: torch.Tensor | str) -> str:
    """Why the stock handler answers an image otherwise, or not at all."""
    with Image.open(io.BytesIO(data)) as image:
        traits = [f"mode {image.mode}"] if image.mode != "RGB" else []
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            traits.append("turned by its EXIF data, which the stock handler ignores")
        if image.info.get("icc_profile"):
            traits.append("with a colour profile, which the stock handler ignores")
    what = f"the stock handler fails: {answered}" if isinstance(answered, str) else "another answer"
    return f"{what} ({', '.join(traits) or 'plain RGB'})"


def _initialized(mar: Path, archive: StockArchive) -> tuple[Any, Any]:
    """The stock handler with the archive's model in it, as a worker has it, and the context that it is called with."""
    logging.getLogger("ts").setLevel(logging.ERROR)
    module = (archive.model_file or "").partition(".")[0]
    known = sys.modules.pop(module, None)
    sys.path.insert(0, str(archive.folder))
    importlib.invalidate_caches()
    try:
        with without_torchscript_warning(), redirect_stdout(io.StringIO()):
            from ts.context import Context, RequestProcessor
            from ts.torch_handler.image_classifier import ImageClassifier

            metrics = SimpleNamespace(add_time=lambda *_: None)
            context = Context(
                mar.stem, str(archive.folder), archive.manifest, 1, None, "0", metrics=metrics, model_yaml_config={}
            )
            context.request_processor = [RequestProcessor({})]
            handler = ImageClassifier()
            handler.initialize(context)
    except Exception as error:  # the archive's own code runs here
        raise ModelError(f"TorchServe's handler cannot load {mar}: {reason(error)}") from None
    finally:
        sys.path.remove(str(archive.folder))
        sys.modules.pop(module, None)
        if known is not None:
            sys.modules[module] = known
    handler.mapping = None  # so that classes of one name are told apart
    return handler, context


def _answer(handler: Any, context: Any, data: bytes) -> torch.Tensor | str:
    """Probabilities float32[K] by the handler's own `handle`, or what it failed with."""
    try:
        if handler.get_max_result_classes() != (classes := _classes(handler)):
            handler.set_max_result_classes(classes)
        [answered] = handler.handle([{"body": data}], context)
    except Exception as error:  # whatever it raises fails the whole batch of a stock server
        return reason(error)
    return torch.tensor([answered[str(index)] for index in range(len(answered))])


def _classes(handler: Any) -> int:
    """How many the network gives; the handler itself asks for five."""
    with torch.no_grad():
        return int(handler.model(torch.zeros(1, 3, 224, 224)).shape[1])
