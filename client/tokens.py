"""TorchServe's tokens, read from the key file that it writes into its working directory.

The file holds an inference and a management token, which expire, and the API key that renews them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from client.errors import NotAuthorized

TokenKind = Literal["inference", "management", "API"]


class KeyFile:
    """The tokens in one `key_file.json`; values are never shown."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def token(self, kind: TokenKind) -> str:
        """The token as the file has it now.

        Raises:
            NotAuthorized: the file cannot be read or has no such token.
        """
        try:
            token = json.loads(self.path.read_text(encoding="utf-8"))[kind]["key"]
        except OSError as error:
            raise NotAuthorized(
                f"cannot read the tokens in {self.path.absolute()} ({error.strerror}): TorchServe writes key_file.json "
                "where it is started; start one with scripts/serve.sh, or point --key-file or TORCHSERVE_KEY_FILE at it"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise NotAuthorized(f"{self.path.absolute()} has no {kind} token: it is not TorchServe's") from None
        return str(token)
