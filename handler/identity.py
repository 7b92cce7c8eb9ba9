"""Which model answers, down to the bytes of its archive."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DIGESTS_FILE = "digests.json"


@dataclass(frozen=True)
class Identity:
    """Name, version and digest of a served model."""

    name: str
    version: str
    digest: str
    """The first 12 digits of the SHA-256 of the archive's list of digests or, without one, of the model."""

    @classmethod
    def of(cls, name: str, version: str, model_file: Path) -> Identity:
        """The identity of a model, with its digests beside it if it is an archive's."""
        digests = model_file.with_name(DIGESTS_FILE)
        content = (digests if digests.exists() else model_file).read_bytes()
        return cls(name, version, hashlib.sha256(content).hexdigest()[:12])

    @cached_property
    def headers(self) -> dict[str, str]:
        """What every answer carries."""
        return {"x-model-name": self.name, "x-model-version": self.version, "x-model-digest": self.digest}
