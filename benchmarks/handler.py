"""How fast the handler is, in process: its own cost, stage by stage, its variants, and decoding of large photographs.

    python -m benchmarks.handler overhead runs/lenet5-digits
    python -m benchmarks.handler stages runs/lenet5-digits --batch-size 32
    python -m benchmarks.handler variants runs/resnet-cifar10
    python -m benchmarks.handler jpeg --images PHOTOGRAPHS --weights FILE

print tables; figures are medians of interleaved rounds, so that ratios hold on a busy machine.
"""

from __future__ import annotations

import io
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import torch
import typer
from PIL import Image
from rich.progress import track
from ts.context import Context, RequestProcessor
from ts.protocol import otf_message_handler
from ts.service import Service

from archive.run_folder import RunFolder
from benchmarks.command_line import Run
from benchmarks.errors import BenchmarkError
from benchmarks.rounds import interleaved, spread
from handler.decoding import decode, fit
from handler.image_classifier import ImageClassifier
from handler.settings import HandlerSettings
from handler.variants import load_torchscript, loaders, without_torchscript_warning
from networks import models
from networks.section import ModelSection
from system.command_line import reports_errors
from train import recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
LARGE_PHOTOGRAPH = (4000, 3000)
STAGES = ("read the requests", "decode", "forward", "answer", "write the answers")
IMAGENET_INPUT = HandlerSettings(channels=3, resize_size=256, crop_size=224, interpolation="bicubic")


@app.callback()
def main(context: typer.Context) -> None:
    """Measure the handler without a server."""
    context.with_resource(without_torchscript_warning())
    torch.set_num_threads(1)


@app.command()
def overhead(run: Run, batch_size: int = 8, rounds: int = 50) -> None:
    """A batch through `handle`, bytes to answer, against decoding and forward alone."""
    classifier = _worker(run)
    images = RunFolder(run).read_golden_images()
    batch = [images[index % len(images)] for index in range(batch_size)]

    context = _context(run)

    def handle() -> None:
        context.request_processor = [RequestProcessor({"host": "localhost", "accept": "*/*"}) for _ in batch]
        context.request_ids = {index: str(index) for index in range(batch_size)}
        classifier.handle([{"body": bytearray(image)} for image in batch], context)

    def bare() -> None:
        tensors = [decode(image, classifier.settings) for image in batch]
        with torch.inference_mode():
            classifier.variant.predict(torch.stack(tensors))

    seconds = interleaved({"handle": handle, "bare": bare}, rounds)
    for name, values in seconds.items():
        print(f"{name:8} ms a batch of {batch_size}  {spread([1e3 * value for value in values])}")
    pairs = list(zip(seconds["handle"], seconds["bare"], strict=True))
    print(f"handle / bare               {spread([whole / part for whole, part in pairs])}")
    print(f"handle - bare, µs a request {spread([1e6 * (whole - part) / batch_size for whole, part in pairs])}")


@app.command()
def stages(run: Run, batch_size: int = 8, rounds: int = 200) -> None:
    """A batch's way through a worker, by TorchServe's own code as well: microseconds of a request in each stage."""
    classifier, context = _worker(run), _context(run)
    message = as_sent(list(islice(cycle(RunFolder(run).read_golden_images()), batch_size)))
    microseconds: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "all")}
    frontend, worker = socket.socketpair()
    with closing(frontend), closing(worker), ThreadPoolExecutor(1) as sender:
        for _ in range(rounds):
            sending = sender.submit(frontend.sendall, message)
            times = [time.perf_counter()]
            _, batch = otf_message_handler.retrieve_msg(worker)
            context.request_processor, data, context.request_ids = Service.retrieve_data_for_inference(batch)
            times.append(time.perf_counter())
            requests = classifier.preprocess(data, context)
            times.append(time.perf_counter())
            answered = classifier.inference([image for request in requests for image in request.tensors])
            times.append(time.perf_counter())
            predictions = classifier.label(requests, answered[:, : len(classifier.class_names)])
            marks = classifier.mark(requests, answered)
            answers = [classifier.answer(*each) for each in zip(requests, predictions, marks, strict=True)]
            bodies = classifier.postprocess(answers, context)
            times.append(time.perf_counter())
            otf_message_handler.create_predict_response(bodies, context.request_ids, "", 200, context)
            times.append(time.perf_counter())
            sending.result()
            for stage, (began, ended) in zip(STAGES, pairwise(times), strict=True):
                microseconds[stage].append(1e6 * (ended - began) / batch_size)
            microseconds["all"].append(1e6 * (times[-1] - times[0]) / batch_size)
    print(f"µs a request, in batches of {batch_size}")
    for stage, values in microseconds.items():
        print(f"  {stage:18} {spread(values)}")


def as_sent(images: Sequence[bytes]) -> bytes:
    """A batch as TorchServe's frontend writes it: a command, and for each request its id, headers and body."""

    def field(value: bytes) -> bytes:
        return struct.pack("!i", len(value)) + value

    headers = {b"Host": b"127.0.0.1:8080", b"Authorization": b"Bearer 12345678", b"Content-Type": b"image/jpeg"}
    end, head = struct.pack("!i", -1), b"".join(field(name) + field(value) for name, value in headers.items())
    body = field(b"body") + field(b"")
    requests = [field(str(uuid4()).encode()) + head + end + body + field(image) + end for image in images]
    return b"I" + b"".join(requests) + end


@app.command()
def variants(run: Run, batch_size: int = 8, rounds: int = 15) -> None:
    """Each form of the model that can run here against the exported file as it is, and the one that a worker takes."""
    model_file, settings = RunFolder(run).model, recipe.load(str(RunFolder(run).recipe)).handler
    encoded = RunFolder(run).read_golden_images()
    images = torch.stack([decode(encoded[index % len(encoded)], settings) for index in range(batch_size)])
    forms = {name: load() for name, load in loaders(model_file, torch.device("cpu")).items()}
    for size in sorted({1, batch_size}):
        sides = {name: partial(form, images[:size]) for name, form in forms.items()}
        with torch.inference_mode():
            seconds = interleaved(
                {RunFolder.model: partial(load_torchscript(model_file), images[:size]), **sides}, rounds
            )
        print(f"batches of {size}")
        for name, values in seconds.items():
            ratios = [whole / part for whole, part in zip(seconds[RunFolder.model], values, strict=True)]
            print(f"  {name:16} images/s        {spread([size / value for value in values])}")
            print(f"  {'':16} times model.pt {spread(ratios)}")
    print(f"a worker on one thread takes {_worker(run, precision='auto').variant.name}")


@app.command()
@reports_errors
def jpeg(
    images: Annotated[Path, typer.Option(help="A folder of photographs, searched in depth.")],
    weights: Annotated[Path, typer.Option(help="Weights of timm's tf_efficientnet_lite0 for ImageNet.")],
    timed: Annotated[int, typer.Option(help="How many photographs are timed.")] = 20,
) -> None:
    """Photographs enlarged to 12 megapixels: decoding at a fraction of the size against decoding in full."""
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise BenchmarkError(f"--images {images} holds no JPEG photograph")
    section = ModelSection(
        architecture="timm/tf_efficientnet_lite0", weights=str(weights), mean=[0.5] * 3, std=[0.5] * 3
    )
    network = models.build(section, 3, 1000).eval()
    agreed, ratios = 0, []
    for index, path in enumerate(track(paths, "photographs", transient=True)):
        data = _enlarged(path)
        sides = {"scaled": partial(decode, data, IMAGENET_INPUT), "full": partial(_in_full, data)}
        if index < timed:
            seconds = interleaved(sides, 1)
            ratios.append(seconds["full"][0] / seconds["scaled"][0])
        with torch.inference_mode():
            guesses = network(torch.stack([side() for side in sides.values()]).float()).argmax(1)
        agreed += int(guesses[0] == guesses[1])
    print(f"full / scaled, time    {spread(ratios)}")
    print(f"top-1 agreement        {agreed} of {len(paths)} photographs, {agreed / len(paths):.2%}")


def _context(run: Path) -> Context:
    return Context(
        model_name=run.name,
        model_dir=str(run),
        manifest={"model": {"serializedFile": RunFolder.model, "modelVersion": "1.0"}},
        batch_size=8,
        gpu=None,
        mms_version="0.12.0",
        model_yaml_config=RunFolder(run).read_config(),
    )


def _worker(run: Path, precision: str | None = None) -> ImageClassifier:
    context = _context(run)
    if precision is not None:
        context.model_yaml_config["handler"]["precision"] = precision
    # As on a machine with a worker for each core.
    context.model_yaml_config["maxWorkers"] = 1 << 20
    classifier = ImageClassifier()
    classifier.initialize(context)
    return classifier


def _enlarged(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    size = LARGE_PHOTOGRAPH if image.width >= image.height else LARGE_PHOTOGRAPH[::-1]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _in_full(data: bytes) -> torch.Tensor:
    return fit(Image.open(io.BytesIO(data)).convert("RGB"), IMAGENET_INPUT)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.handler")
