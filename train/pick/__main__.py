"""Find the network for your own images: the most accurate that is fast enough here, in the time that you give.

    python -m train.pick --data photos --minutes 10 --p99-ms 20

tries each network as a probe, measures it in the form that a worker on this machine would serve, fine-tunes the best
in the time that is left, prints the table and writes the run folder of the one that it chose.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from system.command_line import INTERRUPTED, AsJson, reports_errors
from train import run_folder
from train.errors import TrainingError

NETWORKS = (
    "timm/tf_efficientnet_lite0",
    "timm/tf_efficientnet_lite1",
    "timm/tf_efficientnet_lite2",
    "timm/mobilenetv3_large_100",
    "timm/convnext_nano",
)
VALIDATION = "data.val_fraction=0.2"
"""More than a training by itself keeps aside: here they choose between models."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m train.pick --data photos --minutes 10 --p99-ms 20 --name insects")
@reports_errors
def main(
    data: Annotated[Path, typer.Option(help="Where the images are: folders named after classes.")],
    minutes: Annotated[
        float, typer.Option(min=0, help="About how long it may take; one network is always tried.")
    ] = 10,
    p99_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Largest p99 latency of one image in a worker here; default: any.")
    ] = None,
    networks: Annotated[
        str, typer.Option(metavar="NAME[=FILE],...", help="Networks of torchvision or timm, with files of weights.")
    ] = ",".join(NETWORKS),
    name: Annotated[str, typer.Option(help="Name of the run and of the served model.")] = "pick",
    runs: Annotated[Path, typer.Option(help="Where run folders are written.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of both recipes; repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try several networks on your images, and train the best that is fast enough."""
    end = time.monotonic() + 60 * minutes
    target = run_folder.named(runs, name)
    given = dict(entry.partition("=")[::2] for entry in networks.split(",") if entry)
    if not given:
        raise TrainingError("--networks is empty: name some, separated by commas")
    from networks.section import OWN_NETWORKS  # these import pydantic, which takes time that --help saves
    from train import recipe

    if own := given.keys() & set(OWN_NETWORKS):
        raise TrainingError(
            f"--networks {own.pop()} has learnt nothing elsewhere: name networks of torchvision or timm"
        )
    settings = [VALIDATION, *(overrides or [])]
    if p99_ms is not None:
        settings.append(f"gate.max_p99_ms={p99_ms}")
    probes, fine_tunings = (
        {
            network: recipe.load(
                of, [f"model.architecture={network}", f"model.weights={file or 'pretrained'}", *settings], data
            )
            for network, file in given.items()
        }
        for of in ("probe", "finetune")
    )
    from train.pick.search import Search  # imports torch, which takes seconds

    console = Console(stderr=as_json, highlight=False, soft_wrap=True, markup=False, emoji=False)
    search = Search(probes, fine_tunings, target, p99_ms, end, console)
    try:
        result = search.run(overwrite)
    except KeyboardInterrupt:
        print("interrupted" + (f"; {target} holds the best so far" if search.written else ""), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    app(prog_name="python -m train.pick")
