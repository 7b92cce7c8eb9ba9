"""Every key that TorchServe 0.12 reads in its `.properties` file, with what it expects and what it takes otherwise.

Read from the class `ConfigManager` of the installed `model-server.jar`; a test compares both. So are the keys within
`models`, from `Model`, those of an archive's `model-config.yaml`, from `ModelConfig`, and the parameters of a call that
registers a model, from `RegisterModelRequest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from handler import torchserve_defaults

Kind = Literal["boolean", "integer", "number", "port", "address", "host", "choice", "json", "text"]

EXPECTED: dict[Kind, str] = {
    "boolean": "true or false",
    "integer": "a whole number of 0 or more",
    "number": "a number of 0 or more",
    "port": "a port from 1 to 65534",
    "address": "http://HOST:PORT, https://HOST:PORT or unix:/PATH",
    "host": "the name or address of a network interface",
    "json": "a JSON object",
    "text": "text",
}


@dataclass(frozen=True)
class Key:
    """What one key takes."""

    kind: Kind
    default: str | None = None
    """As it would stand in the file; None where TorchServe has no value."""
    choices: tuple[str, ...] = ()
    secret: bool = False
    """Not to be shown."""

    @property
    def expected(self) -> str:
        return " or ".join(self.choices) if self.kind == "choice" else EXPECTED[self.kind]


_NO = Key("boolean", "false")
_YES = Key("boolean", "true")
_UNSET = Key("text")
_TIMEOUT = Key("integer", str(torchserve_defaults.TIMEOUT_S))
_FOREVER = Key("integer", str(2**63 - 1))

# The keys that open a port, in the order in which --port N counts them.
PORT_KEYS = {
    "inference_address": Key("address", "http://127.0.0.1:8080"),
    "management_address": Key("address", "http://127.0.0.1:8081"),
    "metrics_address": Key("address", "http://127.0.0.1:8082"),
    "grpc_inference_port": Key("port", "7070"),
    "grpc_management_port": Key("port", "7071"),
}

KEYS = PORT_KEYS | {
    "grpc_inference_address": Key("host", "127.0.0.1"),
    "grpc_management_address": Key("host", "127.0.0.1"),
    "grpc_inference_max_connection_age_ms": _FOREVER,
    "grpc_inference_max_connection_age_grace_ms": _FOREVER,
    "grpc_management_max_connection_age_ms": _FOREVER,
    "grpc_management_max_connection_age_grace_ms": _FOREVER,
    "enable_grpc_ssl": _NO,
    # who may do what
    "disable_token_authorization": _NO,
    "token_expiration_min": Key("number", "60"),
    "enable_model_api": _NO,
    "allowed_urls": Key("text", "file://.*|http(s)?://.*"),
    "use_env_allowed_urls": _NO,
    "cors_allowed_origin": _UNSET,
    "cors_allowed_methods": _UNSET,
    "cors_allowed_headers": _UNSET,
    "blacklist_env_vars": _UNSET,
    "enable_envvars_config": _NO,
    "install_py_dep_per_model": _NO,
    "keystore": _UNSET,
    "keystore_pass": Key("text", "changeit", secret=True),
    "keystore_type": Key("text", "PKCS12"),
    "certificate_file": _UNSET,
    "private_key_file": _UNSET,
    # models and workers
    "model_store": _UNSET,
    "workflow_store": _UNSET,
    "load_models": _UNSET,
    "models": Key("json"),
    "model_snapshot": _UNSET,
    "default_workers_per_model": Key("integer", "0"),
    "number_of_gpu": Key("integer"),
    "default_response_timeout": _TIMEOUT,
    "default_startup_timeout": _TIMEOUT,
    "unregister_model_timeout": _TIMEOUT,
    "default_service_handler": _UNSET,
    "service_envelope": _UNSET,
    "initial_worker_port": Key("port", "9000"),
    "initial_distribution_port": Key("port", "29500"),
    "python": Key("text", "python"),
    "cpu_launcher_enable": _NO,
    "cpu_launcher_args": _UNSET,
    "ipex_enable": _NO,
    "ipex_gpu_enable": _NO,
    # requests
    "max_request_size": Key("integer", "6553500"),
    "max_response_size": Key("integer", "6553500"),
    "job_queue_size": Key("integer", str(torchserve_defaults.JOB_QUEUE_SIZE)),
    "limit_max_image_pixels": _YES,
    "decode_input_request": _YES,
    "ts_open_inference_protocol": _NO,
    "ts_header_key_sequence_id": Key("text", "ts_request_sequence_id"),
    "ts_header_key_sequence_start": Key("text", "ts_request_sequence_start"),
    "ts_header_key_sequence_end": Key("text", "ts_request_sequence_end"),
    "number_of_netty_threads": Key("integer", "0"),
    "netty_client_threads": Key("integer", "0"),
    "prefer_direct_buffer": _NO,
    "use_native_io": _YES,
    "io_ratio": Key("integer", "50"),
    # what is told
    "enable_metrics_api": _YES,
    "metrics_mode": Key("choice", "log", choices=("log", "prometheus", "legacy")),
    "metrics_config": Key("text", "ts/configs/metrics.yaml"),
    "model_metrics_auto_detect": _NO,
    "metric_time_interval": Key("integer", "60"),
    "disable_system_metrics": _NO,
    "system_metrics_cmd": _UNSET,
    "async_logging": _NO,
    "cpp_log_config": _UNSET,
    "debug": _NO,
    "version": _UNSET,
    "model_server_home": _UNSET,
    # read by the command `torchserve` before Java starts
    "vmargs": _UNSET,
    "plugins_path": _UNSET,
}

MODEL_KEYS: dict[str, Kind] = {
    "defaultVersion": "boolean",
    "marName": "text",
    "minWorkers": "integer",
    "maxWorkers": "integer",
    "batchSize": "integer",
    "maxBatchDelay": "integer",
    "responseTimeout": "integer",
    "startupTimeout": "integer",
    "parallelLevel": "integer",
    "runtimeType": "text",
}
"""Of each version in `models={"NAME": {"VERSION": {...}}}`."""

CONFIG_KEYS = (
    "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "deviceType",
    "deviceIds", "parallelType", "parallelLevel", "torchrun", "maxRetryTimeoutInSec", "clientTimeoutInMills",
    "jobQueueSize", "useJobTicket", "sequenceMaxIdleMSec", "sequenceTimeoutMSec", "maxSequenceJobQueueSize",
    "maxNumSequence", "continuousBatching", "sequenceBatching", "asyncCommunication", "useVenv",
)  # fmt: skip
"""At the top of `model-config.yaml`."""
HANDLER_SECTIONS = ("handler", "dali", "deepspeed", "micro_batching", "pippy", "pt2")
"""What handlers read there, ours and TorchServe's own."""


def variable(key: str) -> str:
    """The environment variable that TorchServe takes instead where `enable_envvars_config=true`."""
    if key == "token_expiration_min":
        return "TS_TOKEN_EXPIRATION_TIME_MIN"
    return key.upper() if key.startswith("ts_") else f"TS_{key.upper()}"
