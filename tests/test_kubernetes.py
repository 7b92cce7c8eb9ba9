"""The manifests: built by Kustomize, held against Kubernetes' own schemas, and fitting each other and the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from client import __main__ as client_command
from client.edge import servers as edge_servers
from server import __main__ as server_command
from server import drain
from tests.conftest import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
BUILT = ["overlays/cpu", "overlays/gpu", "overlays/canary", "kserve"]
VERSION = "1.31"
# The namespace is named when the manifests are applied, the image's digest is the registry's to say, and what has the
# tag of a version need not be fetched again.
NOT_OURS = "CKV_K8S_21,CKV_K8S_43,CKV_K8S_15"
ADAPTER = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]

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


def pod(manifests: list[Manifest]) -> Manifest:
    """The pod that they make; of KServe's as much as its runtime and its service say of it."""
    if not any(manifest["kind"] == "ServingRuntime" for manifest in manifests):
        template: Manifest = one(manifests, "Deployment")["spec"]["template"]
        return template
    runtime, predictor = (one(manifests, kind)["spec"] for kind in ("ServingRuntime", "InferenceService"))
    own = ("model", "minReplicas", "maxReplicas")
    spec = {key: value for key, value in predictor["predictor"].items() if key not in own}
    return {
        "metadata": {"name": "classifier", "labels": runtime["labels"]},
        "spec": {**spec, "containers": runtime["containers"], "volumes": runtime["volumes"]},
    }


def checkable(manifests: list[Manifest]) -> list[Manifest]:
    """The same for tools that know no kinds of KServe's: its runtime as a pod."""
    known = [manifest for manifest in manifests if "kserve.io" not in manifest["apiVersion"]]
    if len(known) == len(manifests):
        return known
    return [*known, {"apiVersion": "v1", "kind": "Pod", **pod(manifests)}]


def write(manifests: list[Manifest], path: Path) -> Path:
    path.write_text(yaml.safe_dump_all(manifests))
    return path


def validate(manifests: list[Manifest], folder: Path) -> subprocess.CompletedProcess[str]:
    """By Kubernetes' schemas, which refuse what they do not know."""
    command = program("kubernetes-validate", "pip install kubernetes-validate")
    return run(command, "--strict", "--kubernetes-version", VERSION, write(manifests, folder / "manifests.yaml"))


@pytest.mark.parametrize("name", BUILT)
def test_manifests_are_kubernetes_own(name: str, tmp_path: Path) -> None:
    """Each overlay is built and passes strict validation."""
    finished = validate(checkable(build(name)), tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "passed for resource" in finished.stdout + finished.stderr


def container(manifests: list[Manifest]) -> Manifest:
    first: Manifest = pod(manifests)["spec"]["containers"][0]
    return first


def misspell(manifests: list[Manifest]) -> None:
    container(manifests)["readinesProbe"] = container(manifests).pop("readinessProbe")


def mistype(manifests: list[Manifest]) -> None:
    one(manifests, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] = "eight"


def leave_out(manifests: list[Manifest]) -> None:
    del one(manifests, "Deployment")["spec"]["selector"]


@pytest.mark.parametrize("break_it", [misspell, mistype, leave_out])
def test_a_broken_manifest_is_found(break_it: Callable[[list[Manifest]], None], tmp_path: Path) -> None:
    """The validation can fail: a misspelt key, a wrong type, a missing key."""
    manifests = build("overlays/cpu")
    break_it(manifests)
    assert validate(manifests, tmp_path).returncode != 0


def test_a_broken_overlay_is_not_built(tmp_path: Path) -> None:
    """Patches that find nothing to change are an error: the overlay gpu looks at what it replaces."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    deployment = tmp_path / "kubernetes" / "base" / "deployment.yaml"
    deployment.write_text(deployment.read_text().replace("            - cpu\n", "            - 'gpu'\n"))
    finished = kustomize(tmp_path / "kubernetes" / "overlays" / "gpu")
    assert finished.returncode != 0
    assert "value" in finished.stderr


def test_pods_are_confined(tmp_path: Path) -> None:
    """checkov has no findings in any overlay, and has some where a container may do more."""
    command = program("checkov", "pip install checkov")
    for name in BUILT:
        write(checkable(build(name)), tmp_path / f"{Path(name).name}.yaml")
    careless = build("overlays/cpu")
    container(careless)["securityContext"] = {"privileged": True}
    write(careless, tmp_path / "careless.yaml")
    finished = run(
        command, "--directory", tmp_path, "--framework", "kubernetes", "--compact", "--quiet", "--skip-download",
        "--skip-check", NOT_OURS,
    )  # fmt: skip
    assert re.search(r"Passed checks: \d{3}", finished.stdout), finished.stdout + finished.stderr
    assert set(re.findall(r"File: (\S+):", finished.stdout)) == {"/careless.yaml"}, finished.stdout
    assert "CKV_K8S_16:" in finished.stdout


@pytest.mark.parametrize("name", BUILT)
def test_every_mount_is_of_a_volume_and_every_volume_is_mounted(name: str) -> None:
    """No schema sees that."""
    spec = pod(build(name))["spec"]
    containers = spec["containers"] + spec.get("initContainers", [])
    mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("name", BUILT)
def test_the_server_understands_its_command(name: str) -> None:
    """Its arguments are those of `server start`, and its device is the overlay's; one that it does not know fails."""
    arguments = container(build(name))["args"]
    assert arguments[0] == "scripts/serve.sh"
    start = typer.main.get_command(server_command.app).commands["start"]  # type: ignore[attr-defined]
    context = start.make_context("start", list(arguments[1:]))
    assert context.params["foreground"]
    assert context.params["device"].value == ("gpu" if name.endswith("gpu") else "cpu")
    with pytest.raises(Exception, match="--fore"):
        start.make_context("start", [*arguments[1:], "--fore"])


@pytest.mark.parametrize("name", BUILT)
def test_a_pod_may_drain(name: str) -> None:
    """The edge ends after the last new request, the server after the edge, and nobody is killed before."""
    manifests = build(name)
    pauses = {
        container["name"]: int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        for container in pod(manifests)["spec"]["containers"]
        if container["name"] != "readiness"  # nobody waits for its answers
    }
    edge, server = pauses.pop("edge"), *pauses.values()
    assert server > edge
    grace = pod(manifests)["spec"]["terminationGracePeriodSeconds"]
    drain_timeout_s = 30
    assert grace >= server + drain_timeout_s + drain.FINISH_TIMEOUT_S + 30


def test_a_canary_gets_its_share_and_nothing_of_the_stable_pods() -> None:
    """One pod that the Service of the stable ones finds, and that their Deployment does not take for its own."""
    stable, canary = build("overlays/cpu"), build("overlays/canary")
    assert sorted(manifest["kind"] for manifest in canary) == ["ConfigMap", "Deployment"]
    assert not {manifest["metadata"]["name"] for manifest in stable} & {
        manifest["metadata"]["name"] for manifest in canary
    }
    deployments = [one(manifests, "Deployment") for manifests in (stable, canary)]
    for deployment in deployments:
        labels = deployment["spec"]["template"]["metadata"]["labels"].items()
        owners = [other for other in deployments if other["spec"]["selector"]["matchLabels"].items() <= labels]
        assert owners == [deployment]
        assert one(stable, "Service")["spec"]["selector"].items() <= labels
        assert one(stable, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels
        assert one(stable, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes(deployments, "archives")]
    assert claims == ["archives", "archives-canary"]


def volumes(deployments: list[Manifest], name: str) -> list[Manifest]:
    found = [volume for deployment in deployments for volume in deployment["spec"]["template"]["spec"]["volumes"]]
    return [volume for volume in found if volume["name"] == name]


def test_a_gpu_is_asked_for_where_one_is_used() -> None:
    """By the overlay gpu alone."""
    limits = {name: container(build(name))["resources"]["limits"] for name in BUILT}
    assert [name for name in BUILT if "nvidia.com/gpu" in limits[name]] == ["overlays/gpu"]


@pytest.mark.parametrize("name", ["base", "kserve"])
def test_the_edge_takes_its_servers(name: str) -> None:
    """servers.yaml is valid, and key and ready file are where the server of the same pod writes them."""
    [server] = edge_servers.read(KUBERNETES / name / "servers.yaml").servers
    arguments = container(build("overlays/cpu" if name == "base" else name))["args"]
    [run_dir] = (argument.partition("=")[2] for argument in arguments if argument.startswith("--run-dir="))
    assert str(server.key_file) == f"{run_dir}/key_file.json"
    assert str(server.ready_file) == f"{run_dir}/logs/ready"


@pytest.mark.parametrize("name", ["base", "kserve"])
def test_the_edge_reaches_its_golden_images(name: str) -> None:
    """What servers.yaml names lies in a volume that the edge's container has."""
    config = edge_servers.read(KUBERNETES / name / "servers.yaml")
    spec = pod(build("overlays/cpu" if name == "base" else name))["spec"]
    [edge] = (container for container in spec["containers"] if container["name"] == "edge")
    mounted = [Path(mount["mountPath"]) for mount in edge["volumeMounts"]]
    assert config.models
    for place in config.models.values():
        assert place is not None
        assert any(place.is_relative_to(path) for path in mounted)


def mebibytes(quantity: str) -> float:
    """Of a quantity such as 64Mi."""
    return float(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


@pytest.mark.parametrize("name", BUILT)
def test_bodies_are_on_a_disk_that_holds_them(name: str) -> None:
    """All that the edge's limits let one address send at a time, twice: what the memory of `run/` would not hold."""
    spec = pod(build(name))["spec"]
    [edge] = (container for container in spec["containers"] if container["name"] == "edge")
    mounts = {mount["mountPath"]: mount["name"] for mount in edge["volumeMounts"]}
    volumes = {volume["name"]: volume.get("emptyDir") for volume in spec["volumes"]}
    conf = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
    [temp] = set(re.findall(r"_temp_path (\S+);", conf))
    [connections], [body_bytes] = re.findall(r"limit_conn \w+ (\d+);", conf), re.findall(r"max_body_size (\d+);", conf)
    needed = 2 * int(connections) * int(body_bytes) / 2**20
    bodies, run = (volumes[mounts[f"/app/deploy/nginx/{place}"]] for place in (temp, "run"))
    assert "medium" not in bodies
    assert mebibytes(bodies["sizeLimit"]) > needed
    assert run["medium"] == "Memory"
    assert mebibytes(run["sizeLimit"]) < needed


@pytest.mark.parametrize("name", BUILT)
def test_ports_are_those_that_are_listened_on(name: str) -> None:
    """The edge's of listen.conf, and the metrics' of the image's configuration."""
    manifests = build(name)
    [port] = re.findall(r"^listen (\d+)", one(manifests, "ConfigMap")["data"]["listen.conf"], flags=re.MULTILINE)
    listed = [port for container in pod(manifests)["spec"]["containers"] for port in container.get("ports", [])]
    assert int(port) in {one["containerPort"] for one in listed}
    assert "http://0.0.0.0:8082|' config/" in (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert {one["name"]: one["containerPort"] for one in listed}["metrics"] == 8082
    for manifest in manifests:
        used = re.findall(r"(?:port|targetPort): ([a-z]\w+)", yaml.safe_dump(manifest))
        assert set(used) <= {one["name"] for one in listed}


@pytest.mark.parametrize("name", BUILT)
def test_the_readiness_server_looks_at_what_the_edge_looks_at(name: str) -> None:
    """Its command is understood, its port is the one that it listens on, and model, golden images, key file fit."""
    manifests = build(name)
    [readiness] = (one for one in pod(manifests)["spec"]["containers"] if one["name"] == "readiness")
    assert readiness["args"][:4] == ["python", "-m", "client", "ready"]
    command = typer.main.get_command(client_command.app).commands["ready"]  # type: ignore[attr-defined]
    options = command.make_context("ready", readiness["args"][4:]).params
    assert (options["http_host"], options["http"]) == ("0.0.0.0", readiness["ports"][0]["containerPort"])
    config = edge_servers.read(KUBERNETES / ("kserve" if name == "kserve" else "base") / "servers.yaml")
    assert config.models == {options["model"]: options["golden_folder"]}
    assert config.tolerance == options["tolerance"]
    mounted = [Path(mount["mountPath"]) for mount in readiness["volumeMounts"]]
    for place in (options["golden_folder"], config.servers[0].key_file):
        assert any(place.is_relative_to(path) for path in mounted)
    with pytest.raises(Exception, match="--htp"):
        command.make_context("ready", [*readiness["args"][4:], "--htp=8090"])


def discovered(job: str, manifests: list[Manifest], folder: Path) -> list[tuple[str, dict[str, str]]]:
    """Address and labels that Prometheus gives a pod as one of the job's targets, one for each port that it keeps."""
    template = pod(manifests)
    label = {f"__meta_kubernetes_pod_label_{re.sub(r'[./-]', '_', key)}": value
             for key, value in template["metadata"]["labels"].items()}  # fmt: skip
    found = [
        {
            "targets": [f"10.0.0.1:{port['containerPort']}"],
            "labels": {
                **label,
                "__meta_kubernetes_pod_container_port_name": port["name"],
                "__meta_kubernetes_pod_name": "classifier-1",
                "__meta_kubernetes_namespace": "default",
            },
        }
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    ]
    config = yaml.safe_load((KUBERNETES / "prometheus.yaml").read_text())
    for scraped in config["scrape_configs"]:
        # Debian's Prometheus does not know Kubernetes: it is given what the other would find.
        assert scraped.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        scraped["static_configs"] = found
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    finished = run(promtool(), "check", "service-discovery", path, job, "--timeout=1s")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    targets = (target["labels"] for target in json.loads(finished.stdout))
    return [
        (labels["__address__"], {key: value for key, value in labels.items() if not key.startswith("__")})
        for labels in targets
        if labels
    ]


@pytest.mark.parametrize("name", BUILT)
def test_prometheus_finds_the_pods(name: str, tmp_path: Path) -> None:
    """Metrics and readiness of a pod are one instance of the rules' two jobs; another program's pod is left alone."""
    manifests = build(name)
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    ports = {"torchserve": 8082, "readiness": 8091 if name == "kserve" else 8090}
    assert set(re.findall(r'job="(\w+)"', rules)) == set(ports)
    for job, port in ports.items():
        labels = {"job": job, "instance": "classifier-1", "pod": "classifier-1", "namespace": "default"}
        assert discovered(job, manifests, tmp_path) == [(f"10.0.0.1:{port}", labels)]
    pod(manifests)["metadata"]["labels"]["app.kubernetes.io/name"] = "another"
    assert discovered("torchserve", manifests, tmp_path) == []


def test_prometheus_is_let_in() -> None:
    """To what it asks for, and from its namespace alone."""
    rules = one(build("overlays/cpu"), "NetworkPolicy")["spec"]["ingress"]
    opened = {port["port"]: bool(rule.get("from")) for rule in rules for port in rule["ports"]}
    assert opened == {"https": False, "metrics": True, "readiness": True}


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    """By the same name."""
    [metric] = one(build("overlays/cpu"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [rule["name"]["as"] for rule in ADAPTER] == [metric["pods"]["metric"]["name"]]


def promtool() -> str:
    home = os.environ.get("PROMETHEUS_HOME", "")
    found = shutil.which("promtool") or shutil.which("promtool", path=f"{home}{os.pathsep}{home}/usr/bin")
    if found is None:
        pytest.skip("no promtool: install Debian's package prometheus")
    return found


def queue_test(expected: float) -> Manifest:
    """A unit test of the adapter's query for promtool: a pod whose requests wait 0.4 s, and one that nobody asks."""
    [query] = (rule["metricsQuery"] for rule in ADAPTER)
    query = query.replace("<<.LabelMatchers>>", 'namespace="default"').replace("<<.GroupBy>>", "pod")
    series = {
        "ts_queue_latency_microseconds": {"busy": "0+6e6x8", "idle": "5e6x8"},
        "ts_inference_requests_total": {"busy": "0+15x8", "idle": "15x8"},
    }
    return {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": f'{metric}{{namespace="default", pod="{pod}"}}', "values": values}
                    for metric, pods in series.items()
                    for pod, values in pods.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "2m",
                        "exp_samples": [
                            {"labels": '{pod="busy"}', "value": expected},
                            {"labels": '{pod="idle"}', "value": 0},
                        ],
                    }
                ],
            }
        ],
    }


def test_the_queue_time_is_that_of_a_pod(tmp_path: Path) -> None:
    """The adapter's query gives seconds a request, and 0 for a pod without requests."""
    for expected, passes in ((0.4, True), (0.5, False)):
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(queue_test(expected)))
        finished = run(promtool(), "test", "rules", tmp_path / "test.yaml")
        assert (finished.returncode == 0) == passes, finished.stdout + finished.stderr
