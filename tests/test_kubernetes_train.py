"""The Job that trains on two machines: Kubernetes takes it, its pods find each other, and may do no more than that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from torch.distributed import run as torchrun

from tests.manifests import Manifest, build, checkov, one, validate, write
from train import __main__ as train_command
from train import recipe_names

pytestmark = pytest.mark.process

KINDS = ["Job", "NetworkPolicy", "Service"]


@pytest.fixture
def manifests() -> list[Manifest]:
    return build("train")


def container(manifests: list[Manifest]) -> Manifest:
    [only] = one(manifests, "Job")["spec"]["template"]["spec"]["containers"]
    return dict(only)


def test_manifests_are_kubernetes_own(manifests: list[Manifest], tmp_path: Path) -> None:
    """Strict validation passes them, and not with a key misspelt."""
    assert sorted(manifest["kind"] for manifest in manifests) == KINDS
    finished = validate(manifests, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    job = one(manifests, "Job")["spec"]
    job["completionsMode"] = job.pop("completionMode")
    assert validate(manifests, tmp_path).returncode != 0


@pytest.mark.slow
def test_pods_are_confined(manifests: list[Manifest], tmp_path: Path) -> None:
    """checkov has no findings, and has some where a container may do more."""
    for careless in (False, True):
        if careless:
            one(manifests, "Job")["spec"]["template"]["spec"]["containers"][0]["securityContext"] = {"privileged": True}
        write(manifests, tmp_path / "manifests.yaml")
        found = checkov(tmp_path)
        assert ("CKV_K8S_16:" in found) == careless, found
        assert ("FAILED for resource" in found) == careless, found
    assert re.search(r"Passed checks: \d\d", found), found


def test_its_command_is_understood(manifests: list[Manifest]) -> None:
    """By torchrun and by `python -m train`; the run is resumed, and every mount is of a volume."""
    command, *arguments = container(manifests)["args"]
    assert command == "torchrun"
    launched = torchrun.parse_args(arguments)
    assert (launched.rdzv_backend, launched.module, launched.training_script) == ("c10d", True, "train")
    context = typer.main.get_command(train_command.app).make_context("train", list(launched.training_script_args))
    assert context.params["recipe_name"] in recipe_names()
    assert context.params["resume"]
    with pytest.raises(Exception, match="--resum"):
        typer.main.get_command(train_command.app).make_context("train", ["lenet5-digits", "--resum"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifests)["volumeMounts"]}
    assert context.params["runs"].is_relative_to(mounts["training"])
    assert mounts.keys() == {volume["name"] for volume in one(manifests, "Job")["spec"]["template"]["spec"]["volumes"]}


def test_pods_find_each_other(manifests: list[Manifest]) -> None:
    """As many as torchrun waits for, the second of them under the name that the headless Service gives it."""
    job, service = one(manifests, "Job"), one(manifests, "Service")
    launched = torchrun.parse_args(container(manifests)["args"][1:])
    assert int(launched.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    host = f"{job['metadata']['name']}-1.{service['metadata']['name']}"
    assert launched.rdzv_endpoint.partition(":")[0] == host
    assert launched.rdzv_conf == "is_host=$(JOB_COMPLETION_INDEX)", "which is 0 or 1"
    labels = job["spec"]["template"]["metadata"]["labels"].items()
    policy = one(manifests, "NetworkPolicy")["spec"]
    assert service["spec"]["selector"].items() <= labels
    assert policy["podSelector"]["matchLabels"].items() <= labels
    [[own]] = [rule["from"] for rule in policy["ingress"]]
    assert own["podSelector"]["matchLabels"].items() <= labels
