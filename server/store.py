"""Which archives of a model store a start serves: those that are named as their model.

Others may lie beside them: the next version, waiting for its rollout, or what a killed command left.
"""

from __future__ import annotations

from pathlib import Path

from archive.content import ArchiveContent
from archive.errors import InvalidArchive, InvalidName
from archive.members import check_name
from server.errors import ConfigError


def archives(model_store: Path) -> tuple[list[ArchiveContent], list[str]]:
    """The archives to serve, and a line for each that is left out because NAME.mar of its model is served.

    Hidden files count for nothing. Whatever else is called `*.mar` and cannot be read is left out as well, and its line
    says why: it stops none of the others.

    Raises:
        ConfigError: none is left to serve.
    """
    found = sorted(path for path in model_store.glob("*.mar") if not path.name.startswith("."))
    models: dict[ArchiveContent, str] = {}
    left_out = []
    for archive in map(ArchiveContent, found):
        try:
            check_name(archive.name, archive.version)
            models[archive] = archive.name
        except InvalidArchive as error:
            left_out.append(str(error))
        except InvalidName as error:
            left_out.append(f"{archive.path} is left out: {error}")
    served = {model: archive for archive, model in models.items() if model == archive.path.stem}
    for archive, model in models.items():
        if archive in served.values():
            continue
        if model in served:
            left_out.append(f"{archive.path} is left out: a start serves {model}.mar of the model {model}")
        else:
            left_out.append(f"{archive.path} is the model {model}: name it {model}.mar")
    if left_out and not served:
        raise ConfigError("; ".join(left_out))
    return list(served.values()), left_out
