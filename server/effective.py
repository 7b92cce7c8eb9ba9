"""What TorchServe makes of a configuration and a model store: each archive's workers, batching and timeouts.

The order is TorchServe's, and not what its names suggest: `model-config.yaml` in the archive wins over the key
`models`, which wins over the other keys; and what it does not say it sets to a default of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from archive.content import ArchiveContent
from archive.errors import InvalidArchive
from handler import torchserve_defaults
from server.errors import ConfigError
from server.keys import CONFIG_KEYS, HANDLER_SECTIONS
from server.properties import Properties, unknown_key
from system.cores import cores

_YAML_INTEGERS = (
    "minWorkers",
    "maxWorkers",
    "batchSize",
    "maxBatchDelay",
    "responseTimeout",
    "startupTimeout",
    "clientTimeoutInMills",
    "jobQueueSize",
    "maxRetryTimeoutInSec",
)


@dataclass(frozen=True)
class ModelSettings:
    """What one archive of the store is served with."""

    name: str
    version: str
    workers: int
    max_workers: int
    batch_size: int
    batch_delay_ms: int
    response_timeout_s: int
    startup_timeout_s: int
    client_timeout_ms: int
    """How long a request may wait; 0 is for ever."""
    job_queue_size: int
    retry_timeout_s: int
    """How long a worker that dies is started again."""
    notes: list[str] = field(default_factory=list)
    """Where TorchServe does otherwise than what is written."""


def default_workers(properties: Properties) -> int:
    """Workers of a model that says nothing itself: as configured, else one for each GPU, else one for each core."""
    if properties.is_true("debug"):
        return 1
    return int(properties.get("default_workers_per_model") or 0) or gpus(properties) or cores()


def gpus(properties: Properties) -> int:
    """How many GPUs TorchServe uses: those that driver and environment show, but no more than the file allows."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    found = len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        found = min(found, len(visible.split(",")))
    return min(found, int(properties.get("number_of_gpu") or found))


def settings(properties: Properties, archive: ArchiveContent) -> ModelSettings:
    """What an archive is served with.

    Raises:
        ConfigError: it cannot be read, or its `model-config.yaml` says what TorchServe would drop.
    """
    config, name, version = _config(archive), archive.name, archive.version
    in_models = json.loads(properties.get("models") or "{}").get(name, {}).get(version, {})
    declared = {key: value for key, value in in_models.items() if value != 0}  # TorchServe passes a 0 over there
    said = config or {}
    low, high = _workers(properties, said, declared)
    notes = []
    if (said.get("minWorkers") or said.get("maxWorkers")) and _workers_said(said) is None:
        given = f"minWorkers {said.get('minWorkers', 0)} and maxWorkers {said.get('maxWorkers', 0)}"
        notes.append(f"{given} are ignored: both must be set, and maxWorkers be no smaller")
    if low == 0:
        notes.append("no worker: requests are refused until it is scaled")
    batch_size = declared.get("batchSize", torchserve_defaults.BATCH_SIZE)
    if "batchSize" in said:
        batch_size = max(1, said["batchSize"])
    delay_ms = said.get("maxBatchDelay") or declared.get("maxBatchDelay", torchserve_defaults.BATCH_DELAY_MS)
    if said.get("maxBatchDelay") == 0:
        notes.append(f"maxBatchDelay 0 becomes {delay_ms} ms")
    notes += _ignored(properties, config, declared)
    notes += [unknown_key(str(key), CONFIG_KEYS) for key in said if key not in (*CONFIG_KEYS, *HANDLER_SECTIONS)]
    return ModelSettings(
        name,
        version,
        workers=low,
        max_workers=high,
        batch_size=batch_size,
        batch_delay_ms=delay_ms,
        response_timeout_s=_timeout(properties, "response", config, declared),
        startup_timeout_s=_timeout(properties, "startup", config, declared),
        client_timeout_ms=said.get("clientTimeoutInMills", 0),
        job_queue_size=said.get("jobQueueSize") or int(properties.get("job_queue_size") or 0),
        retry_timeout_s=said.get("maxRetryTimeoutInSec") or torchserve_defaults.RETRY_TIMEOUT_S,
        notes=notes,
    )


def _workers(properties: Properties, said: Mapping[str, Any], declared: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most: the archive's, else those of the key `models` or the default."""
    if (workers := _workers_said(said)) is not None:
        return workers
    workers_of_all = default_workers(properties)
    return declared.get("minWorkers", workers_of_all), declared.get("maxWorkers", workers_of_all)


def _workers_said(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """What TorchServe makes of both keys in `model-config.yaml`; None where it makes nothing of them."""
    low, high = max(1, said["minWorkers"]) if "minWorkers" in said else 0, said.get("maxWorkers", 0)
    return (low, high) if 0 < low <= high else None


def _timeout(properties: Properties, kind: str, config: Mapping[str, Any] | None, declared: Mapping[str, Any]) -> int:
    """Seconds: any `model-config.yaml` sets both timeouts, if only to TorchServe's default."""
    if config is not None:
        return config.get(f"{kind}Timeout") or torchserve_defaults.TIMEOUT_S
    default = properties.get(f"default_{kind}_timeout") or torchserve_defaults.TIMEOUT_S
    return int(declared.get(f"{kind}Timeout") or default)


def _ignored(properties: Properties, config: Mapping[str, Any] | None, declared: Mapping[str, Any]) -> list[str]:
    """What the archive decides on, wherever else it is written."""
    if config is None:
        return []
    kinds = ("response", "startup")
    ignored = [key for key in (f"default_{kind}_timeout" for kind in kinds) if key in properties.values]
    ignored += [f"models: {key}" for key in (f"{kind}Timeout" for kind in kinds) if key in declared]
    return [f"{key} is ignored: the archive's model-config.yaml decides" for key in ignored]


def _config(archive: ArchiveContent) -> dict[str, Any] | None:
    """The archive's `model-config.yaml`, None where it has none."""
    try:
        config = archive.config
    except InvalidArchive as error:
        raise ConfigError(str(error)) from None
    for key in _YAML_INTEGERS:
        value = (config or {}).get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            where = f"{archive.path}: {archive.config_file}: {key}"
            raise ConfigError(f"{where}: {value!r}: expected a whole number; TorchServe would drop it")
    return config
