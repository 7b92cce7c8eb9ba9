"""What TorchServe would swallow in a configuration is refused, and what it makes of the rest is shown."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import ts
import yaml

from server import effective, launch, properties
from server.config import ServerConfig
from server.effective import ModelSettings
from server.errors import ConfigError, PortTaken
from server.keys import CONFIG_KEYS, KEYS, MODEL_KEYS, PORT_KEYS, variable
from server.launch import RunningServer
from server.store import archives
from tests.broken import repacked
from tests.conftest import CONFIG, MODEL, ROOT, free_ports, started

LAUNCHER_KEYS = {"vmargs", "plugins_path"}
NOT_KEYS = {
    "MODEL_METRICS_LOGGER", "MODEL_LOGGER", "MODEL_SERVER_METRICS_LOGGER", "MODEL_SERVER_TELEMETRY_LOGGER",
    "METRIC_FORMAT_PROMETHEUS", "DEFAULT_TS_ALLOWED_URLS",
    "DEFAULT_REQUEST_SEQUENCE_ID", "DEFAULT_REQUEST_SEQUENCE_START", "DEFAULT_REQUEST_SEQUENCE_END",
}  # fmt: skip
"""Constants of ConfigManager that are no keys."""


def class_constants(data: bytes) -> dict[str, str]:
    """The String constants of a Java class: name of the field → value, as the class file format lays them out."""
    texts: dict[int, str] = {}
    strings: dict[int, int] = {}
    sizes = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4, 19: 2, 20: 2}
    (count,) = struct.unpack_from(">H", data, 8)
    at, index = 10, 1
    while index < count:
        tag = data[at]
        if tag == 1:
            (length,) = struct.unpack_from(">H", data, at + 1)
            texts[index] = data[at + 3 : at + 3 + length].decode()
            at += 3 + length
        else:
            if tag == 8:
                (strings[index],) = struct.unpack_from(">H", data, at + 1)
            at += 1 + sizes[tag]
        index += 2 if tag in (5, 6) else 1
    (interfaces,) = struct.unpack_from(">H", data, at + 6)
    at += 8 + 2 * interfaces
    (fields,) = struct.unpack_from(">H", data, at)
    at += 2
    found = {}
    for _ in range(fields):
        _, name, _, attributes = struct.unpack_from(">HHHH", data, at)
        at += 8
        for _ in range(attributes):
            attribute, length = struct.unpack_from(">HI", data, at)
            if texts[attribute] == "ConstantValue":
                (value,) = struct.unpack_from(">H", data, at + 6)
                if value in strings:
                    found[texts[name]] = texts[strings[value]]
            at += 6 + length
    return found


@pytest.fixture(scope="module")
def constants() -> dict[str, str]:
    """Those of the ConfigManager that is installed."""
    [jar] = Path(ts.__file__).parent.glob("frontend/model-server.jar")
    with zipfile.ZipFile(jar) as archive:
        return class_constants(archive.read("org/pytorch/serve/util/ConfigManager.class"))


def test_the_known_keys_are_those_of_the_installed_torchserve(constants: dict[str, str]) -> None:
    """No key is missing from our list, and none is invented."""
    read = {value for name, value in constants.items() if name not in NOT_KEYS}
    assert set(KEYS) - LAUNCHER_KEYS == read
    assert constants["DEFAULT_TS_ALLOWED_URLS"] == KEYS["allowed_urls"].default


def holds_text(data: bytes, text: str) -> bool:
    """Whether a Java class has that very text among its constants."""
    return b"\x01" + struct.pack(">H", len(text)) + text.encode() in data


def test_the_keys_of_models_are_those_of_the_installed_torchserve() -> None:
    """In the key `models` and at the top of an archive's YAML, as their classes read them."""
    [jar] = Path(ts.__file__).parent.glob("frontend/model-server.jar")
    with zipfile.ZipFile(jar) as archive:
        model = archive.read("org/pytorch/serve/wlm/Model.class")
        config = archive.read("org/pytorch/serve/archive/model/ModelConfig.class")
    found = {value for name, value in class_constants(model).items() if name != "DEFAULT_DATA_QUEUE"}
    assert found == set(MODEL_KEYS)
    assert [key for key in CONFIG_KEYS if not holds_text(config, key)] == []
    assert not holds_text(config, "minWorker")


def test_the_variables_are_those_of_the_installed_torchserve(constants: dict[str, str]) -> None:
    """A key's environment variable is the name of its constant."""
    named = {value: name for name, value in constants.items() if name.startswith("TS_")}
    assert len(named) > 50
    assert {key: variable(key) for key in named} == named


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_we_ship_is_taken(device: str) -> None:
    """Both files pass, and every port is written out."""
    read = properties.read(CONFIG.parent / f"config.{device}.properties")
    assert read.refusals == []
    assert set(PORT_KEYS) <= set(read.values)


def test_every_default_that_we_write_out_is_torchserves(constants: dict[str, str]) -> None:
    """Lines that state a default state the right one; the others are known by name."""
    read = properties.read(CONFIG)
    changed = {key for key, value in read.values.items() if value.text != KEYS[key].default}
    assert changed == {
        "allowed_urls", "async_logging", "metrics_config", "metrics_mode", "number_of_gpu",
        "ts_open_inference_protocol", "vmargs",
    }  # fmt: skip


REFUSED = {
    "unknown key": ("job_queue_sizes=5", "f:1: job_queue_sizes: .*did you mean job_queue_size"),
    "trailing blank": ("enable_model_api=false ", "f:1: enable_model_api: blank after the value"),
    "blank before =": ("enable_model_api =false", "f:1: enable_model_api: blank beside the ="),
    "blank after =": ("enable_model_api= false", "f:1: enable_model_api: blank beside the ="),
    "no value": ("\n\nenable_model_api", "f:3: 'enable_model_api': expected KEY=VALUE"),
    "not a boolean": ("async_logging=yes", "f:1: async_logging=yes: expected true or false"),
    "not an integer": ("job_queue_size=many", "f:1: job_queue_size=many: expected a whole number"),
    "too large an integer": ("job_queue_size=2147483648", "expected a whole number"),
    "negative": ("job_queue_size=-1", "expected a whole number"),
    "not a number": ("token_expiration_min=1h", "expected a number"),
    "not an address": ("inference_address=127.0.0.1:8080", "f:1: inference_address=127.0.0.1:8080: expected http://"),
    "not a port": ("grpc_inference_port=70000", "expected a port"),
    "not a mode": ("metrics_mode=on", "expected log or prometheus or legacy"),
    "not JSON": ("models={", "f:1: models={: expected a JSON object"),
    "no model": ('models={"a": 3}', r"f:1: models: a: 3: expected \{\"NAME\": \{\"VERSION\""),
    "no version": ('models={"a": {"minWorkers": 3}}', r"f:1: models: a minWorkers: 3: expected \{\"NAME\""),
    "unknown key of a model": ('models={"a": {"1.0": {"minWorker": 3}}}', "minWorker: .*mean minWorkers"),
    "wrong type of a model": ('models={"a": {"1.0": {"batchSize": "8"}}}', "a 1.0: batchSize: '8': expected a whole"),
    "no such variable": ("keystore_pass=$$NOBODY_SETS_THIS$$", r"keystore_pass=\.\.\.: .* NOBODY_SETS_THIS"),
    "another encoding": ("keystore=schlüssel", "f:1: keystore: .*uXXXX"),
    "equal ports": ("metrics_address=http://127.0.0.1:8081", "metrics_address and management_address .* 8081"),
    "a port taken by a default": ("grpc_inference_port=8080", "f:1: .*8080; expected five different ports"),
    "open without tokens": (
        "inference_address=http://0.0.0.0:8080\ndisable_token_authorization=true",
        "f:2: disable_token_authorization=true while f:1 has inference_address",
    ),
    "without tokens": ("disable_token_authorization=true", "f:1: .*=true: our start, client and edge go by tokens"),
    "CORS": ("cors_allowed_origin=*", "f:1: cors_allowed_origin: .* OPTIONS, .*cors.conf"),
    "open gRPC without tokens": (
        "disable_token_authorization=true\ngrpc_management_address=::",
        "f:1: .* f:2 has grpc_management_address",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torchserve_would_swallow_is_refused(name: str) -> None:
    """One refusal for one fault, with file, line, key and what was expected."""
    text, complaint = REFUSED[name]
    read = properties.parse(text, "f")
    with pytest.raises(ConfigError, match=complaint):
        read.check()
    assert len(read.refusals) == 1


TAKEN = [
    "",
    "# comment\n! another\n\n",
    "async_logging=TRUE",
    "token_expiration_min=0.5",
    "job_queue_size=5\njob_queue_size=6",
    "inference_address=http://0.0.0.0:8080",
    "inference_address=unix:/tmp/inference.sock",
    "inference_address=https://localhost:8443",
    "grpc_inference_max_connection_age_ms=9223372036854775807",
    'models={\\\n  "a": {\\\n    "1.0": {"minWorkers": 2}\\\n  }\\\n}',
]


@pytest.mark.parametrize("text", TAKEN)
def test_what_torchserve_understands_is_taken(text: str) -> None:
    """The negative control: no refusal where there is no fault."""
    assert properties.parse(text, "f").refusals == []


def test_the_environment_counts_where_the_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With enable_envvars_config a variable wins and is checked like a line; without, it is not looked at."""
    monkeypatch.setenv("TS_JOB_QUEUE_SIZE", "many")
    assert properties.parse("job_queue_size=5", "f").get("job_queue_size") == "5"
    read = properties.parse("job_queue_size=5\nenable_envvars_config=true", "f")
    assert read.refusals == ["environment TS_JOB_QUEUE_SIZE: job_queue_size=many: expected a whole number of 0 or more"]


def archive(store: Path, config: object, name: str = "model") -> Path:
    """An archive with nothing but what TorchServe reads before it starts a worker."""
    manifest = {"model": {"modelName": name, "modelVersion": "1.0"}}
    path = store / f"{name}.mar"
    with zipfile.ZipFile(path, "w") as members:
        if config is not None:
            manifest["model"]["configFile"] = "model-config.yaml"
            members.writestr("model-config.yaml", config if isinstance(config, str) else yaml.safe_dump(config))
        members.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return path


DECLARED = 'models={"model": {"1.0": {"minWorkers": 2, "maxWorkers": 3, "batchSize": 4, "responseTimeout": 7}}}'
PRECEDENCE = {
    "nothing said": (None, "", {"workers": 5, "max_workers": 5, "batch_size": 1, "batch_delay_ms": 100}),
    "by the key models": (None, DECLARED, {"workers": 2, "max_workers": 3, "batch_size": 4, "response_timeout_s": 7}),
    "the archive wins": (
        {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 2, "jobQueueSize": 9}, DECLARED,
        {"workers": 1, "max_workers": 1, "batch_size": 8, "batch_delay_ms": 2, "job_queue_size": 9},
    ),
    "a delay of 0": ({"maxBatchDelay": 0}, "", {"batch_delay_ms": 100}),
    "minWorkers alone": ({"minWorkers": 1}, "", {"workers": 5, "max_workers": 5}),
    "maxWorkers alone": ({"maxWorkers": 2}, "", {"workers": 5, "max_workers": 5}),
    "a minimum of 0": ({"minWorkers": 0, "maxWorkers": 2}, "", {"workers": 1, "max_workers": 2}),
    "a batch size of 0": ({"batchSize": 0}, DECLARED, {"batch_size": 1}),
    "0 by the key models": (
        None, 'models={"model": {"1.0": {"minWorkers": 0, "batchSize": 0}}}', {"workers": 5, "batch_size": 1},
    ),
    "timeouts of the file": (None, "default_response_timeout=9", {"response_timeout_s": 9, "startup_timeout_s": 120}),
    "timeouts are ignored": ({"batchSize": 2}, "default_response_timeout=9", {"response_timeout_s": 120}),
    "timeouts of the archive": ({"responseTimeout": 3}, "default_response_timeout=9", {"response_timeout_s": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRECEDENCE)
def test_the_order_is_torchserves(tmp_path: Path, name: str) -> None:
    """The archive's YAML wins over the key `models`, and that over the other keys; what differs is noted."""
    config, text, expected = PRECEDENCE[name]
    archive(tmp_path, config)
    read = properties.parse(f"default_workers_per_model=5\n{text}", "f")
    assert read.refusals == []
    model = effective.settings(read, *archives(tmp_path)[0])
    assert {key: getattr(model, key) for key in expected} == expected
    noted = {
        "a delay of 0", "minWorkers alone", "maxWorkers alone", "timeouts are ignored", "timeouts of the archive",
        "the archive wins", "a batch size of 0",
    }  # fmt: skip
    assert bool(model.notes) == (name in noted)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"batchSize": "8"}, "model.mar: model-config.yaml: batchSize: '8': expected a whole number"),
        ({"minWorkers": True}, "minWorkers: True"),
        ({"responseTimeout": -1}, "responseTimeout: -1"),
        ("a: [", "is not YAML"),
        ("- 1", "expected keys and values"),
    ],
)
def test_what_an_archive_says_in_vain_is_refused(tmp_path: Path, config: object, complaint: str) -> None:
    """TorchServe drops values of a wrong type, and starts workers that never load on YAML that it cannot read."""
    archive(tmp_path, config)
    with pytest.raises(ConfigError, match=complaint):
        effective.settings(properties.parse("", "f"), *archives(tmp_path)[0])


def test_unknown_keys_of_an_archive_are_noted(tmp_path: Path) -> None:
    """TorchServe swallows them; what a handler reads is its own."""
    archive(tmp_path, {"batchsize": 8, "minWorker": 1, "handler": {"top_k": 3}})
    model = effective.settings(properties.parse("", "f"), *archives(tmp_path)[0])
    assert model.notes == [
        "batchsize: TorchServe 0.12 knows no such key; did you mean batchSize?",
        "minWorker: TorchServe 0.12 knows no such key; did you mean minWorkers?",
    ]


def test_a_start_warns_of_what_counts_for_nothing(
    model_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The notes of `python -m server config`, a line each on stderr, and nothing for what we ship."""
    config = tmp_path / "f.properties"
    first = free_ports()
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        for text, warning in (("", ""), ("default_response_timeout=9\n", "default_response_timeout is ignored: ")):
            config.write_text(CONFIG.read_text() + text)
            with pytest.raises(PortTaken):
                launch.start(tmp_path / "run", model_store, config, first)
            said = capsys.readouterr().err
            assert said.startswith(f"warning: {MODEL}: {warning}" if warning else "")
            assert len(said.splitlines()) == bool(warning)


def test_the_model_api_is_on_when_asked_for() -> None:
    """Of what is shipped alone it is off; no file needs to be changed."""
    config = ServerConfig.read(CONFIG)
    assert not config.properties.is_true("enable_model_api")
    assert config.with_model_api().properties.is_true("enable_model_api")
    assert config.with_model_api().properties.refusals == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "config", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_the_command_shows_the_effective_values(tmp_path: Path) -> None:
    """The table has each key with where its value is from, and each archive; --json has the same."""
    archive(tmp_path, {"minWorkers": 1, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 0})
    shown = run(str(CONFIG), "--model-store", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["token_expiration_min", "60", "default"] in lines
    assert ["keystore_pass", "...", "default"] in lines
    [number] = [n for n, line in enumerate(CONFIG.read_text().splitlines(), 1) if line == "metrics_mode=prometheus"]
    assert ["metrics_mode", "prometheus", "line", str(number)] in lines
    assert ["model", "1.0", "1–2", "8", "100", "ms", "120", "s", "120", "s", "100"] in lines
    assert "model: maxBatchDelay 0 becomes 100 ms" in shown.stdout
    document = json.loads(run(str(CONFIG), "--model-store", str(tmp_path), "--json").stdout)
    assert set(document["settings"]) == set(KEYS)
    assert document["settings"]["metrics_mode"] == {
        "value": "prometheus", "default": "log", "from": f"{CONFIG}:{number}"
    }  # fmt: skip
    assert document["models"][0]["batch_delay_ms"] == 100


@pytest.mark.process
def test_the_command_refuses_in_lines(tmp_path: Path) -> None:
    """Every fault has its line on stderr, and the exit status is 1."""
    file = tmp_path / "broken.properties"
    file.write_text("job_queue_size=many\nunknown=1\nasync_logging=true \n")
    shown = run(str(file))
    assert shown.returncode == 1
    assert len(shown.stderr.splitlines()) == 3
    assert all(line.startswith(f"error: {file}:") for line in shown.stderr.splitlines())
    assert len(json.loads(run(str(file), "--json").stdout)["refusals"]) == 3
    missing = run(str(tmp_path / "none"))
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: cannot read")


def described(server: RunningServer, model: str = MODEL) -> dict[str, int]:
    """What a running server says of a model, in our words."""
    said = server.client().describe(model)
    queue = said["jobQueueStatus"]
    return {
        "workers": said["minWorkers"],
        "max_workers": said["maxWorkers"],
        "batch_size": said["batchSize"],
        "batch_delay_ms": said["maxBatchDelay"],
        "response_timeout_s": said["responseTimeout"],
        "startup_timeout_s": said["startupTimeout"],
        "job_queue_size": queue["remainingCapacity"] + queue["pendingRequests"],
    }


def foreseen(config: Path, store: Path) -> dict[str, int]:
    model = effective.settings(properties.read(config), *archives(store)[0])
    return numbers(model)


def numbers(model: ModelSettings) -> dict[str, int]:
    return {key: value for key, value in asdict(model).items() if isinstance(value, int)}


def test_a_running_server_is_as_foreseen(torchserve: RunningServer, model_store: Path) -> None:
    """The oracle: TorchServe's own description of what we ship."""
    assert described(torchserve).items() <= foreseen(CONFIG, model_store).items()


ODD = {
    "a delay of 0, minWorkers alone": (
        {"minWorkers": 1, "batchSize": 8, "maxBatchDelay": 0, "jobQueueSize": 7},
        {"minWorkers": 0, "maxWorkers": 3, "batchSize": 4},
        {"workers": 2, "max_workers": 3, "batch_size": 8, "batch_delay_ms": 100, "response_timeout_s": 120},
    ),
    "a batch size of 0, maxWorkers alone": (
        {"maxWorkers": 3, "batchSize": 0}, {"minWorkers": 1, "batchSize": 4, "maxBatchDelay": 9},
        {"workers": 1, "max_workers": 2, "batch_size": 1, "batch_delay_ms": 9},
    ),
}  # fmt: skip


def reconfigured(archive: Path, folder: Path, settings: dict[str, int] | None) -> Path:
    """The archive with these settings beside its handler's, or without a `model-config.yaml`."""

    def change(content: Path) -> None:
        file, manifest = content / "model-config.yaml", content / "MAR-INF" / "MANIFEST.json"
        if settings is not None:
            handler = yaml.safe_load(file.read_text())["handler"]
            file.write_text(yaml.safe_dump({**settings, "handler": handler}))
            return
        document = json.loads(manifest.read_text())
        del document["model"]["configFile"]
        manifest.write_text(json.dumps(document))

    folder.mkdir()
    return repacked(archive, folder, change)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("name", ODD)
def test_a_running_server_is_odd_as_foreseen(model_store: Path, tmp_path: Path, name: str) -> None:
    """The same where TorchServe does otherwise than what is written, in archive and file."""
    of_archive, of_models, odd = ODD[name]
    store = tmp_path / "store"
    reconfigured(model_store / f"{MODEL}.mar", store, of_archive)
    config = tmp_path / "odd.properties"
    of_file = (
        f"default_workers_per_model=2\ndefault_response_timeout=9\nmodels={json.dumps({MODEL: {'1.0': of_models}})}\n"
    )
    config.write_text(CONFIG.read_text() + of_file)
    expected = foreseen(config, store)
    assert odd.items() <= expected.items()
    with started(tmp_path / "run", store, config) as server:
        assert described(server).items() <= expected.items()
