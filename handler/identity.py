"""Which model answers, down to the bytes of its archive."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

DIGESTS_FILE = "digests.json"


@dataclass(frozen=True)
class Identity:
    """Name, version and digest of a served model."""

    name: str
    version: str
    digest: str
    """The first 12 digits of the SHA-256 of the archive's list of digests or, without one, of the model."""

    @classmethod
    def of(cls, context: Any) -> Identity:
        """The identity of the model that TorchServe's `context` describes."""
        model, folder = context.manifest["model"], Path(context.system_properties["model_dir"])
        digests = folder / DIGESTS_FILE
        content = (digests if digests.exists() else folder / model["serializedFile"]).read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:12]
        return cls(str(context.model_name), str(model.get("modelVersion", "")), digest)

    @cached_property
    def headers(self) -> dict[str, str]:
        """What every answer carries."""
        return {"x-model-name": self.name, "x-model-version": self.version, "x-model-digest": self.digest}
