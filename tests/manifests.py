"""The manifests of deploy/kubernetes as Kustomize builds them, and Kubernetes' own schemas to hold them against."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSION = "1.31"
# The namespace is named when the manifests are applied, the image's digest is the registry's to say, and what has the
# tag of a version need not be fetched again.
NOT_OURS = "CKV_K8S_21,CKV_K8S_43,CKV_K8S_15"
Manifest = dict[str, Any]


def program(name: str, how: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}: {how}, in an environment of its own that is on the PATH")
    return name


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)


def kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(program("kubectl", "install Kubernetes' kubectl"), "kustomize", folder)


def build(name: str) -> list[Manifest]:
    """The manifests of one of BUILT."""
    finished = kustomize(KUBERNETES / name)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "", "nothing of it is deprecated"
    return list(yaml.safe_load_all(finished.stdout))


def one(manifests: Iterable[Manifest], kind: str) -> Manifest:
    [found] = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def write(manifests: list[Manifest], path: Path) -> Path:
    path.write_text(yaml.safe_dump_all(manifests))
    return path


def checkov(folder: Path) -> str:
    """What checkov finds in the manifests of a folder."""
    command = program("checkov", "pip install checkov")
    options = ("--framework", "kubernetes", "--compact", "--quiet", "--skip-download", "--skip-check", NOT_OURS)
    return run(command, "--directory", folder, *options).stdout


def validate(manifests: list[Manifest], folder: Path) -> subprocess.CompletedProcess[str]:
    """By Kubernetes' schemas, which refuse what they do not know."""
    command = program("kubernetes-validate", "pip install kubernetes-validate")
    return run(command, "--strict", "--kubernetes-version", VERSION, write(manifests, folder / "manifests.yaml"))
