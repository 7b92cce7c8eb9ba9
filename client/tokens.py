"""TorchServe's tokens, from the environment or from the key file that it writes into its working directory.

The file holds an inference and a management token, which expire, and the API key that renews them. Only this module
reads the file, has tokens renewed, and judges whether an answer refuses one.

A token is due a minute before it expires, or when a quarter of its life is left where that is shorter: a call that is
sent then still arrives in time, and a token that lives for seconds is not renewed at each call. An edge renews twice as
early (`lead`): nginx holds its copy of the token, and a client of the same server that renewed first would make that
copy invalid.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from client.errors import NotAuthorized

Api = Literal["inference", "management"]
TokenKind = Literal[Api, "API"]

VARIABLES: dict[TokenKind, str] = {
    "inference": "TORCHSERVE_INFERENCE_TOKEN",
    "management": "TORCHSERVE_MANAGEMENT_TOKEN",
}
"""Where they are set they are taken before the key file's, until the server refuses them."""
SENDABLE = r"[A-Za-z0-9_.~+/=-]+"
"""What a token may consist of (RFC 6750): whatever else was sent would end up in an error's text."""
_RENEWAL_MARGIN_S, _RENEWAL_SHARE = 60.0, 0.25
# TorchServe rewrites the file in place, so a reader may find it empty or half written for a moment.
_REWRITE_TIMEOUT_S, _POLL_INTERVAL_S = 0.5, 0.02


@dataclass(frozen=True)
class Token:
    """One token; its value is shown neither by `repr` nor by any message."""

    value: str = field(repr=False)
    expires_at: float | None
    """Seconds since 1970; None where nobody says."""

    @property
    def left_s(self) -> float:
        return math.inf if self.expires_at is None else self.expires_at - time.time()


def is_refused(status: int, body: bytes) -> bool:
    """Whether an answer refuses the token: TorchServe answers every token failure with 400 and this type."""
    return status == 400 and b"InvalidKeyException" in body


class Tokens:
    """The tokens in one `key_file.json`, read at every call so that renewed ones are seen, and in the environment.

    Many threads may share it.
    """

    def __init__(self, path: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.path = path
        self._given = {
            kind: Token(value, None) for kind, name in VARIABLES.items() if (value := environment.get(name, "").strip())
        }
        self._renewal = threading.Lock()
        self._margin_s: dict[TokenKind, float] = {}

    def token(self, kind: TokenKind) -> Token:
        """The token as it is now.

        Raises:
            NotAuthorized: there is none in the environment, and the file cannot be read or has none either; or the
                one in the environment cannot be sent.
        """
        given = self._given.get(kind)
        if given is not None and not re.fullmatch(SENDABLE, given.value):
            raise NotAuthorized(
                f"{VARIABLES[kind]} is set to what cannot be a token: set it to one alone, without blanks and line "
                "breaks, or unset it"
            )
        return given or self._read(kind)

    def keep(self, kind: TokenKind) -> None:
        """Go by the token as it is now, also when its file has gone."""
        self._given[kind] = self.token(kind)

    def is_due(self, kind: TokenKind, token: Token, lead: float = 1.0) -> bool:
        """Whether this token expires so soon that it should be renewed, `lead` times as early as a client does."""
        return token.left_s <= lead * self._margin_s.get(kind, _RENEWAL_MARGIN_S)

    def renew(self, kind: TokenKind, old: str, exchange: Callable[[str, str], bool]) -> bool:
        """Have the server write a new token into its key file, unless another thread has done so; others wait.

        Args:
            old: the token that is due or refused; the exchange makes it invalid at once.
            exchange: asks this path of the management API with this key; returns whether the answer was good.

        Returns:
            Whether there is another token than `old` now.

        Raises:
            NotAuthorized: there is no API key.
        """
        with self._renewal:
            if self.token(kind).value != old:
                return True
            try:
                if exchange(f"/token?type={kind}", self._api_key(kind)):
                    self._given.pop(kind, None)  # the one in the environment has been replaced
            finally:
                # After a failure the next try is closer to the end. A token that seems to have expired all the same is
                # from a server with another clock, or cannot be renewed: neither is tried again at each call.
                left_s = self.token(kind).left_s
                self._margin_s[kind] = min(_RENEWAL_MARGIN_S, _RENEWAL_SHARE * left_s) if left_s > 0 else -math.inf
            return self.token(kind).value != old

    def _api_key(self, kind: TokenKind) -> str:
        try:
            return self.token("API").value
        except NotAuthorized as error:
            raise NotAuthorized(
                f"the {kind} token in {self.place(kind)} is refused and cannot be renewed: {error}"
            ) from None

    def place(self, kind: TokenKind) -> str:
        """Where the token comes from, for messages."""
        return VARIABLES[kind] if kind in self._given else str(self.path.absolute())

    def _read(self, kind: TokenKind) -> Token:
        deadline = time.monotonic() + _REWRITE_TIMEOUT_S
        while True:
            try:
                entry = json.loads(self.path.read_text(encoding="utf-8"))[kind]
                return Token(str(entry["key"]), _expires_at(entry))
            except OSError as error:
                variable = f", or set {VARIABLES[kind]}" if kind in VARIABLES else ""
                raise NotAuthorized(
                    f"cannot read the tokens in {self.path.absolute()} ({error.strerror}): TorchServe writes "
                    "key_file.json where it is started; start one with scripts/serve.sh, or point --key-file or "
                    f"TORCHSERVE_KEY_FILE at it{variable}"
                ) from None
            except (ValueError, KeyError, TypeError) as error:
                if not isinstance(error, ValueError) or time.monotonic() > deadline:
                    raise NotAuthorized(f"{self.path.absolute()} has no {kind} token: it is not TorchServe's") from None
            time.sleep(_POLL_INTERVAL_S)


def _expires_at(entry: Mapping[str, Any]) -> float | None:
    """TorchServe writes UTC with up to nine decimals, more than Python reads: whole seconds will do."""
    try:
        whole_seconds = str(entry["expiration time"])[: len("2026-01-01T00:00:00")]
        return datetime.fromisoformat(whole_seconds).replace(tzinfo=timezone.utc).timestamp()
    except (KeyError, ValueError):
        return None
