"""The command `edge`: nginx in front of one or more servers, with their tokens, and with those that are ready.

    cp -r deploy/nginx edge
    python -m client edge edge

nginx sees at each request which servers are in service, by the files in `run/in-service/`: a server is taken out and
put back without a new configuration. That is written when a token, `servers.yaml` or another file of the folder has
changed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from client import interrupts, locks
from client.command_line import complain, reports_errors
from client.edge import backends as edge_backends
from client.edge import servers as edge_servers
from client.edge.backends import Backend, Look
from client.edge.images import GoldenFile
from client.edge.nginx import Nginx
from client.edge.servers import EdgeConfig, EdgeEntry, ServerEntry
from client.edge.share import LEASE_S, LentShare
from client.errors import ClientError

_INTERVAL_S = 1.0
_MOST_SERVERS = 64


@reports_errors
def edge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A copy of deploy/nginx with your servers and keys.")],
) -> None:
    """Run nginx in front of the servers of DIR/servers.yaml until SIGTERM, SIGHUP or Ctrl-C, which lets it finish."""
    stop = threading.Event()
    interrupts.catch(lambda *_: stop.set())
    Edge(folder).run(stop)


class Edge:
    """The edge of one folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "nginx.conf").is_file():
            raise ClientError(f"{folder} has no nginx.conf: copy deploy/nginx there first, see docs/edge.md")
        self.folder = folder.resolve()
        self.nginx = Nginx(self.folder)
        self.backends: list[Backend] = []
        self._in_service = self.nginx.run / "in-service"
        self._in_service.mkdir(mode=0o755, exist_ok=True)
        self._pool = ThreadPoolExecutor(_MOST_SERVERS, thread_name_prefix="look")
        self._share = LentShare(self.folder)
        self._golden_files: dict[str, GoldenFile | None] = {}
        self._read: EdgeConfig | None = None
        self._running: object = None
        self._said: dict[str, str] = {}

    def run(self, stop: threading.Event) -> None:
        """Keep it up until `stop`, then let nginx finish.

        Raises:
            ClientError: it cannot be started, or runs already. Once it runs, whatever is wrong is said and tried again.
        """
        with locks.held(self.nginx.watch_lock, ClientError(f"an edge runs in {self.folder} already")):
            self._run(stop)

    def _run(self, stop: threading.Event) -> None:
        self.turn()
        self._say("edge", f"serves {len(self.backends)} servers from {self.folder}")
        while not stop.wait(_INTERVAL_S):
            try:
                self.turn()
                self._said.pop("problem", None)
            except (ClientError, OSError) as error:
                self._say("problem", str(error))
        self.nginx.stop()

    def turn(self) -> None:
        """Look at every server once, and have nginx follow.

        Raises:
            ClientError, OSError: nginx goes on with what it had.
        """
        problem = self._read_servers()
        looks = dict(zip(self.backends, self._pool.map(_look, self.backends), strict=True))
        ready = [backend for backend, look in looks.items() if look.state == "ready"]
        serving = ready or [backend for backend, look in looks.items() if look.state == "slow"]
        for backend, look in looks.items():
            state = "in service" if backend in serving else "out of service"
            self._say(backend.entry.name, f"{state}: {look.reason}" if look.reason else state)
        self._take_out_all_but({backend.entry.name for backend in serving})
        try:
            self._follow([backend for backend in serving if backend.is_due()])
        finally:  # nginx has the token of one that has come back
            for backend in serving:
                (self._in_service / backend.entry.name).touch()
        if problem:
            raise problem

    def _read_servers(self) -> ClientError | None:
        """Take `servers.yaml` and golden images where they have changed; returns what is wrong with them, unless
        nothing came before."""
        path = self.folder / "servers.yaml"
        try:
            config = edge_servers.read(path)
            if config != self._read:
                same = self._read and (config.models, config.tolerance) == (self._read.models, self._read.tolerance)
                golden_files = self._golden_files if same else self._open(config)
                backends = edge_backends.of(config, self.folder, golden_files)
                known = {backend.entry: backend for backend in self.backends if same}
                self.backends = [known.get(backend.entry, backend) for backend in backends]
                self._golden_files = golden_files
                self._read = config
            for golden in self._golden_files.values():
                if golden is not None:
                    golden.refresh()
        except ClientError as error:
            if not self.backends:
                raise
            return error
        return None

    def _open(self, config: EdgeConfig) -> dict[str, GoldenFile | None]:
        return {
            model: GoldenFile(self.folder / place, config.tolerance) if place else None
            for model, place in config.models.items()
        }

    def _take_out_all_but(self, names: set[str]) -> None:
        for mark in self._in_service.iterdir():
            if mark.name not in names:
                mark.unlink()

    def _follow(self, due: Sequence[Backend]) -> None:
        """Have nginx run with the files and tokens as they are now, after those that are due have been exchanged."""
        problems: list[ClientError] = []
        state = self._include(), self._files()
        if not self.nginx.is_running():
            self._write(state[0])
            self.nginx.start()
        elif due or state != self._running or self._share.has_expired() or self.nginx.was_left_changing():
            with self.nginx.change():
                if self._share.has_expired():  # still, for another rollout may have come meanwhile
                    self._share.take_back()
                    complain(
                        f"the share in canary.conf was not renewed for {LEASE_S:g} s, so its rollout has ended: every "
                        "request gets the default version again"
                    )
                for backend in due:
                    try:
                        backend.renew()
                    except ClientError as error:  # the others' new tokens must reach nginx all the same
                        problems.append(error)
                state = self._include(), self._files()
                self._write(state[0])
        self._running = state
        if problems:
            raise problems[0]

    def _files(self) -> dict[str, tuple[int, int]]:
        """Which version of the folder's files nginx would run with."""
        # A hidden one is on its way to its place, and gone at any moment.
        paths = [path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    def _write(self, include: str) -> None:
        target = self.nginx.run / "servers.conf"
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)  # it holds the tokens
        partial.write_text(include, encoding="utf-8")
        partial.replace(target)

    def _include(self) -> str:
        """`run/servers.conf`: the group that the edge asks, and a hop for each server, whose token it adds."""
        sockets = "".join(f"    server unix:run/{backend.entry.name}.sock max_fails=0;\n" for backend in self.backends)
        group = f"upstream servers {{\n    zone servers 256k;\n    least_conn;\n{sockets}}}\n"
        return group + "".join(map(_hop, self.backends))

    def _say(self, subject: str, state: str) -> None:
        """One line, where it differs from the last one by more than a number."""
        without_numbers = re.sub(r"[\d.]+", "", state)
        if self._said.get(subject) != without_numbers:
            self._said[subject] = without_numbers
            if subject == "problem":
                complain(state)
            else:
                print(f"{subject}: {state}", flush=True)


def _look(backend: Backend) -> Look:
    try:
        return backend.look()
    except Exception as error:  # one that answers nonsense must not keep the edge from the others
        return Look("out", f"{backend.entry.url} is not what it should be ({type(error).__name__}: {error})")


def _hop(backend: Backend) -> str:
    name, parts = backend.entry.name, urlsplit(backend.entry.url)
    return f"""
upstream server-{name} {{
    server {parts.netloc} max_fails=0;
    keepalive 64;
}}
server {{
    listen unix:run/{name}.sock;
    set $server {parts.scheme}://server-{name};
    set $in_service run/in-service/{name};
    set $authorization "Bearer {backend.credential}";
{_verification(backend.entry)}    include hop.conf;
}}
"""


def _verification(entry: ServerEntry | EdgeEntry) -> str:
    """How another edge's certificate is verified."""
    if not isinstance(entry, EdgeEntry):
        return ""
    return (
        f'    proxy_ssl_verify on;\n    proxy_ssl_trusted_certificate "{entry.certificate_authority}";\n'
        f"    proxy_ssl_name {urlsplit(entry.url).hostname};\n    proxy_ssl_server_name on;\n"
    )
