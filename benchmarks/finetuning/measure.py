"""Interleaved rounds: each tool trains on each set by a seed, then all again by the next seed."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import records
from benchmarks.errors import BenchmarkError
from benchmarks.finetuning import sets, tools
from benchmarks.finetuning.sets import SETS, ImageSet
from benchmarks.finetuning.tools import ROOT, TOOLS, Job
from benchmarks.programs import output
from benchmarks.records import Record
from handler.acceptance import Scores, reached_by
from measure.strangers import KNOWN_SHARE
from system import figures


def rounds(
    folder: Path, names: Sequence[str], seeds: int, threads: int, timm_train: Path, say: Callable[[str], None]
) -> list[str]:
    """Measure what the results of `folder` do not have yet, and add a line to them after each.

    Returns:
        What failed, each once.
    """
    results = folder / "results.jsonl"
    known = {(r["seed"], r["set"], r["tool"]) for r in records.read(results) if not r["error"]}
    failed = []
    for seed in range(seeds):
        for images in SETS:
            for tool in names:
                if (seed, images.name, tool) in known:
                    continue
                record = {"seed": seed, "set": images.name, "tool": tool, "threads": threads, **records.about()}
                try:
                    record |= measure(folder, images, tool, seed, threads, timm_train)
                except (BenchmarkError, OSError, ValueError) as error:
                    record["error"] = str(error)
                    failed.append(f"{tool} on {images.name}")
                records.append(results, record)
                say(f"seed {seed}  {images.name:13} {tool:7} {_summary(record)}")
    return list(dict.fromkeys(failed))


def measure(folder: Path, images: ImageSet, tool: str, seed: int, threads: int, timm_train: Path) -> Record:
    """Train one tool on one set, and measure what it answers for the held-out images and for strangers.

    Raises:
        BenchmarkError: it failed.
    """
    data = folder / "data"
    known, labels, class_names = sets.test_images(data, images.name)
    strangers = sets.strangers(data, images.name)
    work = folder / "work" / f"{images.name}-{tool}-{seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    files = work / "files.txt"
    files.write_text("\n".join(map(str, [*known, *strangers])))
    python = tools.python(folder / "environments", tool)
    job = Job(
        images, seed, data / images.name, folder / "weights.pth", files, len(class_names), work, python, timm_train
    )  # fmt: skip
    train, answer = (list(map(str, command)) for command in TOOLS[tool](job))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started, used = time.monotonic(), _cpu_s()
    output(train, cwd=ROOT, env=environment)
    spent = {"wall_s": round(time.monotonic() - started, 1), "cpu_s": round(_cpu_s() - used, 1)}
    output(answer, cwd=ROOT, env=environment)
    answered = np.load(job.answers)
    shutil.rmtree(work)
    return {**spent, **judge(answered, labels, class_names)}


def judge(answered: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> Record:
    """The figures of float32[N+M,K], or with nearness as a further column: N held-out images, then M strangers.

    Returns:
        `right` of `images`, `ece`, `aurc`, and by each score the share of the strangers that pass the threshold which
        95 % of the held-out images reach: `strangers_by_probability`, `strangers_by_nearness`.
    """
    count, classes = len(labels), len(class_names)
    if len(answered) <= count or answered.shape[1] not in (classes, classes + 1):
        raise BenchmarkError(f"answers of the shape {answered.shape} for {count} images of {classes} classes")
    best, guesses = torch.from_numpy(answered[:count, :classes]).max(1)
    measured = figures.measure(class_names, labels, guesses.tolist(), best.tolist())
    everything = torch.from_numpy(answered)
    truths = torch.tensor([*labels, *[0] * (len(answered) - count)])
    scores = Scores.of(everything, truths, classes)
    found: Record = {
        "images": count, "right": sum(scores.right[:count]), "ece": measured["ece"], "aurc": measured["aurc"],
        "strangers": len(answered) - count,
    }  # fmt: skip
    for name, values in (("probability", scores.probability), ("nearness", scores.nearness)):
        if values is not None:
            least = reached_by(values[:count], KNOWN_SHARE)
            found[f"strangers_by_{name}"] = sum(value >= least for value in values[count:]) / found["strangers"]
    return found


def _cpu_s() -> float:
    """Of the programs that have ended, and of those that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _summary(record: Record) -> str:
    if record["error"]:
        return str(record["error"])
    return f"{record['right'] / record['images']:6.1%}  {record['cpu_s']:5.0f} s of CPU  {record['wall_s']:5.0f} s"
