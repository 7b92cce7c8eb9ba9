"""TorchServe's tokens, from the environment or from the key file that it writes into its working directory.

The file holds an inference and a management token, which expire, and the API key that renews them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from client.errors import NotAuthorized

TokenKind = Literal["inference", "management", "API"]

VARIABLES: dict[TokenKind, str] = {
    "inference": "TORCHSERVE_INFERENCE_TOKEN",
    "management": "TORCHSERVE_MANAGEMENT_TOKEN",
}
"""Where they are set they are taken before the key file's, until the server refuses them."""
SENDABLE = r"[A-Za-z0-9_.~+/=-]+"
"""What a token may consist of (RFC 6750): whatever else was sent would end up in an error's text."""
# TorchServe rewrites the file in place, so a reader may find it empty or half written for a moment.
_REWRITE_TIMEOUT_S, _POLL_INTERVAL_S = 0.5, 0.02


@dataclass(frozen=True)
class Token:
    """One token; its value is shown neither by `repr` nor by any message."""

    value: str = field(repr=False)
    expires_at: float | None
    """Seconds since 1970; None where nobody says."""


class Tokens:
    """The tokens in one `key_file.json`, read at every call so that renewed ones are seen, and in the environment."""

    def __init__(self, path: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.path = path
        self._given = {
            kind: Token(value, None) for kind, name in VARIABLES.items() if (value := environment.get(name, "").strip())
        }

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

    def forget_given(self, kind: TokenKind) -> None:
        """Go by the key file from now on: the one in the environment has been replaced."""
        self._given.pop(kind, None)

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
