"""What an edge sends requests to: in which state each is, and with which credential it is asked.

A full queue and late answers are signs of load, and to take a server out for them would leave the others with more of
it. So a queue may be full, answers may be late twice in a row, and a server whose workers go on being late is taken out
only while others are on time. So is one that has workers, but fewer than it declares: it may just be scaled up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from client.connection import direct_session
from client.errors import ClientError, NotAuthorized, NothingListens, NotReady, ServerBusy, ServerUnreachable
from client.tokens import SENDABLE as _SENDABLE
from client.tokens import VARIABLES, Token
from client.torchserve import TorchServe
from operate.edge.servers import EdgeConfig, EdgeEntry, ServerEntry
from operate.golden import GoldenFile
from operate.readiness.checks import ANSWER_TIMEOUT_S, ModelCheck

_LATE_LOOKS = 3
"""In a row, after which a server that does not answer in time is slow."""
_RENEWAL_LEAD = 2.0
"""So many times as early as a client of the same server the edge renews a token, since nginx must have the new one."""

State = Literal["ready", "slow", "out"]


@dataclass(frozen=True)
class Look:
    """How a backend was found; one that is slow is asked where none is ready."""

    state: State
    reason: str = ""


class Server:
    """A TorchServe.

    Args:
        folder: from where the entry's paths are seen.
        golden_files: the models that must be ready, each with its golden images if it has any.
    """

    def __init__(self, entry: ServerEntry, folder: Path, golden_files: Mapping[str, GoldenFile | None]) -> None:
        self.entry = entry
        self._ready_file = folder / entry.ready_file if entry.ready_file else None
        self._token = Token("none", None)
        self._client = TorchServe(
            entry.url,
            entry.management_url,
            folder / entry.key_file,
            timeout_s=ANSWER_TIMEOUT_S,
            retry_s=0,
            connections=4,
        )
        self._checks = [ModelCheck(self._client, model, golden) for model, golden in golden_files.items()]
        self._latest = Look("out", "not looked at yet")
        self._late = 0

    @property
    def credential(self) -> str:
        """Its inference token as it was at the last look."""
        return self._token.value

    def look(self) -> Look:
        """Ask it once; takes at most three times `ANSWER_TIMEOUT_S` for each model, and half a second."""
        if self.entry.drained:
            return Look("out", "drained")
        if self._ready_file and not self._ready_file.exists():
            return Look("out", f"{self._ready_file} is not there")
        self._latest = self._ask()
        return self._latest

    def _ask(self) -> Look:
        if_late: State = "out"
        try:
            self._take_token()
            lacking = [reason for check in self._checks if (reason := _lacking_workers(check))]
            if_late = "slow"  # TorchServe itself is on time
            for check in self._checks:
                with suppress(ServerBusy):
                    check.ask_golden()
        except ClientError as error:
            if not isinstance(error, ServerUnreachable) or isinstance(error, NothingListens):
                return Look("out", str(error))
            self._late += 1
            return Look(if_late, str(error)) if self._late >= _LATE_LOOKS else self._latest
        self._late = 0
        return Look("slow", "; ".join(lacking)) if lacking else Look("ready")

    def is_due(self) -> bool:
        """Whether the token is to be renewed now."""
        return self._client.tokens.is_due("inference", self._token, _RENEWAL_LEAD)

    def renew(self) -> None:
        """Have the server exchange its inference token; the old one ends at once.

        Raises:
            ClientError: it does not.
        """
        self._client.token(refused=self.credential)
        self._take_token()

    def _take_token(self) -> None:
        """Raises:
        NotAuthorized: there is none, or none that could be a header.
        """
        tokens = self._client.tokens
        try:
            token = tokens.token("inference")
        except NotAuthorized:
            raise NotAuthorized(
                f"no inference token in {tokens.path.absolute()}, where TorchServe writes it while it runs"
            ) from None
        if not re.fullmatch(_SENDABLE, token.value):
            raise NotAuthorized(f"the inference token in {tokens.path.absolute()} cannot be sent")
        self._token = token


class InnerEdge:
    """Another machine's edge."""

    def __init__(self, entry: EdgeEntry, folder: Path) -> None:
        self.entry = entry
        self.credential = "none"
        self._key_file = folder / entry.key_file
        self._session = direct_session(folder / entry.certificate_authority)

    def look(self) -> Look:
        """Ask for its `/readyz`; takes at most twice `ANSWER_TIMEOUT_S`, to connect and to wait."""
        if self.entry.drained:
            return Look("out", "drained")
        url = f"{self.entry.url.rstrip('/')}/readyz"
        try:
            key = self._key_file.read_text(encoding="utf-8").strip()
            if not re.fullmatch(_SENDABLE, key):
                return Look("out", f"{self._key_file}: expected one key in one line")
            self.credential = key
            answer = self._session.get(url, timeout=ANSWER_TIMEOUT_S)
        except requests.RequestException as error:
            return Look("out", f"{url}: {type(error).__name__}")
        except OSError as error:  # of the key or the certificate
            return Look("out", str(error))
        return Look("ready") if answer.ok else Look("out", f"{url} says {answer.status_code}")

    def is_due(self) -> bool:
        """Its key does not expire."""
        return False

    def renew(self) -> None:
        """There is nothing to do."""


def _lacking_workers(check: ModelCheck) -> str:
    """How many have loaded a model, where those are fewer than it declares; names it, since there may be several.

    Raises:
        NotReady: none has.
    """
    workers = check.workers()
    try:
        workers.check()
    except NotReady as error:
        reason = f"{check.model}: {error}"
        if workers.ready:
            return reason
        raise NotReady(reason) from None
    return ""


Backend = Server | InnerEdge


def of(config: EdgeConfig, folder: Path, golden_files: Mapping[str, GoldenFile | None]) -> list[Backend]:
    """The backends of a `servers.yaml` in `folder`.

    Raises:
        ClientError: the environment has tokens, which would go before theirs.
    """
    if given := [name for name in VARIABLES.values() if os.environ.get(name)]:
        raise ClientError(f"unset {' and '.join(given)}: each server behind an edge has tokens of its own")
    servers = [Server(entry, folder, golden_files) for entry in config.servers]
    return [*servers, *(InnerEdge(entry, folder) for entry in config.edges)]
