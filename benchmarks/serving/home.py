"""Where a benchmark keeps what it makes: one folder, which setup fills and a run adds its measurements to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The folder `path`."""

    path: Path

    def environment(self, name: str) -> Path:
        return self.path / "environments" / name

    def run(self, model: str) -> Path:
        """The run folder of a model, named as it is served."""
        return self.path / "runs" / model

    def store(self, name: str) -> Path:
        """A model store with one archive."""
        return self.path / "stores" / name

    def network(self, model: str) -> Path:
        """The plain TorchScript that the others serve; what surrounds it lies beside it, as JSON."""
        return self.path / "networks" / f"{model}.pt"

    def images(self, model: str) -> Path:
        return self.path / "images" / model

    def bodies(self, model: str, form: str) -> Path:
        return self.path / "bodies" / model / form

    def server(self, peer: str, model: str) -> Path:
        """A server's working directory, with its logs."""
        return self.path / "servers" / f"{peer}-{model}"

    @property
    def expected(self) -> Path:
        """What each model answers for its first image."""
        return self.path / "expected.json"

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"
