"""What an edge sends requests to: in which state each is, and with which credential it is asked.

A full queue and late answers are signs of load, and to take a server out for them would leave the others with more of
it. So a queue may be full, answers may be late twice in a row, and a server whose workers go on being late is taken out
only while others are on time. So is one that has workers, but fewer than it declares: it may just be scaled up.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from client.edge.images import GoldenFile
from client.edge.servers import EdgeConfig, EdgeEntry, ServerEntry
from client.errors import (
    ClientError,
    NotAsMeasured,
    NotAuthorized,
    NothingListens,
    NotReady,
    ServerBusy,
    ServerUnreachable,
)
from client.golden import GoldenImage
from client.readiness import ANSWER_TIMEOUT_S
from client.tokens import SENDABLE as _SENDABLE
from client.tokens import VARIABLES, Token, Tokens
from client.torchserve import TorchServe

_LATE_LOOKS = 3
"""In a row, after which a server that does not answer in time is slow."""
# Tokens are renewed this long before they expire, or a half of their life where that is shorter: before a client of the
# same server would, since the edge must have the new one at once.
_RENEWAL_MARGIN_S, _RENEWAL_SHARE, _RENEWAL_PAUSE_S = 120.0, 0.5, 5.0
_PROMOTION_S = 0.5
"""A promotion makes the new version the default a moment before its archive takes the old one's place."""

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
        self._golden_files = golden_files
        self._measured = {model: golden.images for model, golden in golden_files.items() if golden}
        self._ready_file = folder / entry.ready_file if entry.ready_file else None
        key_file = folder / entry.key_file
        self._tokens = Tokens(key_file, {})
        self._token = Token("none", None)
        self._margin_s = 0.0
        self._renew_after = 0.0
        self._client = TorchServe(
            entry.url, entry.management_url, key_file, timeout_s=ANSWER_TIMEOUT_S, retry_s=0, connections=4
        )
        self._latest = Look("out", "not looked at yet")
        self._looks = 0
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
        self._looks += 1
        if_late: State = "out"
        try:
            self._take_token()
            lacking = [reason for model in self._golden_files if (reason := self._lacking_workers(model))]
            if_late = "slow"  # TorchServe itself is on time
            self._check_answers()
        except ClientError as error:
            if not isinstance(error, ServerUnreachable) or isinstance(error, NothingListens):
                return Look("out", str(error))
            self._late += 1
            return Look(if_late, str(error)) if self._late >= _LATE_LOOKS else self._latest
        self._late = 0
        return Look("slow", "; ".join(lacking)) if lacking else Look("ready")

    def _lacking_workers(self, model: str) -> str:
        """How many have loaded a model, where those are fewer than it declares; names it, since there may be several.

        Raises:
            ClientError: none has.
        """
        try:
            self._client.check_workers(model)
        except NotReady as error:
            reason = f"{model}: {error}"
        else:
            return ""
        try:
            self._client.check_workers(model, at_least=1)
        except NotReady:
            raise NotReady(reason) from None
        return reason

    def _check_answers(self) -> None:
        """Raises:
        ClientError: a golden image is not answered as training measured, be it with the images that this server was
            last right about or with those that their file has by now.
        """
        for model, golden in self._golden_files.items():
            if golden is None:
                continue
            with suppress(ServerBusy):
                try:
                    self._check_answer(model, self._measured[model])
                except NotAsMeasured:
                    if golden.images is self._measured[model]:
                        time.sleep(_PROMOTION_S)
                        golden.refresh()
                    if golden.images is self._measured[model]:
                        raise
                    self._check_answer(model, golden.images)
                    self._measured[model] = golden.images

    def _check_answer(self, model: str, images: Sequence[GoldenImage]) -> None:
        """Ask for one of them, the next one at each look."""
        image = images[self._looks % len(images)]
        image.check(self._client.predict(model, image.data))

    def is_due(self) -> bool:
        """Whether the token is to be renewed now."""
        return self._left_s < self._margin_s and time.monotonic() >= self._renew_after

    def renew(self) -> None:
        """Have the server exchange its inference token; the old one ends at once.

        Raises:
            ClientError: it does not.
        """
        self._renew_after = time.monotonic() + _RENEWAL_PAUSE_S
        self._client.inference_token(refused=self._token.value)
        self._take_token()
        if self._left_s <= 0:  # by a clock that is not ours
            self._margin_s = -math.inf

    def _take_token(self) -> None:
        """Raises:
        NotAuthorized: there is none, or none that could be a header.
        """
        where = self._tokens.path.absolute()
        try:
            token = self._tokens.token("inference")
        except NotAuthorized:
            raise NotAuthorized(f"no inference token in {where}, where TorchServe writes it while it runs") from None
        if not re.fullmatch(_SENDABLE, token.value):
            raise NotAuthorized(f"the inference token in {where} cannot be sent")
        if token != self._token:
            self._token = token
            self._margin_s = min(_RENEWAL_MARGIN_S, _RENEWAL_SHARE * max(0.0, self._left_s))

    @property
    def _left_s(self) -> float:
        return math.inf if self._token.expires_at is None else self._token.expires_at - time.time()


class InnerEdge:
    """Another machine's edge."""

    def __init__(self, entry: EdgeEntry, folder: Path) -> None:
        self.entry = entry
        self.credential = "none"
        self._key_file = folder / entry.key_file
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = str(folder / entry.certificate_authority)

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
