"""Why a server does not get its models ready, by what it has logged since its start."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_SERVER_LOG, _WORKER_LOG = "ts_log.log", "model_log.log"
_TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT\S+ \[\w+ *\] .*? - (.*)")
_NOT_LOADED = "Failed to load model: "
_RAISED = "Backend worker process died"
# TorchServe starts a worker again each time, at first within seconds.
_ENDED_AGAIN, _MOST_ENDS = "Auto recovery failed again", 2


@dataclass(frozen=True)
class StartLogs:
    """The logs of one start; what stood in them before does not count."""

    folder: Path
    sizes: dict[str, int]

    @classmethod
    def begin(cls, folder: Path) -> StartLogs:
        """As the logs are before the server writes into them."""
        paths = {name: folder / name for name in (_SERVER_LOG, _WORKER_LOG)}
        return cls(folder, {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()})

    def failure(self) -> str | None:
        """What keeps a model from being served, if it is known by now."""
        return self._exception_of_a_worker() or self._said_by_the_server()

    def _exception_of_a_worker(self) -> str | None:
        """The first one that ended a worker, since those after it follow from it."""
        lines = self._lines(_WORKER_LOG)
        if not any(_RAISED in line for line in lines):
            return None
        start = next((number for number, line in enumerate(lines) if line.startswith("Traceback")), len(lines))
        raised = (line for line in lines[start + 1 :] if line and not line.startswith(" "))
        return f"a worker cannot load its model: {next(raised, f'see {self.folder / _WORKER_LOG}')}"

    def _said_by_the_server(self) -> str | None:
        lines = self._lines(_SERVER_LOG)
        for line, cause in pairwise([*lines, ""]):
            if line.startswith(_NOT_LOADED):
                return f"TorchServe cannot load {line.removeprefix(_NOT_LOADED)}: {cause}"
        if sum(_ENDED_AGAIN in line for line in lines) >= _MOST_ENDS:
            return (
                "a worker ends again and again as it starts and says nothing, as one does that the system kills for "
                "want of memory: python -m archive doctor FILE.mar tells"
            )
        return None

    def _lines(self, name: str) -> list[str]:
        """What was said, without what the log says beside it in either format."""
        path = self.folder / name
        content = path.read_bytes() if path.exists() else b""
        size = self.sizes[name]
        new = content[size if size <= len(content) else 0 :].decode(errors="replace")
        return [line for logged in new.splitlines() for line in _message(logged).splitlines()]


def _message(line: str) -> str:
    if line.startswith("{"):
        try:
            return str(json.loads(line)["message"])
        except (ValueError, KeyError):
            return ""
    text = _TEXT_LINE.fullmatch(line)
    return text[1] if text else line
