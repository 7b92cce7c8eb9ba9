"""What Prometheus is told to watch: alerts proved on made-up series, and every query asked of a real Prometheus."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ts.metrics.metric_type_enum import MetricTypes

from client.errors import RequestRefused
from handler import metrics
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT, free_ports

PROMETHEUS = ROOT / "deploy" / "prometheus"
CONFIG = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
RULES_TEST = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())
RECORDED, ALERTS = (group["rules"] for group in RULES["groups"])
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
DOCS = (ROOT / "docs" / "monitoring.md").read_text()
RUN, CHECK = re.findall(r"^```bash\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
[ALERTING] = re.findall(r"^```yaml\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
ALERT_NAMES = [rule["alert"] for rule in ALERTS]
# A machine without a GPU tells nothing of these.
MAY_BE_EMPTY = "GPU"
ENOUGH_FOR_DRIFT = metrics.FEWEST_ANSWERS_FOR_DRIFT + 100
DEADLINE_S = 120.0


def program(name: str) -> Path:
    """`prometheus` or `promtool`, on the PATH or beneath the folder that PROMETHEUS_HOME names."""
    home = os.environ.get("PROMETHEUS_HOME")
    found = shutil.which(name, path=f"{home}{os.pathsep}{home}/usr/bin{os.pathsep}{home}/bin" if home else None)
    if found is None:
        pytest.skip(f"no {name}: install Debian's package prometheus, or name its folder in PROMETHEUS_HOME")
    return Path(found)


def promtool(*arguments: object, folder: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    """Run promtool in `folder`; its findings are printed to either stream."""
    command = [str(program("promtool")), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def write_changed(folder: Path, alert: str, changes: dict[str, str]) -> None:
    """Into `folder`, the rules with keys of one alert replaced, and the tests of that alert as they are."""
    rules = copy.deepcopy(RULES)
    [rule] = (rule for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == alert)
    rule.update(changes)
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    of_alert = [test for test in RULES_TEST["tests"] if f"'alertname': '{alert}'" in str(test)]
    (folder / "rules_test.yml").write_text(yaml.safe_dump({**RULES_TEST, "tests": of_alert}))


def environment(binary: Path) -> dict[str, str]:
    """That of this process, with the folder of `binary` first on the PATH."""
    return {**os.environ, "PATH": f"{binary.parent}{os.pathsep}{os.environ['PATH']}"}


def test_configuration_and_rules_are_valid() -> None:
    """By the commands of docs/monitoring.md: every alert does in its tests what it should."""
    found = environment(program("promtool"))
    finished = subprocess.run(
        ["bash", "-ec", CHECK], cwd=ROOT, env=found, capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(RECORDED) + len(ALERTS)} rules found" in finished.stdout


def test_alerts_can_be_sent_as_the_page_says(tmp_path: Path) -> None:
    """The configuration is valid with the lines of docs/monitoring.md, and not with their keys misspelt."""
    shutil.copy(PROMETHEUS / "rules.yml", tmp_path)
    for lines, valid in ((ALERTING, True), (ALERTING.replace("alertmanagers", "managers"), False)):
        (tmp_path / "prometheus.yml").write_text((PROMETHEUS / "prometheus.yml").read_text() + lines)
        finished = promtool("check", "config", "prometheus.yml", folder=tmp_path)
        assert (finished.returncode == 0) == valid, finished.stdout + finished.stderr


def test_a_rule_that_is_no_query_is_refused(tmp_path: Path) -> None:
    """The check can fail: a bracket too few."""
    write_changed(tmp_path, "DiskFull", {"expr": "rate(DiskUtilization[5m]"})
    finished = promtool("check", "rules", "rules.yml", folder=tmp_path)
    assert finished.returncode != 0
    assert "DiskFull" in finished.stdout + finished.stderr


@pytest.mark.parametrize("alert", ALERT_NAMES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"expr": "vector(0) > 1"}, {"for": "0s"}, {"for": "2h"}],
    ids=["as it is", "never", "at once", "too late"],
)
def test_an_alert_that_is_wrong_fails_its_tests(alert: str, changes: dict[str, str], tmp_path: Path) -> None:
    """Each alert is proved to fire and to wait: one that never fires, does not wait or waits too long is found."""
    write_changed(tmp_path, alert, changes)
    finished = promtool("test", "rules", "rules_test.yml", folder=tmp_path)
    assert (finished.returncode != 0) == bool(changes)
    assert (f"alertname: {alert}," in finished.stdout + finished.stderr) == bool(changes)


@pytest.mark.parametrize(
    ("alert", "old", "new"),
    [
        ("NoWorkerLoaded", "== 1", ">= 0"),
        ("NoAnswers", "unless sum by (instance, ModelName) (rate(classifier_requests_total[2m])) > 0", ""),
        ("ManyErrors", "0.05", "0.03"),
        ("LongQueue", "0.25", "0.09"),
        ("SlowBatches", "0.5", "0.4"),
        ("Drift", "0.25", "0.15"),
        ("DiskFull", "90", "89"),
        ("DiskFillsSoon", "6 *", "60 *"),
    ],
)
def test_a_lower_limit_fails_its_tests(alert: str, old: str, new: str, tmp_path: Path) -> None:
    """Each alert is proved to keep quiet about what only looks like its reason."""
    [rule] = (rule for rule in ALERTS if rule["alert"] == alert)
    assert old in rule["expr"]
    write_changed(tmp_path, alert, {"expr": rule["expr"].replace(old, new)})
    finished = promtool("test", "rules", "rules_test.yml", folder=tmp_path)
    assert finished.returncode != 0
    assert f"alertname: {alert}," in finished.stdout + finished.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=ALERT_NAMES)
def test_every_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    """It waits, has a severity and a summary, and its runbook is a heading of the page that it names."""
    assert alert["for"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert page == "docs/monitoring.md"
    assert anchor == alert["alert"].lower()
    assert re.findall(rf"^### {alert['alert']}$", DOCS, flags=re.MULTILINE)


def test_every_heading_of_the_runbook_is_an_alert() -> None:
    """No alert was taken away and left its advice behind, and none is described twice."""
    assert re.findall(r"^### (\w+)$", DOCS, flags=re.MULTILINE) == ALERT_NAMES


def test_it_asks_where_torchserve_is_configured_to_answer() -> None:
    """Target and `metrics_address` are one, and the alerts' job is the scraped one."""
    [job] = CONFIG["scrape_configs"]
    [[target]] = (static["targets"] for static in job["static_configs"])
    for name in ("cpu", "gpu"):
        properties = (ROOT / "config" / f"config.{name}.properties").read_text()
        assert f"metrics_address=http://{target}\n" in properties
    assert set(re.findall(r'job="(\w+)"', str(RULES) + str(DASHBOARD))) == {job["job_name"]}


def metric_names(query: str) -> set[str]:
    """The words of a PromQL expression that are neither label, text, function nor operator."""
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on) \([^)]*\)", "", bare)
    return set(re.findall(r"(?<![\w.])[A-Za-z_:][\w:]*\b(?!\s*\()", bare)) - {"and", "or", "unless"}


def test_every_metric_that_is_asked_for_is_offered() -> None:
    """What rules and dashboard name is in config/metrics.yaml or recorded, the GPU's included, which no CPU tells."""
    config = yaml.safe_load((ROOT / "config" / "metrics.yaml").read_text())
    declared = [config[part][kind] for part in ("ts_metrics", "model_metrics") for kind in config[part]]
    offered = {metric["name"] for metrics_of_kind in declared for metric in metrics_of_kind}
    offered |= {f"{name}_bucket" for name in metrics.DECLARED[MetricTypes.HISTOGRAM]}
    offered |= {rule["record"] for rule in RECORDED} | {"up", "ALERTS"}
    queries = [rule["expr"] for rule in [*RECORDED, *ALERTS]] + [expression for _, expression, _ in TARGETS]
    asked = {name for query in queries for name in metric_names(query)}
    assert len(asked) > 20
    assert asked <= offered


def test_the_panels_lie_beside_each_other() -> None:
    """No two share a place or a number, none is wider than the page, and each asks the chosen Prometheus."""
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in PANELS:
        assert panel["description"]
        assert {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} == {
            "${datasource}"
        }


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its API.

        Raises:
            AssertionError: with its reason, if it refuses.
        """
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", f"{parameters}: {answer['error']}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression of PromQL gives now: a series each, none where there is no data or no number."""
        series: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return [one for one in series if one["value"][1] != "NaN"]


def as_grafana_asks(expression: str) -> str:
    """A dashboard's expression with everything chosen and a short window."""
    return expression.replace("$__rate_interval", "30s").replace("$instance", ".*").replace("$model", ".*")


@pytest.fixture(scope="module")
def prometheus(torchserve: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that reads the session's TorchServe every second, started as docs/monitoring.md says."""
    binary = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = copy.deepcopy(CONFIG)
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [torchserve.metrics_url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "rules.yml", folder)
    address = f"127.0.0.1:{free_ports()}"
    command = ["bash", "-c", "exec " + RUN.replace("deploy/prometheus", ".").replace("127.0.0.1:9090", address)]
    home = {**environment(binary), "HOME": str(folder)}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, env=home, stdout=log, stderr=log) as process,
    ):
        try:
            _await_ready(process, address, folder / "log")
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(timeout=30)


def _await_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None, log.read_text()
        try:
            if requests.get(f"http://{address}/-/ready", timeout=5).ok:
                return
        except requests.ConnectionError:
            pass
        assert time.monotonic() < deadline, f"Prometheus is not ready: {log.read_text()}"
        threading.Event().wait(0.1)


def ask_for_everything(torchserve: RunningServer, digit: bytes, images: int) -> None:
    """Predictions, a refusal, and an answer with 5XX: TorchServe cannot read this form."""

    def ask(body: bytes) -> None:
        try:
            torchserve.client().predict(MODEL, body)
        except RequestRefused as refusal:
            assert refusal.status == 415

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, [*[digit] * images, b"no image"]))
    token = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    broken = requests.post(
        f"{torchserve.inference_url}/predictions/{MODEL}",
        data=b"image=%zz",
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/x-www-form-urlencoded"},
        timeout=30,
    )
    assert broken.status_code == 500


@pytest.fixture(scope="module")
def watched(prometheus: Prometheus, torchserve: RunningServer, digit: bytes) -> Prometheus:
    """Prometheus once it has seen enough requests come in for every figure; says which are missing if it does not."""
    torchserve.client().scale(MODEL, 1)  # drift is told by a worker that has answered some hundreds
    ask_for_everything(torchserve, digit, ENOUGH_FOR_DRIFT)
    deadline = time.monotonic() + DEADLINE_S
    while missing := [name for name, query in everything() if not prometheus.query(query)]:
        assert time.monotonic() < deadline, f"still no data after {DEADLINE_S:g} s: {missing}"
        ask_for_everything(torchserve, digit, 4)
        threading.Event().wait(0.5)
    return prometheus


def everything() -> Iterator[tuple[str, str]]:
    """Name and query of all that a server with a CPU has figures for."""
    for rule in RECORDED:
        labels = ",".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
        yield rule["record"], f"{rule['record']}{{{labels}}}"
        yield f"{rule['record']}, as it is written", rule["expr"]
    for title, expression, _ in TARGETS:
        if MAY_BE_EMPTY not in expression:
            yield title, as_grafana_asks(expression)


def test_every_figure_has_data(watched: Prometheus) -> None:
    """Each query of the dashboard and each recorded series of a real server, each alone, and none with an error."""
    for name, query in everything():
        assert watched.query(query), name
    for _, expression, _ in TARGETS:
        watched.query(as_grafana_asks(expression))


def test_a_query_that_is_wrong_is_noticed(watched: Prometheus) -> None:
    """The check above can fail: no data for a metric that nobody tells, an error for what is no query."""
    assert watched.query("classifier_request_total") == []
    with pytest.raises(AssertionError, match="parse error"):
        watched.query("rate(classifier_requests_total")


def test_figures_are_plausible(watched: Prometheus, torchserve: RunningServer, digit: bytes) -> None:
    """Recorded figures of the model are in their ranges, and what arrives is answered."""
    # A rate leaves out what a counter had when Prometheus first read it: these come after that.
    ask_for_everything(torchserve, digit, ENOUGH_FOR_DRIFT)

    def value(query: str) -> float:
        [series] = watched.query(query)
        return float(series["value"][1])

    labels = f'{{ModelName="{MODEL}"}}'
    deadline = time.monotonic() + DEADLINE_S
    # A worker tells its requests every few seconds, TorchServe its answers at once.
    while (asked := value(f"model:requests:rate5m{labels}")) != pytest.approx(
        answered := value(f"model:answers:rate5m{labels}"), rel=0.5
    ):
        assert time.monotonic() < deadline, f"{asked} requests and {answered} answers a second"
        threading.Event().wait(0.5)
    assert 0 < value(f"model:refusals:rate5m{labels}") < value(f"model:answers:rate5m{labels}")
    assert 0 < value(f"model:queue_seconds:mean5m{labels}") < value(f"model:latency_seconds:mean5m{labels}") < 5
    assert 0 < value(f"model:batch_seconds:p99_5m{labels}") < 5
    assert 0 < value("instance:errors:ratio5m") < 1
    assert 0.5 < value(f"model:confidence:mean5m{labels}") <= 1


def test_every_rule_is_healthy(watched: Prometheus) -> None:
    """Prometheus evaluates all of them without an error, in real time."""
    found = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(RECORDED) + len(ALERTS)
    assert {(rule["health"], rule.get("lastError", "")) for rule in found} == {("ok", "")}


def test_legends_name_labels_that_are_there(watched: Prometheus) -> None:
    """No legend of the dashboard has a gap."""
    for title, expression, legend in TARGETS:
        wanted = set(re.findall(r"{{(\w+)}}", legend))
        for series in watched.query(as_grafana_asks(expression)):
            assert wanted <= set(series["metric"]), f"{title}: {legend}"


def test_the_choices_of_the_dashboard_are_found(watched: Prometheus) -> None:
    """Its menus list this server and this model."""
    wanted = {"instance": watched.query("up")[0]["metric"]["instance"], "model": MODEL}
    menus = {menu["name"]: menu["query"] for menu in DASHBOARD["templating"]["list"] if menu["type"] == "query"}
    assert set(menus) == set(wanted)
    for name, menu in menus.items():
        matched = re.fullmatch(r"label_values\((.+), (\w+)\)", menu["query"])
        assert matched is not None
        selector, label = matched.groups()
        values = watched.ask(f"label/{label}/values", **{"match[]": as_grafana_asks(selector)})
        assert wanted[name] in values
