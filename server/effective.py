"""What TorchServe makes of a configuration and a model store: each archive's workers, batching and timeouts.

The order is TorchServe's, and not what its names suggest: `model-config.yaml` in the archive wins over the key
`models`, which wins over the other keys; and what it does not say it sets to a default of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from archive.members import MANIFEST_FILE
from client.scaling import cores
from server import store
from server.errors import ConfigError
from server.keys import CONFIG_KEYS, HANDLER_SECTIONS
from server.properties import Properties, unknown_key

_DEFAULT_BATCH_DELAY_MS = 100
_DEFAULT_TIMEOUT_S = 120
_DEFAULT_RETRY_TIMEOUT_S = 300
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


def models(properties: Properties, model_store: Path) -> list[ModelSettings]:
    """The settings of each archive that a start serves from `model_store`.

    Raises:
        ConfigError: an archive cannot be read, its `model-config.yaml` says what TorchServe would drop, or as
            `store.archives`.
    """
    archives, _ = store.archives(model_store)
    return [_model(properties, archive) for archive in archives]


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


def _model(properties: Properties, archive: Path) -> ModelSettings:
    manifest, config = _read(archive)
    name, version = str(manifest["modelName"]), str(manifest["modelVersion"])
    declared = json.loads(properties.get("models") or "{}").get(name, {}).get(version, {})
    workers = default_workers(properties)
    low, high = declared.get("minWorkers", workers), declared.get("maxWorkers", workers)
    notes = []
    if config is not None:
        asked = config.get("minWorkers", 0), config.get("maxWorkers", 0)
        if 0 < asked[1] >= asked[0]:
            low, high = asked
        elif any(asked):
            notes.append(f"minWorkers {asked[0]} and maxWorkers {asked[1]} are ignored: maxWorkers must be the larger")
    if low == 0:
        notes.append("no worker: requests are refused until it is scaled")
    if config is not None and config.get("maxBatchDelay") == 0:
        notes.append(f"maxBatchDelay 0 becomes {_DEFAULT_BATCH_DELAY_MS} ms")
    notes += _ignored_timeouts(properties, declared, config)
    said = config or {}
    notes += [unknown_key(str(key), CONFIG_KEYS) for key in said if key not in (*CONFIG_KEYS, *HANDLER_SECTIONS)]
    return ModelSettings(
        name,
        version,
        workers=low,
        max_workers=high,
        batch_size=said.get("batchSize") or declared.get("batchSize", 1),
        batch_delay_ms=said.get("maxBatchDelay") or declared.get("maxBatchDelay", _DEFAULT_BATCH_DELAY_MS),
        response_timeout_s=_timeout(properties, "response", config, declared),
        startup_timeout_s=_timeout(properties, "startup", config, declared),
        client_timeout_ms=said.get("clientTimeoutInMills", 0),
        job_queue_size=said.get("jobQueueSize") or int(properties.get("job_queue_size") or 0),
        retry_timeout_s=said.get("maxRetryTimeoutInSec") or _DEFAULT_RETRY_TIMEOUT_S,
        notes=notes,
    )


def _timeout(properties: Properties, kind: str, config: Mapping[str, Any] | None, declared: Mapping[str, Any]) -> int:
    """Seconds: any `model-config.yaml` sets both timeouts, if only to TorchServe's default."""
    if config is not None:
        return config.get(f"{kind}Timeout") or _DEFAULT_TIMEOUT_S
    return int(declared.get(f"{kind}Timeout") or properties.get(f"default_{kind}_timeout") or _DEFAULT_TIMEOUT_S)


def _ignored_timeouts(
    properties: Properties, declared: Mapping[str, Any], config: Mapping[str, Any] | None
) -> list[str]:
    if config is None:
        return []
    keys = [f"default_{kind}_timeout" for kind in ("response", "startup")]
    ignored = [key for key in keys if key in properties.values]
    ignored += [f"models: {key}" for key in ("responseTimeout", "startupTimeout") if key in declared]
    return [f"{key} is ignored: the archive's model-config.yaml decides" for key in ignored]


def _read(archive: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model's part of the manifest, and its `model-config.yaml`, None where it has none.

    Raises:
        ConfigError: either cannot be read, or holds what TorchServe would drop in silence.
    """
    try:
        with zipfile.ZipFile(archive) as members:
            model = json.loads(members.read(MANIFEST_FILE))["model"]
            file = model.get("configFile")
            config = yaml.safe_load(members.read(file)) if file else None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{archive}: cannot be read as an archive ({error}); build it with scripts/archive.sh"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{archive}: {file} is not YAML, so its workers would never load: {error}") from None
    if file and not isinstance(config, dict):
        raise ConfigError(f"{archive}: {file}: expected keys and values")
    for key in _YAML_INTEGERS:
        value = (config or {}).get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{archive}: {file}: {key}: {value!r}: expected a whole number; TorchServe would drop it")
    return model, config
