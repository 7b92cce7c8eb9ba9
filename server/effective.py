"""What TorchServe makes of a configuration and a model store: each archive's workers, batching and timeouts.

The order is TorchServe's, and not what its names suggest: `model-config.yaml` in the archive wins over the key
`models`, which wins over the other keys; and what it does not say it sets to a default of its own. A call that
registers a model wins over all of them with its batch size and delay, and loses to the archive with the rest.
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
from server import registration, store
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


def registered(properties: Properties, model_store: Path, query: str) -> ModelSettings:
    """The settings that a running server would serve an archive with, were it registered by `POST /models?QUERY`.

    Raises:
        ConfigError: as `models`, or TorchServe would not do what the query says.
    """
    call = registration.parse(query)
    archive = model_store / call["url"]
    if archive.parent != model_store or not archive.is_file():
        raise ConfigError(f"--register: url={call['url']}: expected an archive of the model store {model_store}")
    return _model(properties, archive, call)


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


def _model(properties: Properties, archive: Path, call: Mapping[str, str] | None = None) -> ModelSettings:
    """What one archive is served with after a start or, with its parameters, a `call` that registers it."""
    manifest, config = _read(archive)
    asked = call or {}
    name, version = asked.get("model_name") or str(manifest["modelName"]), str(manifest["modelVersion"])
    in_models = json.loads(properties.get("models") or "{}").get(name, {}).get(version, {})
    declared = {key: value for key, value in in_models.items() if value != 0}  # TorchServe passes a 0 over there
    said = config or {}
    low, high = _workers(properties, said, declared, call)
    notes = []
    if (said.get("minWorkers") or said.get("maxWorkers")) and _workers_said(said) is None:
        given = f"minWorkers {said.get('minWorkers', 0)} and maxWorkers {said.get('maxWorkers', 0)}"
        notes.append(f"{given} are ignored: both must be set, and maxWorkers be no smaller")
    if low == 0:
        notes.append("no worker: requests are refused until it is scaled")
    batch_size = int(asked.get("batch_size", 0)) or declared.get("batchSize", 1)
    if "batchSize" in said and "batch_size" not in asked:
        batch_size = max(1, said["batchSize"])
    delay_ms = said.get("maxBatchDelay") or declared.get("maxBatchDelay", _DEFAULT_BATCH_DELAY_MS)
    if "max_batch_delay" in asked:
        delay_ms = int(asked["max_batch_delay"])
    elif said.get("maxBatchDelay") == 0:
        notes.append(f"maxBatchDelay 0 becomes {delay_ms} ms")
    notes += _ignored(properties, config, declared, asked)
    notes += [unknown_key(str(key), CONFIG_KEYS) for key in said if key not in (*CONFIG_KEYS, *HANDLER_SECTIONS)]
    return ModelSettings(
        name,
        version,
        workers=low,
        max_workers=high,
        batch_size=batch_size,
        batch_delay_ms=delay_ms,
        response_timeout_s=_timeout(properties, "response", config, declared, asked),
        startup_timeout_s=_timeout(properties, "startup", config, declared, asked),
        client_timeout_ms=said.get("clientTimeoutInMills", 0),
        job_queue_size=said.get("jobQueueSize") or int(properties.get("job_queue_size") or 0),
        retry_timeout_s=said.get("maxRetryTimeoutInSec") or _DEFAULT_RETRY_TIMEOUT_S,
        notes=notes,
    )


def _workers(
    properties: Properties, said: Mapping[str, Any], declared: Mapping[str, Any], call: Mapping[str, str] | None
) -> tuple[int, int]:
    """Fewest and most: the archive's, else the call's or, at a start, those of the key `models` or the default."""
    if (workers := _workers_said(said)) is not None:
        return workers
    if call is not None:
        initial = int(call.get("initial_workers") or properties.get("default_workers_per_model") or 0)
        return initial, initial
    workers_of_all = default_workers(properties)
    return declared.get("minWorkers", workers_of_all), declared.get("maxWorkers", workers_of_all)


def _workers_said(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """What TorchServe makes of both keys in `model-config.yaml`; None where it makes nothing of them."""
    low, high = max(1, said["minWorkers"]) if "minWorkers" in said else 0, said.get("maxWorkers", 0)
    return (low, high) if 0 < low <= high else None


def _timeout(
    properties: Properties,
    kind: str,
    config: Mapping[str, Any] | None,
    declared: Mapping[str, Any],
    asked: Mapping[str, str],
) -> int:
    """Seconds: any `model-config.yaml` sets both timeouts, if only to TorchServe's default."""
    if config is not None:
        return config.get(f"{kind}Timeout") or _DEFAULT_TIMEOUT_S
    default = properties.get(f"default_{kind}_timeout") or _DEFAULT_TIMEOUT_S
    return int(declared.get(f"{kind}Timeout") or asked.get(f"{kind}_timeout") or default)


def _ignored(
    properties: Properties, config: Mapping[str, Any] | None, declared: Mapping[str, Any], asked: Mapping[str, str]
) -> list[str]:
    """What another place decides on."""
    kinds = ("response", "startup")
    if config is None:
        return [
            f"{kind}_timeout is ignored: the key models decides"
            for kind in kinds
            if f"{kind}_timeout" in asked and f"{kind}Timeout" in declared
        ]
    ignored = [key for key in (f"default_{kind}_timeout" for kind in kinds) if key in properties.values]
    ignored += [f"models: {key}" for key in (f"{kind}Timeout" for kind in kinds) if key in declared]
    ignored += [key for key in (f"{kind}_timeout" for kind in kinds) if key in asked]
    if "initial_workers" in asked and _workers_said(config) is not None:
        ignored.append("initial_workers")
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
