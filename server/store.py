"""Which archives of a model store a start serves: those that are named as their model.

Others may lie beside them: the next version, waiting for its rollout, or what a killed command left.
"""

from __future__ import annotations

from pathlib import Path

from client import manifest
from client.errors import ClientError
from server.errors import ConfigError


def archives(model_store: Path) -> tuple[list[Path], list[str]]:
    """The archives to serve, and a line for each that is left out because NAME.mar of its model is served.

    Hidden files count for nothing. An archive that cannot be read counts as one to serve: who opens it says why not.

    Raises:
        ConfigError: an archive has another name than its model, and no other is there for that model.
    """
    found = sorted(archive for archive in model_store.glob("*.mar") if not archive.name.startswith("."))
    models = {archive: _model_name(archive) for archive in found}
    served = [archive for archive, model in models.items() if model == archive.stem]
    left_out = []
    for archive, model in models.items():
        if archive in served:
            continue
        if model_store / f"{model}.mar" not in served:
            raise ConfigError(f"{archive} is the model {model}: name it {model}.mar")
        left_out.append(f"{archive} is left out: a start serves {model}.mar of the model {model}")
    return served, left_out


def _model_name(archive: Path) -> str:
    """As the manifest has it, or the file's where that cannot be read."""
    try:
        return manifest.model_name(archive)
    except (ClientError, OSError):
        return archive.stem
