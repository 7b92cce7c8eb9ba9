"""What of an archive's manifest the client goes by; TorchServe takes name and version of a model from there."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from client.errors import ClientError

MANIFEST_FILE = "MAR-INF/MANIFEST.json"


def model_name(archive: Path) -> str:
    """The model that it is an archive of.

    Raises:
        ClientError: it has no manifest that could be read.
        OSError: the file system refuses.
    """
    try:
        with zipfile.ZipFile(archive) as members:
            return str(json.loads(members.read(MANIFEST_FILE))["model"]["modelName"])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ClientError(f"{archive} is no archive of a model: {error}") from None
