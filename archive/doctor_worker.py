"""One worker's life without Java, from loading an archive to answering rows; the doctor runs it as a process.

    python doctor_worker.py '{"model_dir": ..., "result": ..., ...}'

writes what it saw to the file `result`. As in a TorchServe worker, the unpacked archive is all there is of our code.
"""

from __future__ import annotations

import json
import logging
import resource
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_WARM_UP_ROWS = 5
_MAX_MESSAGE = 4_000


class PredictionFailed(Exception):
    """A golden image was not answered with status 200."""


class NoGpu(Exception):
    """The worker was given a GPU and serves without it, as TorchServe's do where PyTorch finds none."""


class LastException(logging.Handler):
    """Keeps what TorchServe logs and answers with 503."""

    last: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.last = record.exc_info[1]


def main() -> None:
    order = json.loads(sys.argv[1])
    model_dir = Path(order["model_dir"])
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    try:
        if order["memory_limit_mb"] is not None:
            limit = order["memory_limit_mb"] << 20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        seen = live(order, model_dir)
    except BaseException as error:  # whatever ends a worker is to be told
        traceback.print_exc()
        errors = describe(error, model_dir)
        seen = {"errors": errors, "findings": look_closer(order, model_dir, errors)}
    arriving = Path(order["result"]).with_suffix(".partial")
    arriving.write_text(json.dumps(seen), encoding="utf-8")
    arriving.rename(order["result"])


def live(order: dict[str, Any], model_dir: Path) -> dict[str, Any]:
    """Load as TorchServe's worker does, then answer golden images, one in each batch.

    Raises:
        NoGpu: a GPU was asked for, and these would be the times of a CPU.
    """
    started = time.perf_counter()
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import ModelLoaderFactory

    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = order["model_name"]
    service = ModelLoaderFactory.get_model_loader().load(
        order["model_name"], str(model_dir), order["handler"], order["gpu"], order["batch_size"], None, True, metrics
    )
    service.set_cl_socket(None)
    load_s = time.perf_counter() - started
    if order["gpu"] is not None and service._entry_point.__self__.device.type == "cpu":
        raise NoGpu(f"GPU {order['gpu']} was asked for")
    from handler import files, golden

    images = golden.images(model_dir / files.GOLDEN)
    swallowed = LastException()
    logging.getLogger("ts.service").addHandler(swallowed)
    times_ms = [
        answer_ms(service, images[index % len(images)], swallowed) for index in range(_WARM_UP_ROWS + order["rows"])
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, but on macOS bytes
    return {
        "load_s": load_s,
        "golden_images": len(images),
        "times_ms": times_ms[_WARM_UP_ROWS:],
        "peak_memory_mb": peak / (1e6 if sys.platform == "darwin" else 1e3),
    }


def answer_ms(service: Any, image: bytes, swallowed: LastException) -> float:
    """Milliseconds for one row, from the frontend's message to the answer's.

    Raises:
        PredictionFailed: it was not answered with status 200.
    """
    body = {"name": "body", "contentType": "application/octet-stream", "value": bytearray(image)}
    started = time.perf_counter()
    response = service.predict([{"requestId": b"doctor", "headers": [], "parameters": [body]}])
    elapsed_ms = (time.perf_counter() - started) * 1e3
    [code] = struct.unpack_from("!i", response)
    status, phrase = service.context.get_response_status(0)
    if code != 200 or status not in (None, 200):
        raise PredictionFailed(f"status {status if code == 200 else code} {phrase or ''}".strip()) from swallowed.last
    return elapsed_ms


def describe(error: BaseException, model_dir: Path) -> list[dict[str, str]]:
    """The exception and those that led to it, the first one first; TorchServe's own report shows the last alone."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.insert(0, current)
        # Python hides what went before a missing module, and TorchServe looks for one after every failed import.
        hidden = current.__suppress_context__ and not isinstance(current, (ModuleNotFoundError, AttributeError))
        current = current.__cause__ or (None if hidden else current.__context__)
    return [
        {"type": type(link).__name__, "message": str(link)[:_MAX_MESSAGE], "where": _where(link, model_dir)}
        for link in chain
    ]


def _where(error: BaseException, model_dir: Path) -> str:
    """File and line, where it lies in the archive."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    inside = [f"{Path(file).relative_to(model_dir)}:{line}" for file, line in places if file.startswith(str(model_dir))]
    return inside[-1] if inside else ""


def look_closer(order: dict[str, Any], model_dir: Path, errors: list[dict[str, str]]) -> dict[str, Any]:
    """Facts of the archive that tell apart causes with the same message; those that cannot be had are left out."""
    findings: dict[str, Any] = {}
    for look in (_label_counts, _what_would_match):
        try:
            if look is not _what_would_match or any(error["type"] == "GoldenMismatch" for error in errors):
                findings[look.__name__[1:]] = look(order, model_dir)
        except Exception:  # a broken archive breaks these as well, and has been reported
            traceback.print_exc()
    return findings


def _label_counts(_: dict[str, Any], model_dir: Path) -> list[int]:
    """How many labels are served, and how many were measured."""
    from handler import files, golden, labels

    return [len(labels.read(model_dir / files.LABELS_FILE)), len(golden.read(model_dir / files.GOLDEN).class_names)]


def _what_would_match(order: dict[str, Any], model_dir: Path) -> dict[str, Any]:
    """What the decoding must do otherwise for the exported model to give the golden answers."""
    import torch
    import yaml

    from handler import files, golden, variants
    from handler.decoding import decode
    from handler.settings import HandlerSettings

    images, wanted = golden.images(model_dir / files.GOLDEN), golden.answers(model_dir / files.GOLDEN)
    tolerance = golden.read(model_dir / files.GOLDEN).tolerance
    model = variants.load(model_dir / order["model_file"])
    config = yaml.safe_load((model_dir / files.CONFIG_FILE).read_text(encoding="utf-8"))
    settings = HandlerSettings.parse(config["handler"], files.CONFIG_FILE)
    if settings.channels == 1:
        return {}
    with torch.inference_mode():
        answers = model(torch.stack([decode(image, settings) for image in images]).flip(1))
    return {"channel_order": answers.shape == wanted.shape and bool((answers - wanted).abs().max() <= tolerance)}


if __name__ == "__main__":
    main()
