"""The share of real requests that an edge gives a new version: two variables in its `canary.conf`.

`$canary_model` is the model that has a share out, and `$canary_version` the version that a request to it gets; both are
empty where there is none. The nginx of deploy/nginx reads them, and `python -m client edge` runs it.
"""

from __future__ import annotations

import re
from pathlib import Path

from client.edge.nginx import Nginx
from client.errors import EdgeUnusable

_SAFE = re.compile(r"[A-Za-z0-9._-]+")
_NONE = 'map "" $canary_model { default ""; }\nmap "" $canary_version { default ""; }\n'


class EdgeShare:
    """The share that a running edge gives.

    Args:
        file: the `canary.conf` in the edge's folder.

    Raises:
        EdgeUnusable: it is no such file, or no nginx runs in its folder.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file() or not (file.parent / "nginx.conf").is_file():
            raise EdgeUnusable(f"{file} is not the canary.conf of an edge: name that one in a copy of deploy/nginx")
        self.file, self.nginx = file, Nginx(file.parent)
        if not self.nginx.is_running():
            raise EdgeUnusable(f"no nginx runs in {file.parent}: python -m client edge {file.parent} starts it")

    def give(self, model: str, version: str, share: float) -> None:
        """Send `share`, in 0..1, of the requests that name this model and no version to this one.

        Raises:
            ClientError: nginx goes on with what it had.
        """
        if not _SAFE.fullmatch(model) or not _SAFE.fullmatch(version):
            raise EdgeUnusable(f"{model} {version}: nginx is told of letters, digits, '.', '_' and '-' alone")
        self._write(
            f'map "" $canary_model {{ default "{model}"; }}\n'
            f'split_clients $request_id $canary_version {{ {100 * share:.2f}% "{version}"; * ""; }}\n'
        )

    def withdraw(self) -> None:
        """Send no request to another version any more; raises as `give` does."""
        self._write(_NONE)

    def _write(self, content: str) -> None:
        with self.nginx.change():
            partial = self.file.with_name(f".{self.file.name}.partial")
            partial.write_text(content, encoding="utf-8")
            partial.replace(self.file)
