"""An archive of stock TorchServe, served by its own handler and adopted: requests/s and p99 side by side.

    python -m benchmarks.stock FOLDER --images PHOTOGRAPHS

archives a ResNet-18 of random weights for `image_classifier`, adopts that archive, serves each in turn on 127.0.0.1,
loads it by wrk for some seconds, and prints the table. Eight minutes on two cores; wrk must be installed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer

from archive.build import build
from archive.run_folder import RunFolder
from benchmarks.document import DOCS, replace
from benchmarks.errors import BenchmarkError
from benchmarks.programs import output
from benchmarks.records import Record, about, append, read
from benchmarks.serving import bodies, load, models
from benchmarks.serving.home import Home
from benchmarks.serving.measure import serve
from benchmarks.serving.models import RESNET
from benchmarks.serving.peers import PEERS, STOCK_BEST, STOCK_DEFAULTS, Peer, ours
from benchmarks.serving.report import spread
from benchmarks.serving.servers.work import Work
from handler.variants import without_torchscript_warning
from system.command_line import reports_errors
from system.printable import counted
from train.adopt.source import IMAGENET, PIXELS

ADOPTED, ADOPTED_FP32 = "adopted", "adopted-fp32"
SIDES = {
    STOCK_DEFAULTS: PEERS[STOCK_DEFAULTS],
    STOCK_BEST: PEERS[STOCK_BEST],
    ADOPTED_FP32: Peer(ours(ADOPTED_FP32), path=f"/predictions/{ADOPTED_FP32}"),
    ADOPTED: Peer(ours(ADOPTED), path=f"/predictions/{ADOPTED}"),
}
CONNECTIONS = (1, 8)
_CLASSES = 1000
_SHARPER = 8
"""By how much random logits are multiplied: as they come, all classes are almost as likely."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m benchmarks.stock bench --images photographs --rounds 3")
@reports_errors
def main(
    folder: Annotated[Path, typer.Argument(help="Where archives and results.jsonl are kept.")],
    images: Annotated[Path, typer.Option(help="A folder of JPEG photographs, searched in depth.")],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[int, typer.Option(min=2, help="Of each load.")] = 3,
    report: Annotated[bool, typer.Option("--report", help="Write docs/from-your-model.md too.")] = False,
) -> None:
    """Measure a stock archive beside the same one adopted."""
    load.find_wrk()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the server on either
    home = Home(folder.resolve())
    with without_torchscript_warning():
        prepare(home, images)
    first = 1 + max((record["round"] for record in read(home.results)), default=-1)
    for number in range(first, first + rounds):
        for name, side in SIDES.items():
            directory = home.server(name, RESNET)
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            record = {"round": number, "peer": name, **about()}
            try:
                record |= serve(home, RESNET, side, directory, seconds, connections=CONNECTIONS)
            except BenchmarkError as error:
                append(home.results, {**record, "error": str(error)})
                print(f"round {number + 1}  {name:15} {error}", flush=True)
                continue
            append(home.results, record)
            rates = " ".join(f"{record['load'][str(n)]['requests_per_s']:8.1f}" for n in CONNECTIONS)
            print(f"round {number + 1}  {name:15} {rates} requests/s", flush=True)
    text = render(read(home.results))
    print(text)
    if report:
        replace(DOCS / "from-your-model.md", "stock", text)


def prepare(home: Home, photographs: Path) -> None:
    """Write the archives and what they are loaded with, where they are not there yet.

    Raises:
        SetupError: there are too few photographs, or a command failed.
    """
    if home.expected.is_file():
        return
    if not home.images(RESNET).is_dir():
        models.write_images(home, photographs)
    network = home.network(RESNET)
    _write_network(network)
    names = home.path / RunFolder.labels
    names.write_text(json.dumps({str(index): f"class{index}" for index in range(_CLASSES)}))
    stock = home.store(f"stock-{RESNET}")
    options = ("--serialized-file", str(network), "--extra-files", str(names))
    models.archive_plain(stock, RESNET, "image_classifier", *options)
    for name, precision in ((ADOPTED, "auto"), (ADOPTED_FP32, "fp32")):
        asked = ("--data", str(home.images(RESNET)), "--unlabelled", "--set", f"serving.precision={precision}")
        place = ("--name", name, "--runs", str(home.run(name).parent), "--overwrite")
        output((sys.executable, "-m", "train.adopt", str(stock / f"{RESNET}.mar"), *asked, *place))
        shutil.rmtree(home.store(name), ignore_errors=True)
        home.store(name).mkdir(parents=True)
        build(home.run(name), name, "1.0", home.store(name), force=True)  # nobody knows how accurate it is
    encoded = [path.read_bytes() for path in sorted(home.images(RESNET).iterdir())]
    bodies.write(home.bodies(RESNET, "raw"), bodies.FORMS["raw"], encoded)
    home.expected.write_text(json.dumps({RESNET: Work(network).answer(encoded[:1])[0]}))


def _write_network(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    with torch.no_grad():
        network.fc.weight.mul_(_SHARPER)
        torch.jit.trace(network, torch.rand(1, 3, 224, 224)).save(str(file))
    facts = {key: PIXELS[key] for key in ("resize_size", "crop_size")}
    class_names = [f"class{index}" for index in range(_CLASSES)]
    file.with_suffix(".json").write_text(json.dumps({"mode": "RGB", **facts, **IMAGENET, "class_names": class_names}))


def render(records: list[Record]) -> str:
    """Markdown: what was measured and where, and a line for each side."""
    failed = [record["peer"] for record in records if record["error"]]
    records = [record for record in records if not record["error"]]
    days = sorted({record["date"] for record in records})
    busy = max(record["load_average"] for record in records)
    columns = (*(f"requests/s at {n} | ×" for n in CONNECTIONS), *(f"p99 ms at {n}" for n in CONNECTIONS))
    lines = [
        f"`python -m benchmarks.stock`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, on "
        f"{'; '.join(sorted({record['machine'] for record in records}))}, with a load average of up to {busy:.1f} "
        "before a round. Median, in brackets the extremes of n interleaved rounds; × is the ratio to "
        f"`{STOCK_BEST}` within a round.\n",
        f"| ResNet-18 | {' | '.join(columns)} | errors | memory, MB | n |",
        "|---" * 10 + "|",
    ]
    without_answer: list[str] = []
    base = {record["round"]: record for record in records if record["peer"] == STOCK_BEST}
    for name in SIDES:
        of_side = [record for record in records if record["peer"] == name and record["round"] in base]
        if of_side:
            lines.append(f"| {' | '.join([f'`{name}`', *_cells(of_side, base)])} | {len(of_side)} |")
        if name in failed:
            without_answer.append(f"`{name}` in {counted(failed.count(name), 'round')}")
    if without_answer:
        lines += ["", f"Without an answer in the time of a load: {', '.join(without_answer)}."]
    return "\n".join([*lines, ""])


def _cells(of_side: list[Record], base: dict[int, Record]) -> list[str]:
    cells = []
    for n in map(str, CONNECTIONS):
        rates = [record["load"][n]["requests_per_s"] for record in of_side]
        others = [base[record["round"]]["load"][n]["requests_per_s"] for record in of_side]
        cells += [spread(rates), spread([rate / other for rate, other in zip(rates, others, strict=True)])]
    cells += [spread([record["load"][str(n)]["p99_ms"] for record in of_side]) for n in CONNECTIONS]
    errors = sum(loaded["errors"] for record in of_side for loaded in record["load"].values())
    return [*cells, str(errors), spread([record["memory_mb"] for record in of_side if record["memory_mb"]])]


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.stock")
