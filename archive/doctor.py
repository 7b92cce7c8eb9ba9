"""Load an archive as a TorchServe worker would, without Java and without the clone, and time it.

    python -m archive doctor model_store/lenet5-digits.mar

prints how it loads and how fast it answers, or why it cannot and what to do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import handler
from archive import doctor_worker
from archive.diagnosis import Diagnosis, Evidence, diagnose
from archive.errors import ArchiveError
from archive.members import HANDLER_FILE
from archive.verify import Verified, opened
from handler import torchserve_defaults

ROWS = 50
TIMEOUT_S = float(torchserve_defaults.TIMEOUT_S)


@dataclass(frozen=True)
class Health:
    """How a worker did."""

    load_s: float
    golden_images: int
    rows: int
    median_ms: float
    p99_ms: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Report:
    """What the doctor found; one of `health` and `diagnosis` is None."""

    archive: Path
    verified: Verified | None = None
    health: Health | None = None
    diagnosis: Diagnosis | None = None
    log: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"archive": str(self.archive), "loads": self.health is not None} | {
            key: asdict(value) if value else None
            for key, value in (("verified", self.verified), ("health", self.health), ("diagnosis", self.diagnosis))
        }


def examine(
    archive: Path,
    *,
    public_key: Path | None = None,
    rows: int = ROWS,
    gpu: int | None = None,
    memory_limit_mb: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Report:
    """Verify an archive, load it in a process of its own, and let it answer `rows` rows, one at a time.

    Args:
        gpu: number of the GPU that the worker gets, and must use; None serves on the CPU.
        memory_limit_mb: most address space for the worker, in MiB.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-") as temporary:
        model_dir = Path(temporary, "model").resolve()
        try:
            with opened(archive, public_key) as (verified, content):
                content.extract(model_dir)
        except ArchiveError as error:
            fix = "build it again from its run folder, or fetch it again"
            return Report(archive, diagnosis=Diagnosis(str(error), fix))
        order = {
            "model_dir": str(model_dir),
            "result": str(Path(temporary, "result.json")),
            "model_name": verified.model_name,
            "handler": HANDLER_FILE,
            "model_file": content.model_file,
            "batch_size": torchserve_defaults.BATCH_SIZE,
            "gpu": gpu,
            "rows": rows,
            "memory_limit_mb": memory_limit_mb,
        }
        exit_code, log = _run(order, model_dir, Path(temporary, "log"), timeout_s)
        result = Path(temporary, "result.json")
        seen = json.loads(result.read_text(encoding="utf-8")) if result.exists() and exit_code is not None else {}
        if "times_ms" in seen:
            return Report(archive, verified, health=_health(seen), log=log)
        evidence = Evidence(
            errors=seen.get("errors", []),
            findings=seen.get("findings", {}),
            signal=-exit_code if exit_code is not None and exit_code < 0 else None,
            timeout_s=timeout_s if exit_code is None else None,
            changed_files=_changed_files(model_dir),
            log=log,
            memory_limit_mb=memory_limit_mb,
        )
        return Report(archive, verified, diagnosis=diagnose(evidence), log=log)


def _run(order: dict[str, Any], model_dir: Path, log: Path, timeout_s: float) -> tuple[int | None, str]:
    """The worker's exit code, None where it took too long, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(model_dir)}  # as TorchServe's frontend starts it
    command = (sys.executable, str(Path(doctor_worker.__file__).resolve()), json.dumps(order))
    with log.open("wb") as output:
        try:
            finished = subprocess.run(
                command, cwd=model_dir, env=environment, timeout=timeout_s,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False,
            )  # fmt: skip
            exit_code: int | None = finished.returncode
        except subprocess.TimeoutExpired:
            exit_code = None
    return exit_code, log.read_text(encoding="utf-8", errors="replace")


def _health(seen: dict[str, Any]) -> Health:
    times_ms = seen["times_ms"]
    return Health(
        load_s=seen["load_s"],
        golden_images=seen["golden_images"],
        rows=len(times_ms),
        median_ms=statistics.median(times_ms),
        p99_ms=statistics.quantiles(times_ms, n=100, method="inclusive")[98],
        peak_memory_mb=seen["peak_memory_mb"],
    )


def _changed_files(model_dir: Path) -> tuple[str, ...]:
    """Those of the archive's decoding and settings that differ from this clone's."""
    ours = Path(handler.__file__).parent
    names = ("decoding.py", "settings.py")
    return tuple(
        f"handler/{name}"
        for name in names
        if not (model_dir / "handler" / name).is_file()
        or (model_dir / "handler" / name).read_bytes() != (ours / name).read_bytes()
    )
