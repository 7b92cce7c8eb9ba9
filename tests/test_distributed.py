"""Several processes by torchrun reach what one process reaches with the same global batch, on one machine or on two.

Two machines are two network namespaces that a cable joins, each with processes of its own and one folder for both.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from archive.run_folder import RunFolder
from networks import models
from tests.conftest import MODEL, ROOT
from train.loop import LabelledTensors, Trainer
from train.recipe import TrainingSection

pytestmark = [pytest.mark.process, pytest.mark.slow]

# Without random changes of the images, whose draws differ from process to process, and with small steps: at the
# recipe's rate the loss falls so steeply that rounding grows to percents.
PLAIN = ("training.epochs=4", "training.learning_rate=0.01", "training.augmentation.rotation_degrees=0",
         "training.augmentation.translation=0", "training.augmentation.zoom=0")  # fmt: skip
OPTIONS = ["--accelerator", "cpu", *(argument for override in PLAIN for argument in ("--set", override))]
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
FIRST, SECOND = range(2)
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "PYTHONUNBUFFERED": "1",
    # PyTorch 2.15 otherwise has survivors look for the store of a first machine that is gone.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
TIMEOUT_S = 180
# Of 360 held-out images 3: rounding differs with the number of processes, and nothing else does.
ACCURACY_TOLERANCE = 0.01


def train(runs: Path, name: str, *launcher: str) -> Path:
    command = [sys.executable, *launcher, "-m", "train", MODEL, "--runs", str(runs), "--name", name, *OPTIONS]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return runs / name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process reaches."""
    return train(tmp_path_factory.mktemp("runs"), MODEL)


def assert_same(run: Path, undisturbed: Path) -> None:
    """The same losses, weights and held-out accuracy up to rounding, and nothing else left beside them."""
    metrics, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, undisturbed))
    for shared, alone in zip(metrics["history"], expected["history"], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert shared["val_acc1"] == pytest.approx(alone["val_acc1"], abs=0.02)
    assert metrics["test"]["acc1"] == pytest.approx(expected["test"]["acc1"], abs=ACCURACY_TOLERANCE)
    first, second = (load_file(folder / "weights.safetensors") for folder in (run, undisturbed))
    for key in first:
        assert torch.allclose(first[key], second[key], atol=1e-3), key
    assert list(run.parent.iterdir()) == [run]


def test_two_gloo_ranks_reach_what_one_rank_reaches(tmp_path: Path, undisturbed: Path) -> None:
    """From two processes of one machine that each see half of every batch."""
    assert_same(train(tmp_path, "two", *TWO_PROCESSES), undisturbed)


def train_in_two_processes(recipe: str, runs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """On the CPU, however they end."""
    command = [sys.executable, *TWO_PROCESSES, "-m", "train", recipe, "--runs", str(runs), "--accelerator", "cpu"]
    return subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_a_last_batch_of_one_image_does_not_stop_two_processes(tmp_path: Path) -> None:
    """1,293 images in batches of 34 leave one, which one process would lack. Only the first says what it wrote."""
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / RunFolder.recipe).touch()
    overrides = ("--set", "training.epochs=1", "--set", "training.batch_size=34")
    finished = train_in_two_processes(MODEL, tmp_path, "--overwrite", *overrides)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count(f"wrote {tmp_path / MODEL}") == 1
    assert json.loads((tmp_path / MODEL / "metrics.json").read_text())["data"]["train"] % 34 == 1


def test_data_that_is_missing_is_told_by_every_process(tmp_path: Path) -> None:
    """They load in turn, and none fails at waiting for another."""
    finished = train_in_two_processes("finetune", tmp_path)
    assert finished.returncode == 1
    assert "error: this recipe trains on your images: give --data FOLDER" in finished.stderr
    assert "monitoredBarrier" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


def evaluate_other_labels(fabric: Fabric) -> list[tuple[float, float]]:
    """What `Trainer.evaluate` gives in each process, all images being of the class that is the process's number."""
    torch.manual_seed(0)
    network, training = models.OWN["lenet5"](1, 2), TrainingSection(epochs=1, batch_size=2, learning_rate=1)
    trainer = Trainer(fabric, network, training, 2, RunFolder(Path("unused")))
    val = LabelledTensors(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.full((4,), fabric.global_rank))
    gathered = fabric.all_gather(torch.tensor(trainer.evaluate(val)))
    assert isinstance(gathered, torch.Tensor)
    return gathered.tolist()


def test_all_processes_go_by_the_first_ones_evaluation() -> None:
    """Where they measure otherwise they must not decide otherwise when to stop: those that go on would wait forever."""
    first, second = Fabric(accelerator="cpu", strategy="ddp_spawn", devices=2).launch(evaluate_other_labels)
    assert first == second


class Machines:
    """Starts a command on one of two machines, and ends what still runs when the test is over."""

    def __init__(self, namespaces: list[str], runs: Path, stack: ExitStack) -> None:
        self.namespaces, self.runs, self.stack = namespaces, runs, stack

    def start(self, machine: int, *launcher: str) -> subprocess.Popen[str]:
        """By torchrun with these options, and with a process namespace: killing it takes all its processes along."""
        confined = ["ip", "netns", "exec", self.namespaces[machine], "unshare", "--pid", "--fork", "--kill-child"]
        command = ["-m", "train", MODEL, "--runs", str(self.runs), *OPTIONS, "--resume"]
        with (self.runs.parent / f"log{machine}").open("a") as log:
            process = subprocess.Popen(
                [*confined, *TORCHRUN, *launcher, *command],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.stack.callback(self.end, process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def finish(self, *processes: subprocess.Popen[str]) -> str:
        """What they print until they end well."""
        output = "".join(process.communicate(timeout=TIMEOUT_S)[0] for process in processes)
        logs = "".join(path.read_text()[-3000:] for path in self.runs.parent.glob("log*"))
        assert [process.returncode for process in processes] == [0] * len(processes), logs
        return output


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("no ip or unshare: install Debian's packages iproute2 and util-linux")
    namespaces = [f"train-{os.getpid()}-{machine}" for machine in (FIRST, SECOND)]
    with ExitStack() as stack:
        for namespace in namespaces:
            added = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True, check=False)
            if added.returncode != 0:
                pytest.skip(f"no network namespaces, which need root: {added.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
        cable = f"link add eth0 netns {namespaces[FIRST]} type veth peer name eth0 netns {namespaces[SECOND]}"
        subprocess.run(["ip", *cable.split()], check=True)
        for namespace, address in zip(namespaces, ADDRESSES, strict=True):
            for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", namespace, *command.split()], check=True)
        (tmp_path / "runs").mkdir()
        yield Machines(namespaces, tmp_path / "runs", stack)


def test_two_machines_by_a_static_rendezvous(machines: Machines, undisturbed: Path) -> None:
    """Each is told its number and the address of the first."""
    static = ("--nnodes=2", f"--master-addr={ADDRESSES[FIRST]}", "--master-port=29500")
    machines.finish(*(machines.start(machine, *static, f"--node-rank={machine}") for machine in (FIRST, SECOND)))
    assert_same(machines.runs / MODEL, undisturbed)


@pytest.mark.parametrize("nodes", ["2", "1:2"])
def test_a_killed_machine_costs_nothing_but_time(machines: Machines, undisturbed: Path, nodes: str) -> None:
    """The one that writes is killed; it comes back, or with 1:2 the other goes on alone: from the last checkpoint."""
    elastic = (
        f"--nnodes={nodes}", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[SECOND]}:29400",
        "--rdzv-id=test",
    )  # fmt: skip

    def start(machine: int) -> subprocess.Popen[str]:
        # The host's own name does not lead to the addresses of the test: each is told its own, and who listens.
        conf = f"--rdzv-conf=is_host={machine},keep_alive_interval=1,last_call_timeout=5"
        return machines.start(machine, *elastic, conf, f"--local-addr={ADDRESSES[machine]}")

    first, second = start(FIRST), start(SECOND)
    assert first.stdout is not None
    assert any("epoch   2" in line for line in first.stdout), "training must be under way before a machine is lost"
    first.kill()
    first.wait()
    assert not (machines.runs / MODEL).exists()
    survivors = [second]
    if nodes == "2":
        survivors.append(start(FIRST))
    output = machines.finish(*survivors)
    assert "epoch   1" not in output, "it went on instead of starting again"
    assert "epoch   4" in output
    assert_same(machines.runs / MODEL, undisturbed)
