"""One new version beside the old one: registered, then promoted or withdrawn.

The old version stays the default until one single call, `set-default`. Whatever is killed before it leaves the old
version serving, and beside it a new one that no client reaches, except by an edge's share; killed after it, the new one
serves and the old one waits to be removed. The next rollout of the same archive, or `--abort`, clears either away. The
edge takes back a share by itself.

A server that starts again takes NAME.mar, which is the old version until the new one is promoted: then the new archive
takes that name, by one rename.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from client.errors import ClientError, NotReady, RequestRefused
from client.torchserve import TorchServe
from operate.edge.share import EdgeShare
from operate.errors import RolloutRefused
from system.signals import INTERRUPTS

_CONFLICT = 409
_APPEAR_TIMEOUT_S = 2.0
_DRAIN_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 0.1


class Rollout:
    """The way of one new version of a model; `start`, then `promote` or `withdraw`.

    Args:
        edge: gives the new version a share of the real requests.
        archive: the new version's file where the server's model store is at hand; it becomes NAME.mar there.
        alone: no other rollout of this model can be under way, so what is beside the default is left over.

    Raises:
        ModelNotFound: there is no old version.
        RolloutRefused: `model` names a version.
    """

    def __init__(
        self,
        server: TorchServe,
        model: str,
        edge: EdgeShare | None = None,
        archive: Path | None = None,
        alone: bool = True,
    ) -> None:
        if "/" in model:
            raise RolloutRefused(f"{model}: name the model alone, its default version is the old one")
        self.server, self.model, self.edge, self.archive, self.alone = server, model, edge, archive, alone
        description = server.describe(model)
        self.old: str = description["modelVersion"]
        self.old_workers = len(description["workers"])
        self.new = ""

    def start(self, archive: str, workers: int, timeout_s: float) -> None:
        """Register the new version beside the old one and wait until its workers have loaded it.

        A version of the same number that is not the default is what a killed rollout left, and is registered anew.

        Raises:
            RolloutRefused: it is the default already, or does not load; or another rollout may be under way.
            ClientError: as `TorchServe.register`; whatever is raised, the new version is removed first.
        """
        before = set(self.server.versions(self.model))
        if not self.alone and (others := sorted(before - {self.old})):
            raise self._refusal(others)
        if self.edge is not None:
            self.edge.withdraw()
        try:
            try:
                self.server.register(archive, workers, timeout_s, self.model)
            except RequestRefused as error:
                if error.status != _CONFLICT:
                    raise
                left_over = self._left_over(error)
                if not self.alone:
                    before.add(left_over)
                    raise self._refusal([left_over]) from None
                self.server.unregister(self.model, left_over)
                before.discard(left_over)
                self.server.register(archive, workers, timeout_s, self.model)
            arrived = set(self.server.versions(self.model)) - before
            if len(arrived) > 1:
                before |= arrived
                raise self._refusal(sorted(arrived))
            [self.new] = arrived
        except BaseException as error:
            with _clearing_up(self.model):
                self._remove_arrived(before, wait_s=0 if isinstance(error, ClientError) else _APPEAR_TIMEOUT_S)
            if isinstance(error, NotReady | RequestRefused):
                raise RolloutRefused(
                    f"{archive} does not load ({error}); {self.old} serves on: see logs/model_log.log, or ask "
                    "python -m archive doctor"
                ) from None
            raise

    def promote(self, quiet_s: float) -> None:
        """Make the new version the default, also of the server's next start, and remove the old one once nothing waits
        for it.

        Args:
            quiet_s: for so long its queue must have been empty, since nobody sees what its workers still compute.
        """
        with _clearing_up(self.model):
            self.server.set_default(self.model, self.new)
            if self.archive is not None:
                self._rename(self.archive)
            if self.edge is not None:
                self.edge.withdraw()
            self._drain(self.old, quiet_s)
            self.server.unregister(self.model, self.old)

    def withdraw(self, quiet_s: float) -> None:
        """Remove the new version, as `promote` does the old one."""
        with _clearing_up(self.model):
            if self.edge is not None:
                self.edge.withdraw()
                self._drain(self.new, quiet_s)
            self.server.unregister(self.model, self.new)

    def clear(self) -> list[str]:
        """Remove the edge's share and every version but the default; returns those."""
        if self.edge is not None:
            self.edge.withdraw()
        others = [version for version in self.server.versions(self.model) if version != self.old]
        for version in others:
            self._drain(version, quiet_s=1)
            self.server.unregister(self.model, version)
        return others

    def _rename(self, archive: Path) -> None:
        """Put the new archive, with its signature if it has one, in the place of the old.

        Raises:
            RolloutRefused: the file system refuses.
        """
        target = archive.with_name(f"{self.model}.mar")
        signature, target_signature = (file.with_name(f"{file.name}.sig") for file in (archive, target))
        try:
            target_signature.unlink(missing_ok=True)  # it is not of the new bytes
            archive.replace(target)
            if signature.exists():
                signature.replace(target_signature)
        except OSError as error:
            raise RolloutRefused(
                f"{self.model} {self.new} was promoted, but the server's next start takes the old one until you call "
                f"mv {archive} {target} ({error.strerror})"
            ) from None

    def _refusal(self, others: Sequence[str]) -> RolloutRefused:
        return RolloutRefused(
            f"{self.model} {', '.join(others)} is beside {self.old}, and another rollout may be under way; if none is: "
            f"python -m operate rollout {self.model} --abort"
        )

    def _left_over(self, conflict: RequestRefused) -> str:
        """The version that is in the new one's way.

        Raises:
            RolloutRefused: it is the default.
        """
        found = re.search(r"version (\S+) is already registered", str(conflict))
        if found is None:
            raise conflict
        if found[1] == self.old:
            raise RolloutRefused(
                f"{self.model} serves {self.old} by default already: give the new archive a higher version (scripts/"
                "archive.sh RUN --version); --abort removes other versions that a killed rollout left"
            )
        return found[1]

    def _remove_arrived(self, before: set[str], wait_s: float) -> None:
        """Remove what was registered since; a call that was interrupted may still be about to do so."""
        deadline = time.monotonic() + wait_s
        while not (arrived := set(self.server.versions(self.model)) - before) and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)
        for version in arrived:
            self.server.unregister(self.model, version)

    def _drain(self, version: str, quiet_s: float) -> None:
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        quiet_since = time.monotonic()
        while time.monotonic() < min(deadline, quiet_since + quiet_s):
            if self.server.describe(self.model, version)["jobQueueStatus"]["pendingRequests"]:
                quiet_since = time.monotonic()
            time.sleep(_POLL_INTERVAL_S)


@contextmanager
def _clearing_up(model: str) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait in vain: what goes on within ends by itself.

    Raises:
        RolloutRefused: instead of what stopped it, with the way to go on.
    """
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    except (ClientError, OSError) as error:
        raise RolloutRefused(
            f"{error}; another version may be left: python -m operate rollout {model} --abort removes it"
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
