"""Start TorchServe from a run directory and wait until every model is ready."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil

from archive.content import ArchiveContent
from archive.errors import ArchiveError, SignatureError
from archive.verify import opened
from client.errors import ClientError, NotReady
from client.torchserve import TorchServe
from server import effective, environment, forkserver, processes, store
from server.config import ROOT, ServerConfig
from server.effective import ModelSettings
from server.environment import LogFormat
from server.errors import AlreadyRunning, ConfigError, StartFailed
from server.failures import StartLogs
from system.printable import printable

LOG_CONFIG = ROOT / "config" / "log4j2.xml"
_LAUNCHER = """
import sys
sys.path = [folder for folder in sys.path if folder]
sys.executable = sys.argv.pop(1)
from ts import model_server
model_server.platform.system = lambda: "Windows"  # elsewhere the run directory begins Java's class path
model_server.start()
"""
"""TorchServe's own. Its first argument is what Java starts workers with in place of Python.

Neither Python nor Java loads code from the run directory."""
WORKER_PROGRAM = Path(__file__).with_name("worker.sh")
_LOOK_INTERVAL_S = 1.0
_POLL_INTERVAL_S = 0.05
_APPEAR_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RunningServer:
    """Where a started server is to be found."""

    inference_url: str
    management_url: str
    metrics_url: str
    key_file: Path
    models: dict[str, int]
    """Ready workers of each model."""

    def client(self, timeout_s: float = 60.0) -> TorchServe:
        """A client of it that waits so long for one answer."""
        return TorchServe(self.inference_url, self.management_url, self.key_file, timeout_s)


def start(
    run_dir: Path,
    model_store: Path,
    config_file: Path,
    first_port: int | None = None,
    timeout_s: float = 120.0,
    log_format: LogFormat = "text",
    foreground: bool = False,
    model_api: bool = False,
) -> RunningServer:
    """Start a server with the archives of `model_store`, token authorization on, and wait until all are ready.

    What of the store is not served, and what of an archive's settings counts for nothing, is said on stderr.

    Args:
        run_dir: its working directory; tokens and logs are written there.
        config_file: TorchServe's `.properties`.
        first_port: serve on five ports from this one instead of those in `config_file`.
        log_format: of its logs, text or an object of JSON a line.
        foreground: its logs are shown as well.
        model_api: models can be registered and removed, whatever `config_file` says.

    Raises:
        ServerError: nothing is left running.
    """
    refuse_a_second(run_dir)
    processes.check_temp_dir(run_dir)
    environment.public_key()
    archives, warnings = store.archives(model_store)
    if not archives:
        raise ConfigError(f"no archive in {model_store}: scripts/archive.sh RUN_FOLDER puts one there")
    config = ServerConfig.read(config_file).with_absolute_paths()
    archives, models, refused = _good(archives, config)
    warnings += [*processes.others_who_write(run_dir), *refused]
    warnings += [f"{model.name}: {note}" for model in models for note in model.notes]
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if first_port is not None:
        config = config.on_ports(first_port)
    if model_api:
        config = config.with_model_api()
    config.check_ports()

    variables = environment.for_server(run_dir, log_format, foreground, config.properties.variables)

    processes.clear(run_dir)  # what an earlier server that was killed may have left
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "console.log").unlink(missing_ok=True)
    temp = processes.make_temp_dir(run_dir)
    effective_config = temp / "config.properties"
    config = config.without_variables_in_workers()
    effective_config.write_text(config.text, encoding="utf-8")
    forks = environment.for_forks(variables, config.properties)
    command = (
        sys.executable, "-c", _LAUNCHER, sys.executable if forks is None else str(WORKER_PROGRAM), "--start", "--ncs",
        "--model-store", str(model_store.resolve()),
        "--models", *(f"{archive.name}={archive.path.name}" for archive in archives),
        "--ts-config", str(effective_config), "--log-config", str(LOG_CONFIG),
    )  # fmt: skip
    said = StartLogs.begin(logs)
    try:
        _run(command, run_dir, variables, foreground)
        process = _await_process(run_dir)
        if process is not None and forks is not None:
            _run(forkserver_command(temp, process.pid), run_dir, forks, foreground)
        return _wait(run_dir, process, config, [archive.name for archive in archives], timeout_s, said)
    except BaseException:
        processes.clear(run_dir)
        raise


def refuse_a_second(run_dir: Path) -> None:
    """Raises:
    AlreadyRunning: this run directory has a server, or somebody who keeps one up.
    """
    if found := processes.find_supervisor(run_dir) or processes.find(run_dir):
        raise AlreadyRunning(f"a server runs in {run_dir.resolve()} (pid {found.pid}): scripts/stop.sh stops it")


def _good(
    archives: Sequence[ArchiveContent], config: ServerConfig
) -> tuple[list[ArchiveContent], list[ModelSettings], list[str]]:
    """The archives that are as they were built, what each is served with, and a line for each of the others.

    Raises:
        ConfigError: one is not signed though it must be, or none is left.
    """
    good, models, refused = [], [], []
    for archive in archives:
        try:
            with opened(archive.path, environment.public_key()) as (_, content):
                models.append(effective.settings(config.properties, content))
            good.append(archive)
        except SignatureError as error:
            raise ConfigError(str(error)) from None
        except (ArchiveError, ConfigError) as error:
            refused.append(str(error))
    if not good:
        raise ConfigError("; ".join(refused))
    return good, models, refused


def forkserver_command(temp: Path, java_pid: int) -> tuple[str, ...]:
    """What forks the workers of this Java; the command returns once it can be asked."""
    return (sys.executable, "-u", forkserver.__file__, "serve", str(temp / "fork.sock"), str(java_pid))


def _run(command: Sequence[str], run_dir: Path, variables: Mapping[str, str], foreground: bool) -> None:
    """Run what leaves a process behind, in a session of its own: Ctrl-C is for the process that watches."""
    console = None if foreground else (run_dir / "logs" / "console.log").open("ab")
    with console or nullcontext():
        subprocess.run(
            command, cwd=run_dir, env=variables, stdin=subprocess.DEVNULL, stdout=console,
            stderr=console and subprocess.STDOUT, start_new_session=True, check=False,
        )  # fmt: skip


def _wait(
    run_dir: Path,
    process: psutil.Process | None,
    config: ServerConfig,
    models: list[str],
    timeout_s: float,
    said: StartLogs,
) -> RunningServer:
    server = RunningServer(
        config.value("inference_address"),
        config.value("management_address"),
        config.value("metrics_address"),
        run_dir / "key_file.json",
        models={},
    )
    client = server.client()
    deadline = time.monotonic() + timeout_s
    for model in models:
        while model not in server.models:
            if process is None or not processes.is_alive(process):
                raise StartFailed(f"TorchServe ended: {_last_line(run_dir / 'logs' / 'console.log')}")
            if failure := said.failure():
                raise StartFailed(failure)
            try:
                server.models[model] = client.wait_until_ready(model, timeout_s=_LOOK_INTERVAL_S)
            except ClientError as error:
                if time.monotonic() > deadline:
                    # After one look; this was the last of many.
                    awaited = str(error).partition(": ")[2] if isinstance(error, NotReady) else str(error)
                    raise StartFailed(f"{model} is not ready after {timeout_s:g} s: {awaited}") from None
    return server


def _await_process(run_dir: Path) -> psutil.Process | None:
    """The server's process, which the launcher leaves behind before Java has taken its name; None if none appears."""
    deadline = time.monotonic() + _APPEAR_TIMEOUT_S
    while (process := processes.find(run_dir)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL_S)
    return process


def _last_line(log: Path) -> str:
    """What was said last, apart from the lines of a stack trace."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.strip() and not line[0].isspace()]
    return f"{said[-1]} ({log})" if said else f"see the lines above, or {log.parent}"
