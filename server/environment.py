"""The environment of TorchServe and its workers: what they need of the operator's, and nothing else.

Java hands its own environment to every worker, where an archive's code can read it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from server import java, processes
from server.errors import ConfigError
from server.properties import Properties

LogFormat = Literal["text", "json"]
PUBLIC_KEY_VARIABLE = "ARCHIVE_PUBLIC_KEY"
"""Where it names a file, only archives that the owner of that key signed are served."""
PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "TZ", "LOG_LEVEL", "ACCESS_LOG_LEVEL", "MALLOC_*", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "CUDA_*", "NVIDIA_*", "NCCL_*", "OMP_*", "GOMP_*", "MKL_*", "KMP_*", "OPENBLAS_*", "DNNL_*",
    "ONEDNN_*", "ORT_*", "OPENVINO_*", "OTEL_*", "TORCH_*", "PYTORCH_*", "PYTHONDONTWRITEBYTECODE", "PYTHONNOUSERSITE",
    "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "JAVA_TOOL_OPTIONS",
)  # fmt: skip
"""Names that are passed on; docs/operating.md has them too. A `*` is any ending."""
_PASSED = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in PASSED))
_LOCALE = "C.UTF-8"
"""The operator's may be one that the machine lacks. In any other, names that are not ASCII end the start."""


def for_server(
    run_dir: Path, log_format: LogFormat, foreground: bool, named: frozenset[str] = frozenset()
) -> dict[str, str]:
    """What Java is started with.

    Args:
        named: further variables, which the configuration reads. Java gets them, and `blacklist_env_vars` keeps them
            from the workers.

    Raises:
        ConfigError: as `java.home`.
    """
    temp, logs = str(processes.temp_dir(run_dir)), str(run_dir.resolve() / "logs")
    passed = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name) or name in named}
    return {
        **passed,
        "LC_ALL": _LOCALE,
        "LANG": _LOCALE,
        "JAVA_HOME": str(java.home()),
        "TEMP": temp,
        "TMPDIR": temp,
        "WORKER_PYTHON": sys.executable,
        "LOG_LOCATION": logs,
        "METRICS_LOCATION": logs,
        "LOG_FORMAT": log_format,
        # console.log grows without bound, so it gets what Java prints and no logs.
        "LOG_CONSOLE_LEVEL": "info" if foreground else "off",
    }


def for_forks(variables: Mapping[str, str], properties: Properties) -> dict[str, str] | None:
    """What of Java's variables its workers get, or None if TorchServe must start them itself.

    Args:
        variables: as `for_server` gives them.
        properties: of the configuration that TorchServe reads.
    """
    if properties.get("install_py_dep_per_model") == "true":
        return None  # a package of the archive's own would come after the same one, imported already
    try:
        hidden = re.compile(properties.get("blacklist_env_vars") or "(?!)")
    except re.error:
        return None  # Java understands it, and Python does not
    visible = {name: value for name, value in variables.items() if not hidden.fullmatch(name)}
    return visible if {"TEMP", "WORKER_PYTHON"} <= visible.keys() else None


def public_key(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that ARCHIVE_PUBLIC_KEY names; None where it is unset.

    Raises:
        ConfigError: it is empty, as where a script sets it from a variable that is missing.
    """
    value = environment.get(PUBLIC_KEY_VARIABLE)
    if value is not None and not value.strip():
        raise ConfigError(
            f"{PUBLIC_KEY_VARIABLE} is set and empty: name the file of the owner's public key, or unset it to serve "
            "archives that nobody signed"
        )
    return Path(value) if value else None
