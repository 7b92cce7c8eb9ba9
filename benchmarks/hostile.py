"""What the dearest requests cost a worker: a corpus of hostile ones, and a search for dearer ones.

python -m benchmarks.hostile --search 600

Each request is read in a process of its own, forked from one that has loaded the handler: CPU time, and how far memory
rises above what the process had. The dearest ones are written into docs/security.md. Nothing may take more than a
second or 300 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from hypothesis import HealthCheck, Phase, given, settings, target
from hypothesis import strategies as st
from PIL import Image

from benchmarks.hostile_requests import (
    MOST_BYTES,
    SETTINGS,
    Fields,
    corpus,
    encoded,
    fields,
    filled,
    jpeg_of_scans,
    noise,
    parsed,
    png,
    tiff_of_one_strip,
    v2,
)
from handler import runtime
from handler.formats import FORMATS
from handler.request import Request
from handler.settings import HandlerSettings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Built = tuple[str, Callable[[], Fields]]
MOST_CPU_S, MOST_MB = 1.0, 300.0
PAGE = Path(__file__).parents[1] / "docs/security.md"
MARKERS = ("<!-- hostile -->\n", "<!-- end of hostile -->\n")
_ROWS = 15
_TIMEOUT_S = 300


class Cost(NamedTuple):
    """What one request took."""

    cpu_s: float
    megabytes: float
    answer: str
    """Its status, and how many of its images were decoded."""


def measure(build: Callable[[], Fields], limits: HandlerSettings = SETTINGS) -> Cost:
    """What reading a request costs, in a process of its own that has nothing of its making in memory."""
    context = multiprocessing.get_context("fork")
    with tempfile.NamedTemporaryFile() as file:
        building = context.Process(target=_write, args=(build, file.name))
        building.start()
        building.join()
        assert building.exitcode == 0, "the request could not be made, see above"
        receiver, sender = context.Pipe(duplex=False)
        reading = context.Process(target=_read, args=(file.name, limits, sender))
        reading.start()
        sender.close()
        try:
            if not receiver.poll(_TIMEOUT_S):
                reading.kill()
            return Cost(*receiver.recv())
        except EOFError:
            return Cost(float(_TIMEOUT_S), 0.0, "the process ended")
        finally:
            reading.join()


def _write(build: Callable[[], Fields], file: str) -> None:
    Path(file).write_bytes(pickle.dumps(build()))


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def _read(file: str, limits: HandlerSettings, sender: Connection) -> None:
    request: Fields = pickle.loads(Path(file).read_bytes())
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what libraries complain
    ctypes.CDLL(None).malloc_trim(0)  # what the process had freed and kept would hide as much of the request's own
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _memory_mb("VmRSS"), time.process_time()
    try:
        body = request.get("body")
        headers = {"host": "localhost", "content-type": "application/json" if isinstance(body, str) else "image/x"}
        if isinstance(body, str):
            request = {"body": bytearray(body.encode())}
        read = Request.read(request, headers, limits)
        answer = (
            f"{read.refusal.code if read.refusal else 200}, {sum(isinstance(i, torch.Tensor) for i in read.images)}"
        )
    except BaseException:  # which a worker would not survive, or answer by 503
        answer = traceback.format_exc().strip().splitlines()[-1][:60]
    sender.send((time.process_time() - started, _memory_mb("VmHWM") - before, answer))


def load_handler() -> None:
    """As a worker does; forked processes have it."""
    runtime.keep_freed_memory()
    torch.set_num_threads(1)
    warm = encoded(noise(64), "PNG")
    Request.read({"body": bytearray(warm)}, {"host": "localhost"}, SETTINGS)


@app.command()
def main(
    search: Annotated[float, typer.Option(help="Seconds to look for dearer requests.")] = 0.0,
    only: Annotated[str, typer.Option(help="Only the requests whose name begins so, without writing the table.")] = "",
) -> None:
    """Measure the corpus, search, and write the table."""
    load_handler()
    costs: dict[str, Cost] = {}
    for name, build in corpus().items():
        if name.startswith(only):
            costs[name] = measure(build)
            print(_line(name, costs[name]), flush=True)
    if search:
        costs |= found_by_search(search)
    if not only:
        write_table(costs, search)


def found_by_search(seconds: float) -> dict[str, Cost]:
    """The dearest of each kind that Hypothesis finds by its targets."""
    until = time.monotonic() + seconds
    dearest: dict[str, Cost] = {}

    @settings(
        max_examples=1_000_000, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.target],
    )  # fmt: skip
    @given(REQUESTS)
    def look(built: Built) -> None:
        if time.monotonic() > until:
            raise _Enough
        name, build = built
        cost = measure(build)
        target(cost.cpu_s, label="CPU")
        target(cost.megabytes / MOST_MB, label="memory")
        kind = name.split(",")[0]
        for best, value in ((f"{kind}, found: most CPU", cost.cpu_s), (f"{kind}, found: most memory", cost.megabytes)):
            known = dearest.get(best)
            if known is None or value > (known.cpu_s if best.endswith("CPU") else known.megabytes):
                dearest[best] = cost
                print(_line(name, cost), flush=True)

    with contextlib.suppress(_Enough):
        look()
    return dearest


class _Enough(BaseException):
    """The time of the search is over."""


_megapixels = st.floats(0.01, 60)
_times = st.sampled_from([1, 1, 1, 2, 8, 64])


@st.composite
def _png(draw: st.DrawFn) -> Built:
    bits, colour = draw(st.sampled_from([(8, 0), (16, 0), (8, 2), (16, 2), (8, 3), (16, 4), (8, 6), (16, 6)]))
    pixels, times, interlaced = draw(_megapixels), draw(_times), draw(st.integers(0, 1))
    row = draw(st.binary(min_size=2, max_size=8))
    row = bytes([row[0] % 5]) + row[1:]
    name = f"PNG, {pixels:.1f} MP, {bits} bits, colour {colour}, interlaced {interlaced}, {row.hex()}, {times} times"
    return name, lambda: fields(png(pixels * 1e6, bits, colour, interlaced=interlaced, row=row), times)


@st.composite
def _codec(draw: st.DrawFn) -> Built:
    image_format = draw(st.sampled_from([name for name in ("WEBP", "AVIF", "JPEG", "GIF") if name in FORMATS]))
    pixels, times = draw(_megapixels), draw(_times)
    grain, quality = draw(st.integers(1, 64)), draw(st.integers(0, 100))
    alpha = draw(st.booleans()) and image_format in ("WEBP", "AVIF")
    name = f"{image_format}, {pixels:.1f} MP, grain {grain}, quality {quality}, alpha {alpha}, {times} times"
    return name, lambda: _encoded(image_format, pixels, grain, quality, alpha, times)


def _encoded(image_format: str, pixels: float, grain: int, quality: int, alpha: bool, times: int) -> Fields:
    side = int((min(pixels, 26) * 1e6) ** 0.5)
    small = noise(max(8, side // grain), "RGBA" if alpha else "RGB").resize((side, side), Image.Resampling.NEAREST)
    options: dict[str, Any] = {
        "WEBP": {"quality": quality, "method": 0, "lossless": quality % 2 == 0},
        "AVIF": {"quality": quality, "speed": 10, "max_threads": 2},
        "JPEG": {"quality": quality, "progressive": quality % 2 == 0, "subsampling": quality % 3},
        "GIF": {},
    }[image_format]
    try:
        data = encoded(small, image_format, **options)
    except ValueError:  # libwebp cannot encode so much noise
        data = b"none"
    return fields(data if len(data) < MOST_BYTES else b"none", times)


@st.composite
def _scans(draw: st.DrawFn) -> Built:
    pixels, scans, subsampling = draw(st.floats(0.1, 170)), draw(st.integers(1, 90)), draw(st.integers(0, 2))
    body, times = draw(st.binary(max_size=16)), draw(_times)
    name = f"JPEG, {pixels:.1f} MP, {scans} further scans, subsampling {subsampling}, {times} times"
    body = body.replace(b"\xff", b"\0")
    return name, lambda: fields(jpeg_of_scans(pixels * 1e6, scans, subsampling, body), times)


@st.composite
def _tiff(draw: st.DrawFn) -> Built:
    pixels, samples, bits = draw(_megapixels), draw(st.sampled_from([3, 4])), draw(st.sampled_from([8, 16]))
    name = f"TIFF, {pixels:.1f} MP, {samples} samples of {bits} bits"
    return name, lambda: fields(tiff_of_one_strip(pixels * 1e6, samples, bits))


@st.composite
def _json(draw: st.DrawFn) -> Built:
    item = draw(st.sampled_from(["{}", "[]", '""', "0", "0.5", '{"":[]}', '"é"', "[[]]", "true", "1e5", '{"b64":""}']))
    key = draw(st.sampled_from(["instances", "inputs", "data"]))
    name = f"JSON, {key} of {item}"
    if key == "data":
        return name, lambda: v2(filled(item))
    return name, lambda: parsed(f'{{"{key}": {filled(item)}}}')


REQUESTS = st.one_of(_png(), _codec(), _scans(), _tiff(), _json())


def _line(name: str, cost: Cost) -> str:
    return f"{name:80} {cost.cpu_s:6.2f} s {cost.megabytes:6.0f} MB  {cost.answer}"


def write_table(costs: dict[str, Cost], search: float) -> None:
    """The dearest rows, between the markers of the page."""
    dearest = sorted(costs.items(), key=lambda each: -max(each[1].cpu_s / MOST_CPU_S, each[1].megabytes / MOST_MB))
    rows = [f"| {name} | {cost.cpu_s:.2f} | {max(0, cost.megabytes):.0f} | {cost.answer} |" for name, cost in dearest]
    over = sum(cost.cpu_s > MOST_CPU_S or cost.megabytes > MOST_MB for cost in costs.values())
    text = (
        f"`python -m benchmarks.hostile --search {search:.0f}`, {time.strftime('%Y-%m-%d')}, {len(costs)} requests of "
        f"at most {MOST_BYTES:,} bytes, {over} above a second or 300 MB. The {_ROWS} dearest:\n\n"
        "| request | CPU, s | MB above what there was | status, images decoded |\n|---|---|---|---|\n"
        + "\n".join(rows[:_ROWS])
        + "\n"
    )
    page = PAGE.read_text()
    before, rest = page.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    PAGE.write_text(before + MARKERS[0] + text + MARKERS[1] + after)


if __name__ == "__main__":
    app()
