"""Compare the forms that a worker could run, on networks of random weights.

    python -m benchmarks.forms FOLDER
    python -m benchmarks.forms FOLDER --openvino DIR     # pip install --no-deps --target DIR openvino

writes each network in each form into FOLDER, then measures loading, memory and images/s on one thread in rounds: every
form answers for a third of a second, then the next. Seconds are of the processor, so that what else runs counts
little. `--report` writes the table into docs/benchmarks.md. Making the files takes five minutes, a round of all half a
minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.document import DOCS, replace
from benchmarks.errors import BenchmarkError
from benchmarks.forms import models, table
from benchmarks.forms.models import FILES, NETWORKS, OPENVINO
from benchmarks.records import about, append, read
from handler.variants import without_torchscript_warning
from system.command_line import reports_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_ROOT = Path(__file__).parents[2]
BATCHES = (1, 8)


class Child:
    """A process that holds one form of one network."""

    def __init__(self, form: str, network: str, folder: Path, openvino: Path | None) -> None:
        shown, file = NETWORKS[network], folder / FILES[form]
        arguments = (form, file, shown.channels, shown.side)
        path = f"{_ROOT}{os.pathsep}{openvino}" if form == OPENVINO else str(_ROOT)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.forms.child", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def loaded(self) -> dict[str, float]:
        told: dict[str, float] = json.loads(self._line())
        return told

    def images_per_s(self, batch: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise BenchmarkError(f"a form could not be run, see above: {' '.join(map(str, self.process.args[5:]))}")  # type: ignore[index]
        return line

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@app.command(epilog="Example: python -m benchmarks.forms bench --network ResNet-18 --form jit --form int8")
@reports_errors
def main(
    folder: Annotated[Path, typer.Argument(help="Where the files and results.jsonl are kept.")],
    network: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(NETWORKS)}.")] = None,
    form: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(FILES)}.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    openvino: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the package openvino lies.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write docs/benchmarks.md too.")] = False,
) -> None:
    """Measure each network in each form."""
    for option, given, known in (("network", network, NETWORKS), ("form", form, FILES)):
        if unknown := [name for name in given or () if name not in known]:
            raise BenchmarkError(f"--{option} {unknown[0]}: expected one of {', '.join(known)}")
    forms = [name for name in form or FILES if name != OPENVINO or openvino]
    results = folder / "results.jsonl"
    for name in network or NETWORKS:
        with without_torchscript_warning():
            failed = models.prepare(name, folder / name, forms)
        for record in _measure(name, folder / name, [f for f in forms if f not in failed], rounds, openvino):
            append(results, {**record, **about()})
        for missing, why in failed.items():
            print(f"{name}: no {missing}: {why}", flush=True)
        print(table.of(name, read(results)), flush=True)
    if report:
        replace(DOCS / "benchmarks.md", "forms", table.render(read(results)))
        print(f"wrote {DOCS / 'benchmarks.md'}")


def _measure(network: str, folder: Path, forms: list[str], rounds: int, openvino: Path | None) -> list[dict[str, Any]]:
    """A record for each form: what loading took, and the images/s of each round."""
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        children = {}
        for form in forms:  # one after the other, so that loading is not timed beside others
            children[form] = Child(form, network, folder, openvino)
            stack.callback(children[form].stop)
            about = {"network": network, "form": form}
            size = (folder / FILES[form]).stat().st_size / 1e6
            records.append({**about, **children[form].loaded(), "size_mb": size, "images_per_s": {}})
        for batch in BATCHES:
            for _ in range(rounds):
                for record in records:
                    rate = children[record["form"]].images_per_s(batch)
                    record["images_per_s"].setdefault(str(batch), []).append(rate)
    return records


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.forms")
