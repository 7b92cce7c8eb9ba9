"""The manifests: built by Kustomize, held against Kubernetes' own schemas, and fitting each other and the server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import typer
import yaml

from operate import __main__ as operate_command
from operate.edge import servers as edge_servers
from server import __main__ as server_command
from server import drain
from tests.conftest import ROOT, of_prometheus
from tests.manifests import (
    KUBERNETES,
    Manifest,
    build,
    checkov,
    kustomize,
    one,
    run,
    validate,
    write,
)

pytestmark = pytest.mark.process

BUILT = ["overlays/cpu", "overlays/gpu", "overlays/canary", "kserve"]


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
    """The same for tools that know no kinds of KServe's and KEDA's: a runtime as a pod, and what KEDA makes."""
    known = [manifest for manifest in manifests if not re.search(r"(kserve\.io|keda\.sh)/", manifest["apiVersion"])]
    if any(manifest["kind"] == "ServingRuntime" for manifest in manifests):
        known.append({"apiVersion": "v1", "kind": "Pod", **pod(manifests)})
    return known + [made_by_keda(manifest) for manifest in manifests if manifest["kind"] == "ScaledObject"]


def made_by_keda(scaled: Manifest) -> Manifest:
    """The HorizontalPodAutoscaler of a ScaledObject, whose further keys nothing would read."""
    spec = dict(scaled["spec"])
    [trigger] = spec.pop("triggers")
    assert spec.pop("pollingInterval") > 0
    made: Manifest = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", **spec.pop("scaleTargetRef")},
        "minReplicas": spec.pop("minReplicaCount"),
        "maxReplicas": spec.pop("maxReplicaCount"),
        "behavior": spec.pop("advanced")["horizontalPodAutoscalerConfig"].pop("behavior"),
    }
    assert not spec
    target = {"type": trigger["metricType"], "value": trigger["metadata"]["threshold"]}
    made["metrics"] = [{"type": "External", "external": {"metric": {"name": "s0-prometheus"}, "target": target}}]
    metadata = {"name": f"keda-hpa-{scaled['metadata']['name']}"}
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": made}


def test_every_file_says_what_was_proved() -> None:
    """In its first line, by the name of the tests that did."""
    for path in KUBERNETES.rglob("*.yaml"):
        tests = "tests/test_kubernetes_train.py" if path.parent.name == "train" else "tests/test_kubernetes.py"
        said = f"# Checked by {tests}, never applied to a cluster: docs/containers.md says what was proved.\n"
        assert path.read_text().startswith(said), path


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
    one(manifests, "ScaledObject")["spec"]["maxReplicaCount"] = "eight"


def leave_out(manifests: list[Manifest]) -> None:
    del one(manifests, "Deployment")["spec"]["selector"]


@pytest.mark.parametrize("break_it", [misspell, mistype, leave_out])
def test_a_broken_manifest_is_found(break_it: Callable[[list[Manifest]], None], tmp_path: Path) -> None:
    """The validation can fail: a misspelt key, a wrong type, a missing key."""
    manifests = build("overlays/cpu")
    break_it(manifests)
    assert validate(checkable(manifests), tmp_path).returncode != 0


def test_a_broken_overlay_is_not_built(tmp_path: Path) -> None:
    """Patches that find nothing to change are an error: the overlay gpu looks at what it replaces."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    deployment = tmp_path / "kubernetes" / "base" / "deployment.yaml"
    deployment.write_text(deployment.read_text().replace("            - cpu\n", "            - 'gpu'\n"))
    finished = kustomize(tmp_path / "kubernetes" / "overlays" / "gpu")
    assert finished.returncode != 0
    assert "value" in finished.stderr


@pytest.mark.slow
def test_pods_are_confined(tmp_path: Path) -> None:
    """checkov has no findings in any overlay, and has some where a container may do more."""
    for name in BUILT:
        write(checkable(build(name)), tmp_path / f"{Path(name).name}.yaml")
    careless = build("overlays/cpu")
    container(careless)["securityContext"] = {"privileged": True}
    write(careless, tmp_path / "careless.yaml")
    found = checkov(tmp_path)
    assert re.search(r"Passed checks: \d{3}", found), found
    assert set(re.findall(r"File: (\S+):", found)) == {"/careless.yaml"}, found
    assert "CKV_K8S_16:" in found


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
    assert readiness["args"][:4] == ["python", "-m", "operate", "ready"]
    command = typer.main.get_command(operate_command.app).commands["ready"]  # type: ignore[attr-defined]
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
    finished = run(of_prometheus("promtool"), "check", "service-discovery", path, job, "--timeout=1s")
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


def queue_test(expected: float, pods: Mapping[str, tuple[str, str]]) -> Manifest:
    """A unit test of the autoscaler's query for promtool.

    Args:
        pods: by namespace and name, the counters of microseconds in the queue and of requests, every 15 s.
    """
    [trigger] = one(build("overlays/cpu"), "ScaledObject")["spec"]["triggers"]
    metrics = ("ts_queue_latency_microseconds", "ts_inference_requests_total")
    series = []
    for name, counters in pods.items():
        namespace, pod = name.split("/")
        for metric, values in zip(metrics, counters, strict=True):
            series.append({"series": f'{metric}{{namespace="{namespace}", pod="{pod}"}}', "values": values})
    asked = {"expr": trigger["metadata"]["query"], "eval_time": "2m", "exp_samples": [{"value": expected}]}
    test = {"interval": "15s", "input_series": series, "promql_expr_test": [asked]}
    return {"evaluation_interval": "15s", "tests": [test]}


BUSY, IDLE, LATE = ("0+6e6x8", "0+15x8"), ("5e6x8", "15x8"), ("0+9e9x8", "0+15x8")


@pytest.mark.parametrize(
    ("expected", "pods"),
    [
        (0.4, {"default/classifier-5d9c-x2x4q": BUSY, "default/classifier-5d9c-b7k2p": IDLE}),
        (0, {"default/classifier-5d9c-b7k2p": IDLE}),
        (0, {f"{pod}-5d9c-x2x4q": LATE for pod in ("another/classifier", "default/classifier-canary", "default/other")}
            | {"default/classifier-5d9c-b7k2p": IDLE}),
    ],
)  # fmt: skip
def test_the_autoscaler_asks_for_the_time_in_the_queue(
    tmp_path: Path, expected: float, pods: Mapping[str, tuple[str, str]]
) -> None:
    """One number: seconds a request of the stable pods, 0 where nobody asks; and a wrong one would be found."""
    for value, passes in ((expected, True), (expected + 0.1, False)):
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(queue_test(value, pods)))
        finished = run(of_prometheus("promtool"), "test", "rules", tmp_path / "test.yaml")
        assert (finished.returncode == 0) == passes, finished.stdout + finished.stderr
