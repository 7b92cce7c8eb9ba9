"""The share of real requests that an edge gives a new version, or copies: three variables in its `canary.conf`.

`$canary_model` is the model that has a share out, and `$canary_version` the version that a request to it gets.
`$copied_model` is the model of which a request is copied to whoever listens at `run/copies`. All are empty where there
is nothing of it. The nginx of deploy/nginx reads them, and `python -m operate edge` runs it.

A rollout has its share on a lease: it touches `run/share-lease` every second, and the edge takes back a share whose
lease has not been renewed for `LEASE_S`. A share that was written by hand has no lease and stays.
"""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

from operate.edge.nginx import Nginx
from operate.errors import EdgeUnusable
from system import files, locks

LEASE_S = 5.0
"""A share that has not been renewed for so long is taken back."""
_RENEWAL_INTERVAL_S = 1.0
_FILE = "canary.conf"
_LEASE = "share-lease"
_SAFE = re.compile(r"[A-Za-z0-9._-]+")
_NO_SHARE = 'map "" $canary_model { default ""; }\nmap "" $canary_version { default ""; }\n'
_NO_COPIES = 'map "" $copied_model { default ""; }\n'
_NONE = _NO_SHARE + _NO_COPIES


class EdgeShare:
    """The share that a running edge gives.

    Args:
        file: the `canary.conf` in the edge's folder.

    Raises:
        EdgeUnusable: it is no such file, or no edge runs in its folder.
    """

    def __init__(self, file: Path) -> None:
        if file.name != _FILE or not file.is_file() or not (file.parent / "nginx.conf").is_file():
            raise EdgeUnusable(f"{file} is not the canary.conf of an edge: name that one in a copy of deploy/nginx")
        self.file, self.nginx = file, Nginx(file.parent)
        if not self.nginx.is_running() or not locks.is_held(self.nginx.watch_lock):
            raise EdgeUnusable(f"no edge runs in {file.parent}: python -m operate edge {file.parent} starts it")
        self.copies = self.nginx.run / "copies"
        """The socket that copies are sent to."""
        self._lease = self.nginx.run / _LEASE
        self._ended = threading.Event()

    def give(self, model: str, version: str, share: float) -> None:
        """Send `share`, in 0..1, of the requests that name this model and no version to this one, once.

        It stays until `withdraw`, or until this process ends.

        Raises:
            ClientError: nginx goes on with what it had.
        """
        self._lend(
            f'map "" $canary_model {{ default "{model}"; }}\n'
            f'split_clients $request_id $canary_version {{ {100 * share:.2f}% "{version}"; * ""; }}\n{_NO_COPIES}',
            model,
            version,
        )

    def copy(self, model: str, share: float) -> None:
        """Send `copies` a copy of as many of these requests; the clients get the old version's answers. As `give`."""
        self._lend(
            f'{_NO_SHARE}split_clients $request_id $copied_model {{ {100 * share:.2f}% "{model}"; * ""; }}\n', model
        )

    def withdraw(self) -> None:
        """Send no request to another version any more; raises as `give` does."""
        self._write(_NONE)
        self._ended.set()
        self._lease.unlink(missing_ok=True)

    def _lend(self, content: str, *names: str) -> None:
        if not all(map(_SAFE.fullmatch, names)):
            raise EdgeUnusable(f"{' '.join(names)}: nginx is told of letters, digits, '.', '_' and '-' alone")
        self._lease.touch()
        self._ended.clear()
        threading.Thread(target=self._renew, name="share-lease", daemon=True).start()
        self._write(content)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWAL_INTERVAL_S):
            try:
                os.utime(self._lease)
            except OSError:  # the edge has taken it back, or will
                return

    def _write(self, content: str) -> None:
        with self.nginx.change():
            files.write(self.file, content)


class LentShare:
    """The same share as the edge sees it, by a clock that nobody sets."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lease = folder / _FILE, folder / "run" / _LEASE
        self._renewed: int | None = None
        self._seen = 0.0

    def has_expired(self) -> bool:
        """Whether the lease is the same as it was `LEASE_S` ago."""
        try:
            renewed = self._lease.stat().st_mtime_ns
        except FileNotFoundError:
            renewed = None
        if renewed != self._renewed:
            self._renewed, self._seen = renewed, time.monotonic()
        return renewed is not None and time.monotonic() - self._seen >= LEASE_S

    def take_back(self) -> None:
        """Write that there is no share; for use within `Nginx.change`."""
        files.write(self._file, _NONE)
        self._lease.unlink(missing_ok=True)
