"""Run folder → archive: stage, let torch-model-archiver bundle, prove, and only then put it into the model store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import handler
import system
from archive import data_only, doctor, gate, sbom, serving, store
from archive.doctor import Health
from archive.errors import ArchiveError, BuildError, CannotLoad, ThresholdNotMet
from archive.gate import Check
from archive.members import EXTRA_FILES, GATE_FILE, HANDLER_FILE, OPTIONAL_FILES, SBOM_FILE, check_name
from archive.pack import forget_creation_time, pack
from archive.run_folder import RunFolder
from archive.verify import Verified, verify
from system.files import write_json

HANDLER = Path(handler.__file__).parent
SYSTEM = Path(system.__file__).parent
# What the handler imports of it.
SYSTEM_FILES = ("__init__.py", "cores.py", "files.py", "selective.py")


@dataclass(frozen=True)
class Built:
    """An archive that was built and proved."""

    path: Path
    verified: Verified
    health: Health
    checks: list[Check]
    rewritten: list[str]
    """Keys of `model-config.yaml` that the recipe had otherwise."""


def build(
    run: Path,
    name: str,
    version: str,
    model_store: Path,
    *,
    force: bool = False,
    private_key: Path | None = None,
) -> Built:
    """Bundle the run folder `run`, prove it by doctor and gate, and put it into `model_store` as `NAME.mar`.

    Args:
        force: ship what does not meet the gate, and record that in the archive.
        private_key: sign the archive with it.

    Raises:
        ArchiveError: nothing was changed in the model store.
    """
    rewritten = check(run, name, version, model_store)
    recipe = serving.read(run)
    if rewritten:
        serving.write_config(recipe, run)
    with tempfile.TemporaryDirectory(prefix="archive-") as temporary:
        content, packed = (
            assemble(run, recipe.model_file, Path(temporary), name, version),
            Path(temporary, f"{name}.mar"),
        )
        write_json(content / GATE_FILE, gate.UNJUDGED)
        pack(content, packed)
        health = _prove(packed)
        checks = gate.judge(recipe.gate, run, packed.stat().st_size / 1e6, health.p99_ms)
        if (missed := [str(check) for check in checks if not check.passed]) and not force:
            if RunFolder(run).read_figures():
                why = f"{run} does not meet the gate of its recipe: {'; '.join(missed)}. Train it better"
            else:
                why = f"the accuracy of {run} is unknown: adopt it with labelled images"
            raise ThresholdNotMet(f"{why}, or ship it with --force, which the archive records", gate.table(checks))
        write_json(content / GATE_FILE, gate.record(checks))
        pack(content, packed)
        verified = verify(packed)
        path = store.put(packed, verified, model_store, private_key)
    return Built(path, verified, health, checks, rewritten)


def check(run: Path, name: str, version: str, model_store: Path) -> list[str]:
    """Find what would stop a build before it takes time; returns the keys of `model-config.yaml` to be rewritten.

    Raises:
        ArchiveError: naming what is wrong.
    """
    check_name(name, version)
    check_complete(run)
    rewritten = serving.outdated(run)
    if not model_store.is_dir():
        raise ArchiveError(f"the model store {model_store} is not a directory: create it, or give --model-store DIR")
    return rewritten


def check_complete(run: Path) -> None:
    """Raises:
    IncompleteRun: naming every file that is missing.
    UnsafeFile: loading a model could run code, or reach other files.
    """
    RunFolder(run).require(RunFolder.recipe)
    RunFolder(run).require(serving.read(run).model_file, RunFolder.config, *EXTRA_FILES)
    for name in OPTIONAL_FILES:
        if (run / name).exists():
            data_only.check(run / name)


def assemble(run: Path, model_file: str, temporary: Path, name: str, version: str) -> Path:
    """A folder with all that the archive shall hold but the verdict of the gate.

    Args:
        model_file: the name of what workers load.

    Raises:
        BuildError, IncompleteRun: a file of the run is not what it should be.
    """
    staging, output = temporary / "staging", temporary / "output"
    output.mkdir()
    stage(run, staging)
    content = _run_archiver(run / model_file, run / RunFolder.config, staging, output, name, version)
    forget_creation_time(content)
    write_json(content / SBOM_FILE, sbom.bill_of_materials(content, name, version))
    return content


def stage(run: Path, staging: Path) -> None:
    """Lay out what the archiver shall take as extra files.

    `handler/` stays a package, so that its imports have one spelling in training, tests and the worker; the archiver
    puts the handler file itself at the root.
    """
    shutil.copytree(HANDLER, staging / "handler", ignore=shutil.ignore_patterns("__pycache__", HANDLER_FILE))
    (staging / "system").mkdir()
    for name in SYSTEM_FILES:
        shutil.copy2(SYSTEM / name, staging / "system" / name)
    for name in (*EXTRA_FILES, *(name for name in OPTIONAL_FILES if (run / name).exists())):
        source = run / name
        if source.is_dir():
            shutil.copytree(source, staging / name)
        else:
            shutil.copy2(source, staging / name)


def _run_archiver(model: Path, config: Path, staging: Path, output: Path, name: str, version: str) -> Path:
    """The folder that the archiver lays out, which it leaves unzipped."""
    command = (
        sys.executable, "-m", "model_archiver.model_packaging",
        "--model-name", name,
        "--version", version,
        "--serialized-file", model,
        "--config-file", config,
        "--handler", HANDLER / HANDLER_FILE,
        "--extra-files", staging,
        "--archive-format", "no-archive",
        "--export-path", output,
    )  # fmt: skip
    # The archiver empties $TMPDIR/<model name> first: the fresh directory keeps that away from anything of the user's.
    environment = {**os.environ, "TMPDIR": str(output.parent)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    built = output / name
    if finished.returncode != 0 or not built.is_dir():
        reason = (finished.stderr or finished.stdout).strip().splitlines() or ["no output"]
        raise BuildError(f"torch-model-archiver failed: {reason[-1]}")
    return built


def _prove(packed: Path) -> Health:
    """Raises:
    CannotLoad: with the doctor's cause and fix.
    """
    report = doctor.examine(packed)
    if report.health is None:
        assert report.diagnosis is not None
        cause, fix, detail = report.diagnosis.cause, report.diagnosis.fix, report.diagnosis.detail
        raise CannotLoad(f"a worker could not serve this archive: {cause}. {fix[0].upper()}{fix[1:]} ({detail})")
    return report.health
