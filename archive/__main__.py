"""Make archives that TorchServe serves, and check archives before they are served.

    python -m archive build runs/lenet5-digits

writes `model_store/lenet5-digits.mar` once it has been proved; `scripts/archive.sh` is the same command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich import progress as bar
from rich.console import Console
from rich.markup import escape

from archive import doctor, gate, homes, score
from archive.build import build, check
from archive.doctor import ROWS, TIMEOUT_S, Health, Report
from archive.errors import ArchiveError, BelowFloor, CannotLoad
from archive.verify import Verified, verify

P = ParamSpec("P")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True, emoji=False)

Archive = Annotated[Path, typer.Argument(metavar="FILE.mar", help="An archive.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
PublicKey = Annotated[
    Path | None, typer.Option(envvar="ARCHIVE_PUBLIC_KEY", help="Demand a signature by the owner of this key.")
]


@app.callback()
def main() -> None:
    """Make archives that TorchServe serves, and check archives before they are served."""


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print an ArchiveError in one line and exit 1."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ArchiveError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapper


@app.command("build", epilog="Example: python -m archive build runs/lenet5-digits --version 2.0")
@reports_errors
def build_command(
    run: Annotated[Path, typer.Argument(help="The run folder that training wrote.")],
    name: Annotated[str, typer.Option(help="Name of the served model; default: the run folder's.")] = "",
    version: Annotated[str, typer.Option(help="Version of the served model.")] = "1.0",
    model_store: Annotated[Path, typer.Option(help="Where the archive is put.")] = Path("model_store"),
    force: Annotated[
        bool, typer.Option("--force", help="Ship what is below a floor of its recipe; the archive will tell.")
    ] = False,
    private_key: Annotated[Path | None, typer.Option(help="Sign the archive with this key.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check what is asked, print the run folder, and build nothing.")
    ] = False,
) -> None:
    """Bundle a run folder, prove that a worker serves it, and put it into MODEL_STORE/NAME.mar."""
    name = name or run.resolve().name
    if dry_run:
        check(run, name, version, model_store)
        print(run)
        return
    try:
        with console.status("packing, and loading it as a worker would"):
            built = build(run, name, version, model_store, force=force, private_key=private_key)
    except BelowFloor as refusal:
        console.print(gate.table(refusal.checks))
        raise
    _show_verified(built.verified)
    _show_health(built.health)
    console.print()
    console.print(gate.table(built.checks))
    console.print()
    console.print(f"wrote {escape(str(built.path))} ({built.verified.size_bytes / 1e6:.1f} MB); next: scripts/serve.sh")


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
    show_log: Annotated[bool, typer.Option("--log", help="Print all that the worker printed, to stderr.")] = False,
    as_json: AsJson = False,
) -> None:
    """Load an archive as a TorchServe worker would, time it, and say what is wrong in plain words."""
    with console.status("loading it as a worker would"):
        report = doctor.examine(
            archive, public_key=public_key, rows=rows, gpu=gpu, memory_limit_mb=memory_limit_mb, timeout_s=timeout_s
        )
    if show_log:
        print(report.log, file=sys.stderr)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _show_report(report)
    if report.diagnosis is not None:
        raise CannotLoad(f"{archive}: {report.diagnosis.cause}")


@app.command(epilog="Example: python -m archive keygen ~/.ssh/archive-key")
@reports_errors
def keygen(private_key: Annotated[Path, typer.Argument(metavar="KEY", help="File for the private key.")]) -> None:
    """Write a new pair of keys for signatures: KEY, to be kept secret, and KEY.pub."""
    from archive import sign

    public_key = sign.keygen(private_key)
    console.print(
        f"wrote {escape(str(private_key))}, to be kept secret, and {escape(str(public_key))}, to be given away"
    )


@app.command("sign", epilog="Example: python -m archive sign model_store/lenet5-digits.mar --private-key KEY")
@reports_errors
def sign_command(
    archive: Archive, private_key: Annotated[Path, typer.Option(help="The key that keygen wrote.")]
) -> None:
    """Write the signature of an archive, once it is verified, beside it as FILE.mar.sig."""
    from archive import sign

    verify(archive)
    console.print(f"wrote {escape(str(sign.write(sign.sign(archive, private_key), archive)))}")


@app.command("score", epilog="Example: python -m archive score model_store/lenet5-digits.mar photos/ --out scores")
@reports_errors
def score_command(
    archive: Archive,
    folder: Annotated[Path, typer.Argument(help="Images, at any depth.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the Parquet files go; a killed run goes on there.")],
    public_key: PublicKey = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one for each core.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; default: this machine alone.")] = None,
    shard_images: Annotated[int, typer.Option(min=1, help="Images in a Parquet file.")] = score.SHARD_IMAGES,
    as_json: AsJson = False,
) -> None:
    """Classify every image of a folder with an archive and without a server, by Ray Data; a refused image has a row."""
    steps = score.score(
        archive, folder, out,
        public_key=public_key, workers=num_workers, address=address, shard_images=shard_images,
    )  # fmt: skip
    with bar.Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(escape(folder.name))
        for state in steps:
            progress.update(task, total=state.images, completed=state.done)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(state)}))
    else:
        console.print(f"{escape(str(out))}: {state.done} images have a row; {state.refused} were refused in this run")


def _show_verified(verified: Verified) -> None:
    console.print(
        f"[bold]{escape(verified.model_name)} {escape(verified.version)}[/]  archive digest {verified.digest}"
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
        console.print(f"  cause     {escape(report.diagnosis.cause)}")
        console.print(f"  fix       {escape(report.diagnosis.fix)}")
        if report.diagnosis.detail:
            console.print(f"  [dim]seen      {escape(report.diagnosis.detail)}[/]")


app.command("export", epilog="Example: python -m archive export runs/lenet5-digits --to triton DIR")(
    reports_errors(homes.export_command)
)
app.command("compare", epilog="Example: python -m archive compare runs/lenet5-digits --only onnx")(
    reports_errors(homes.compare_command)
)


if __name__ == "__main__":
    app(prog_name="python -m archive")
