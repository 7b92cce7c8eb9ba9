"""The doctor's workers without the two seconds that importing PyTorch takes: each is forked from a process that has it.

All else is as `archive.doctor` starts them: a process of its own with its own path, folder, environment, log and end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from archive import doctor, doctor_worker

PRELOADED = ["torch", "ts.model_loader", "ts.torch_handler.base_handler", "PIL.Image", "pydantic", "yaml"]


def _live(order: str, model_dir: str, log: str) -> None:
    """The worker's whole life, which begins with nothing of this project imported."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.chdir(model_dir)
    os.environ["PYTHONPATH"] = model_dir
    script = str(Path(doctor_worker.__file__).resolve())
    installed = [entry for entry in sys.path if entry.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [str(Path(script).parent), model_dir, *installed]
    sys.argv[:] = [script, order]
    here = str(Path(__file__).parent.parent)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(here) and not file.startswith(sys.prefix):
            del sys.modules[name]
    runpy.run_path(script, run_name="__main__")


def run(order: dict[str, Any], model_dir: Path, log: Path, timeout_s: float) -> tuple[int | None, str]:
    """In the place of `doctor._run`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    worker = context.Process(target=_live, args=(json.dumps(order), str(model_dir), str(log)))
    worker.start()
    worker.join(timeout_s)
    in_time = worker.exitcode is not None
    worker.kill()
    worker.join()
    return (worker.exitcode if in_time else None), log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that the doctor examines in this process are warm."""
    monkeypatch.setattr(doctor, "_run", run)
