"""Make archives that TorchServe serves, and check archives before they are served.

    python -m archive build runs/lenet5-digits

writes `model_store/lenet5-digits.mar` once it has been proved; `scripts/archive.sh` is the same command.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from archive import doctor, score
from archive.doctor import ROWS, TIMEOUT_S, Health, Report
from archive.errors import CannotLoad, InvalidLabels, ThresholdNotMet
from archive.run_folder import RunFolder
from archive.verify import Verified, opened, verify
from system import progress
from system.command_line import AsJson, reports_errors
from system.printable import escaped, printable

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True, emoji=False)

MODEL_STORE = Path("model_store")
Archive = Annotated[Path, typer.Argument(metavar="FILE.mar", help="An archive.")]
PublicKey = Annotated[
    Path | None, typer.Option(envvar="ARCHIVE_PUBLIC_KEY", help="Require a signature by the owner of this key.")
]


@app.callback()
def main() -> None:
    """Make archives that TorchServe serves, and check archives before they are served."""


@app.command("build", epilog="Example: python -m archive build runs/lenet5-digits --version 2.0")
@reports_errors
def build_command(
    run: Annotated[Path, typer.Argument(help="The run folder that training wrote.")],
    name: Annotated[str, typer.Option(help="Name of the served model; default: the run folder's.")] = "",
    version: Annotated[str, typer.Option(help="Version of the served model.")] = "1.0",
    model_store: Annotated[Path, typer.Option(help="Where the archive is put.")] = MODEL_STORE,
    force: Annotated[
        bool, typer.Option("--force", help="Ship a run that misses its recipe's thresholds; the archive records it.")
    ] = False,
    private_key: Annotated[Path | None, typer.Option(help="Sign the archive with this key.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the arguments, print the run folder, and build nothing.")
    ] = False,
) -> None:
    """Pack a run folder into MODEL_STORE/NAME.mar, after a worker has loaded it and answered as measured."""
    from archive import gate  # imports pydantic and Pillow, which take time that --help saves
    from archive.build import build, check

    name = name or run.resolve().name
    if dry_run:
        check(run, name, version, model_store)
        print(printable(run))
        return
    try:
        with console.status("packing, and loading it as a worker would"):
            built = build(run, name, version, model_store, force=force, private_key=private_key)
    except ThresholdNotMet as refusal:
        console.print(refusal.table)
        raise
    if built.rewritten:
        console.print(f"wrote {RunFolder.config} again, as {RunFolder.recipe} has it: {', '.join(built.rewritten)}")
    _show_verified(built.verified)
    _show_health(built.health)
    console.print()
    console.print(gate.table(built.checks))
    console.print()
    store = "" if model_store == MODEL_STORE else f" --model-store {shlex.quote(str(model_store))}"
    size = f"{built.verified.size_bytes / 1e6:.1f} MB"
    console.print(f"wrote {escaped(built.path)} ({size}); next: scripts/serve.sh{escaped(store)}")


@app.command("verify", epilog="Example: python -m archive verify model_store/lenet5-digits.mar --public-key KEY.pub")
@reports_errors
def verify_command(archive: Archive, public_key: PublicKey = None, as_json: AsJson = False) -> None:
    """Check an archive without unpacking it: layout, names, digests, kind of content, and its signature."""
    verified = verify(archive, public_key)
    if as_json:
        print(json.dumps(asdict(verified)))
    else:
        _show_verified(verified)


@app.command("doctor", epilog="Example: python -m archive doctor model_store/lenet5-digits.mar")
@reports_errors
def doctor_command(
    archive: Archive,
    public_key: PublicKey = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows to time.")] = ROWS,
    gpu: Annotated[int | None, typer.Option(min=0, help="Load it on this GPU instead of the CPU.")] = None,
    memory_limit_mb: Annotated[int | None, typer.Option(min=1, help="Most address space, in MiB.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for the worker, in seconds.")] = TIMEOUT_S,
    show_log: Annotated[bool, typer.Option("--log", help="Print the worker's own output to stderr.")] = False,
    as_json: AsJson = False,
) -> None:
    """Load an archive as a TorchServe worker would, time it, and say what is wrong."""
    with console.status("loading it as a worker would"):
        report = doctor.examine(
            archive, public_key=public_key, rows=rows, gpu=gpu, memory_limit_mb=memory_limit_mb, timeout_s=timeout_s
        )
    if show_log:
        print("\n".join(map(printable, report.log.splitlines())), file=sys.stderr)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _show_report(report)
    if report.diagnosis is not None:
        raise CannotLoad(f"{archive}: {report.diagnosis.cause}")


@app.command(epilog="Example: python -m archive relabel runs/insects --name ants=Ameise --name bees=Biene")
@reports_errors
def relabel(
    run: Annotated[Path, typer.Argument(help="The run folder that training wrote.")],
    name: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Another name for a class; repeatable.")
    ] = None,
    names: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="All names instead, as index_to_name.json has them.")
    ] = None,
) -> None:
    """Rename a run's classes without training again. Archives keep their names until they are built again."""
    from archive import relabel as relabelling

    folder = RunFolder(run)
    if run.is_file():
        raise InvalidLabels(
            f"{run} is a file, and an archive never changes its content: relabel the run folder, and build it again "
            "with a higher --version"
        )
    if not name and names is None:
        raise InvalidLabels("give the new names: --name OLD=NEW, or --names FILE.json for all of them")
    folder.require(RunFolder.labels, RunFolder.golden, RunFolder.reference, RunFolder.metrics, RunFolder.provenance)
    chosen = relabelling.new_names(folder.read_class_names(), name or [], names)
    changed = relabelling.relabel(folder, chosen)
    for old, new in changed.items():
        console.print(f"{escaped(old)} is now {escaped(new)}")
    if not changed:
        console.print("the classes have these names already")
        return
    console.print(
        f"changed {len(changed)} of {len(chosen)} names in {escaped(run)}; next: scripts/archive.sh {escaped(run)}, "
        "with a higher --version where it was shipped"
    )


@app.command(epilog="Example: python -m archive keygen ~/.ssh/archive-key")
@reports_errors
def keygen(private_key: Annotated[Path, typer.Argument(metavar="KEY", help="File for the private key.")]) -> None:
    """Make a pair of keys for signatures: KEY, which stays secret, and KEY.pub."""
    from archive import sign

    public_key = sign.keygen(private_key)
    console.print(f"wrote {escaped(private_key)}, to be kept secret, and {escaped(public_key)}, to be given away")


@app.command("sign", epilog="Example: python -m archive sign model_store/lenet5-digits.mar --private-key KEY")
@reports_errors
def sign_command(
    archive: Archive, private_key: Annotated[Path, typer.Option(help="The key that keygen wrote.")]
) -> None:
    """Verify an archive and write its signature beside it, as FILE.mar.sig."""
    from archive import sign

    with opened(archive) as (_, content):
        signature = sign.sign(archive, private_key, content.file)
    console.print(f"wrote {escaped(sign.write(signature, archive))}")


@app.command("score", epilog="Example: python -m archive score model_store/lenet5-digits.mar photos/ --out scores")
@reports_errors
def score_command(
    archive: Archive,
    folder: Annotated[Path, typer.Argument(help="Images, at any depth.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the Parquet files go; the same command continues an interrupted run."),
    ],
    public_key: PublicKey = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each core.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; default: this machine.")
    ] = None,
    shard_images: Annotated[int, typer.Option(min=1, help="Images in a Parquet file.")] = score.SHARD_IMAGES,
    as_json: AsJson = False,
) -> None:
    """Classify every image in a folder with an archive, without a server, by Ray Data."""
    steps = score.score(
        archive, folder, out,
        public_key=public_key, workers=num_workers, address=address, shard_images=shard_images,
    )  # fmt: skip
    with progress.bar() as bar:
        task = bar.add_task(escaped(folder.name), total=0)
        for state in steps:
            bar.update(task, total=state.images, completed=state.done)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(state)}))
    else:
        console.print(f"{escaped(out)}: {state.done} images have a row; {state.refused} were refused in this run")


def _show_verified(verified: Verified) -> None:
    console.print(
        f"[bold]{escaped(verified.model_name)} {escaped(verified.version)}[/]  archive digest {verified.digest}"
    )
    signed = "signature checked" if verified.signed else "signature not checked"
    forced = "[yellow], forced past its gate[/]" if verified.forced else ""
    size = f"{verified.size_bytes / 1e6:.1f} MB"
    console.print(f"[green]✓[/] verified  {verified.members} members, {size}, {signed}{forced}")


def _show_health(health: Health) -> None:
    console.print(f"[green]✓[/] loads     in {health.load_s:.1f} s, {health.golden_images} golden images as measured")
    console.print(
        f"[green]✓[/] answers   a row in {health.median_ms:.1f} ms, p99 {health.p99_ms:.1f} ms (n = {health.rows}), "
        f"with {health.peak_memory_mb:.0f} MB of memory"
    )


def _show_report(report: Report) -> None:
    if report.verified is not None:
        _show_verified(report.verified)
    if report.health is not None:
        _show_health(report.health)
    if report.diagnosis is not None:
        console.print("[red]✗[/] a worker cannot serve it")
        console.print(f"  cause     {escaped(report.diagnosis.cause)}")
        console.print(f"  fix       {escaped(report.diagnosis.fix)}")
        if report.diagnosis.detail:
            console.print(f"  [dim]seen      {escaped(report.diagnosis.detail)}[/]")


if __name__ == "__main__":
    app(prog_name="python -m archive")
