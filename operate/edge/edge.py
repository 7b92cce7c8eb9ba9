"""An edge: nginx in front of one or more servers, with their tokens, and with those that are ready.

    cp -r deploy/nginx edge
    python -m operate edge edge

nginx sees at each request which servers are in service, by the files in `run/in-service/`: a server is taken out and
put back without a new configuration. That is written when a token, `servers.yaml` or another file of the folder has
changed.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from client.errors import ClientError
from operate.edge import backends as edge_backends
from operate.edge import door
from operate.edge import servers as edge_servers
from operate.edge.backends import Backend, Look
from operate.edge.door import Platform
from operate.edge.nginx import Nginx
from operate.edge.servers import EdgeConfig, EdgeEntry, ServerEntry
from operate.edge.share import LEASE_S, LentShare
from operate.golden import GoldenFile
from system import files, locks
from system.command_line import complain
from system.printable import counted, printable

Entry = ServerEntry | EdgeEntry
_INTERVAL_S = 1.0
_MOST_SERVERS = 64


class Edge:
    """The edge of one folder, with a door for a platform if one is named."""

    def __init__(self, folder: Path, platform: Platform | None = None) -> None:
        if not (folder / "nginx.conf").is_file():
            raise ClientError(f"{folder} has no nginx.conf: copy deploy/nginx there first, see docs/edge.md")
        self.folder = folder.resolve()
        self.nginx = Nginx(self.folder)
        self._platform = platform
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
        self._say("edge", f"serves {counted(len(self.backends), 'server')} from {self.folder}")
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
        self.nginx.bound_log()
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
        files.write(target, include, mode=0o600)  # it holds the tokens
        listens = door.configuration(self._platform, self._golden_files, os.environ) if self._platform else ""
        files.write(self.nginx.run / door.FILE, listens, mode=0o600)

    def _include(self) -> str:
        """`run/servers.conf`: the groups that edge and hops ask, and a hop for each server, whose token it adds."""
        entries = [backend.entry for backend in self.backends]
        groups = [_group("servers", entries) + "    server unix:run/_nobody.sock backup;\n}\n"]
        groups += [_group(f"others-{entry.name}", entries, without=entry) + "}\n" for entry in entries]
        return "".join([*groups, *map(_hop, self.backends)])

    def _say(self, subject: str, state: str) -> None:
        """One line, where it differs from the last one by more than a number."""
        without_numbers = re.sub(r"[\d.]+", "", state)
        if self._said.get(subject) != without_numbers:
            self._said[subject] = without_numbers
            if subject == "problem":
                complain(state)
            else:
                print(f"{subject}: {printable(state)}", flush=True)


def _look(backend: Backend) -> Look:
    try:
        return backend.look()
    except Exception as error:  # one that answers nonsense must not keep the edge from the others
        return Look("out", f"{backend.entry.url} is not what it should be ({type(error).__name__}: {error})")


def _group(group: str, entries: Sequence[Entry], without: Entry | None = None) -> str:
    """The beginning of a group of hops; the one that asks is down in its own.

    Among the least busy a weight would be no share: a fast server, which is mostly idle, would be asked more often.
    """
    balancing = "    least_conn;\n" if len({entry.weight for entry in entries}) == 1 else ""
    states = ["down" if entry == without else f"max_fails=0 weight={entry.weight}" for entry in entries]
    hops = [f"    server unix:run/{entry.name}.sock {state};\n" for entry, state in zip(entries, states, strict=True)]
    return f"upstream {group} {{\n    zone {group} 256k;\n{balancing}{''.join(hops)}"


def _hop(backend: Backend) -> str:
    name, parts = backend.entry.name, urlsplit(backend.entry.url)
    return f"""
upstream server-{name} {{
    server {parts.netloc} max_fails=0;
    keepalive 64;
}}
server {{
    listen unix:run/{name}.sock;
    set $others others-{name};
    set $server {parts.scheme}://server-{name};
    set $in_service run/in-service/{name};
    set $authorization "Bearer {backend.credential}";
{_verification(backend.entry)}    include hop.conf;
}}
"""


def _verification(entry: Entry) -> str:
    """How another edge's certificate is verified."""
    if not isinstance(entry, EdgeEntry):
        return ""
    return (
        f'    proxy_ssl_verify on;\n    proxy_ssl_trusted_certificate "{entry.certificate_authority}";\n'
        f"    proxy_ssl_name {urlsplit(entry.url).hostname};\n    proxy_ssl_server_name on;\n"
    )
