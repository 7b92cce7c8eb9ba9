"""What Prometheus is told to watch: alerts proved on made-up series, and every query asked of a real Prometheus.

Live, a server without a single request is harmed, and Prometheus calls; on one that is well it does not.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from client.errors import RequestRefused
from client.metrics import parse
from client.torchserve import Workers
from handler import metrics
from operate.readiness import exposition
from operate.readiness.checks import BOUNDS_S, GoldenAnswers, Readiness
from server import processes
from server.launch import RunningServer
from tests.broken import spoil_golden_answers
from tests.conftest import MODEL, ROOT, free_ports, of_prometheus, started, wait_for

PROMETHEUS = ROOT / "deploy" / "prometheus"
CONFIG = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
RULES_TEST = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())
RECORDED, ALERTS = (group["rules"] for group in RULES["groups"])
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
DOCS = (ROOT / "docs" / "monitoring.md").read_text()
READY, RUN, CHECK, *_ = re.findall(r"^```bash\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
[ALERTING] = re.findall(r"^```yaml\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
ALERT_NAMES = [rule["alert"] for rule in ALERTS]
MAY_BE_EMPTY = ("GPU", "classifier_accepted")
"""What a machine without a GPU, and a model without `serving.accept`, tell nothing of."""
ENOUGH_FOR_DRIFT = metrics.FEWEST_ANSWERS_FOR_DRIFT + 100
DEADLINE_S = 120.0
FIRES_WITHIN_S = 60.0
OF_READINESS = ("NotReady", "WrongAnswers", "ReadinessUnknown")
TOLD = exposition.text(MODEL, Readiness(True, "", Workers(1, 1)), 1.5, GoldenAnswers().with_answer(0.1, right=True))


def promtool(*arguments: object, folder: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    """Run promtool in `folder`; its findings are printed to either stream."""
    command = [str(of_prometheus("promtool")), *map(str, arguments)]
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


@pytest.mark.process
def test_configuration_and_rules_are_valid() -> None:
    """By the commands of docs/monitoring.md: every alert does in its tests what it should."""
    found = environment(of_prometheus("promtool"))
    finished = subprocess.run(
        ["bash", "-ec", CHECK], cwd=ROOT, env=found, capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(RECORDED) + len(ALERTS)} rules found" in finished.stdout


@pytest.mark.process
def test_alerts_can_be_sent_as_the_page_says(tmp_path: Path) -> None:
    """The configuration is valid with the lines of docs/monitoring.md, and not with their keys misspelt."""
    shutil.copy(PROMETHEUS / "rules.yml", tmp_path)
    for lines, valid in ((ALERTING, True), (ALERTING.replace("alertmanagers", "managers"), False)):
        (tmp_path / "prometheus.yml").write_text((PROMETHEUS / "prometheus.yml").read_text() + lines)
        finished = promtool("check", "config", "prometheus.yml", folder=tmp_path)
        assert (finished.returncode == 0) == valid, finished.stdout + finished.stderr


@pytest.mark.process
def test_a_rule_that_is_no_query_is_refused(tmp_path: Path) -> None:
    """The check can fail: a bracket too few."""
    write_changed(tmp_path, "DiskFull", {"expr": "rate(DiskUtilization[5m]"})
    finished = promtool("check", "rules", "rules.yml", folder=tmp_path)
    assert finished.returncode != 0
    assert "DiskFull" in finished.stdout + finished.stderr


@pytest.mark.process
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


@pytest.mark.process
@pytest.mark.parametrize(
    ("alert", "old", "new"),
    [
        ("NotReady", "== 0", ">= 0"),
        ("WrongAnswers", "> 0", ">= 0"),
        ("ReadinessUnknown", "== 0 or", "< 0 or"),
        ("ReadinessUnknown", "unless on (instance)", "and on (instance)"),
        ("NoWorkerLoaded", "== 1", ">= 0"),
        ("NoAnswers", "unless sum by (instance, ModelName) (rate(classifier_requests_total[2m])) > 0", ""),
        ("ManyErrors", "0.05", "0.03"),
        ("LongQueue", "0.25", "0.09"),
        ("SlowBatches", "0.5", "0.4"),
        ("SlowAnswers", "0.5", "0.4"),
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


def test_it_asks_where_they_are_configured_to_answer() -> None:
    """The targets are `metrics_address` and the page's readiness server, of one instance; the rules know both jobs."""
    jobs = {job["job_name"]: job["static_configs"] for job in CONFIG["scrape_configs"]}
    [server], [readiness] = jobs["torchserve"], jobs["readiness"]
    [target] = server["targets"]
    for name in ("cpu", "gpu"):
        properties = (ROOT / "config" / f"config.{name}.properties").read_text()
        assert f"metrics_address=http://{target}\n" in properties
    assert readiness["labels"]["instance"] == target
    [port] = re.findall(r"--http (\d+)", READY)
    assert readiness["targets"] == [f"127.0.0.1:{port}"]
    assert set(re.findall(r'job="(\w+)"', str(RULES) + str(DASHBOARD))) == set(jobs)


@pytest.mark.process
def test_what_readiness_tells_is_prometheus_own_format() -> None:
    """promtool has nothing to say about it, and does about a counter that is not named as one."""
    named_wrongly = TOLD.replace("answers_total", "answers")
    for told, valid in ((TOLD, True), (named_wrongly, False)):
        finished = subprocess.run(
            [of_prometheus("promtool"), "check", "metrics"], input=told, capture_output=True, text=True, check=False
        )
        assert (finished.returncode == 0) == valid, finished.stdout + finished.stderr


def test_a_limit_is_the_bound_of_a_bucket() -> None:
    """Between two bounds a quantile is a guess: the alerts compare with a bound."""
    limits = {rule["alert"]: float(rule["expr"].rpartition("> ")[2]) for rule in ALERTS if "Slow" in rule["alert"]}
    assert limits["SlowAnswers"] in BOUNDS_S
    assert limits["SlowBatches"] in (0.25, 0.5, 0.75, 1)


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
    offered |= {f"{name}_bucket" for name in metrics.DECLARED["histogram"]}
    offered |= {sample.name for sample in parse(TOLD)}
    offered |= {rule["record"] for rule in RECORDED} | {"up", "ALERTS"}
    queries = [rule["expr"] for rule in [*RECORDED, *ALERTS]] + [expression for _, expression, _ in TARGETS]
    asked = {name for query in queries for name in metric_names(query)}
    assert len(asked) > 20
    assert asked <= offered


def faults(dashboard: dict[str, Any]) -> list[str]:
    """What Grafana would show badly or not at all, as far as the file alone tells."""
    panels = dashboard["panels"]
    shown = [panel for panel in panels if panel["type"] != "row"]
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval", "__all"}
    asking = [target for panel in shown for target in panel["targets"]]
    others = [one for one in dashboard["templating"]["list"] if one["type"] == "query"]
    others += dashboard["annotations"]["list"]
    sources = {str(one["datasource"]) for one in [*shown, *asking, *others]}
    checks = {
        "of a format that is not Grafana 9 to 12's": 36 <= dashboard["schemaVersion"] <= 41,
        "two panels of one number": len({panel["id"] for panel in panels}) == len(panels),
        "two panels of one title": len({panel["title"] for panel in panels}) == len(panels),
        "two panels in one place": len(set(cells)) == len(cells),
        "a panel beyond the page": max(x for x, _ in cells) < 24,
        "a gap between panels": len(cells) == 24 * (1 + max(y for _, y in cells)),
        "a panel of another data source": sources == {str({"type": "prometheus", "uid": "${datasource}"})},
        "a panel without a description": all(panel["description"] for panel in shown),
        "a panel without a unit": all(
            panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "table" for panel in shown
        ),
        "two queries of one letter": all(
            len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) for panel in shown
        ),
        "a variable that is not there": set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) <= variables,
    }
    return [fault for fault, holds in checks.items() if not holds]


@pytest.mark.process
def test_the_dashboard_has_no_faults() -> None:
    """Each panel in a place of its own, with a unit, asking the chosen Prometheus by variables that are there."""
    assert faults(DASHBOARD) == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("fault", "break_it"),
    [
        ("of a format that is not Grafana 9 to 12's", lambda board: board.update(schemaVersion=16)),
        ("two panels of one number", lambda board: board["panels"][0].update(id=2)),
        ("two panels of one title", lambda board: board["panels"][0].update(title=board["panels"][1]["title"])),
        ("two panels in one place", lambda board: board["panels"][1]["gridPos"].update(x=0)),
        ("a panel beyond the page", lambda board: board["panels"][0]["gridPos"].update(x=23)),
        ("a gap between panels", lambda board: board["panels"][0]["gridPos"].update(h=3)),
        ("a panel of another data source", lambda board: board["annotations"]["list"][0]["datasource"].update(uid="a")),
        ("a panel without a description", lambda board: board["panels"][0].update(description="")),
        ("a panel without a unit", lambda board: board["panels"][0]["fieldConfig"]["defaults"].pop("unit")),
        (
            "two queries of one letter",
            lambda board: [target.update(refId="A") for target in board["panels"][9]["targets"]],
        ),
        ("a variable that is not there", lambda board: board["panels"][0]["targets"][0].update(expr="sum(up{a='$b'})")),
    ],
)
def test_a_faulty_dashboard_is_found(fault: str, break_it: Callable[[dict[str, Any]], object]) -> None:
    """The check above can fail, in each of its parts."""
    broken = copy.deepcopy(DASHBOARD)
    break_it(broken)
    assert fault in faults(broken)


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


@contextmanager
def running_prometheus(
    folder: Path, servers: list[dict[str, Any]], readiness: list[dict[str, Any]], hold: str | None = None
) -> Iterator[Prometheus]:
    """A Prometheus started as docs/monitoring.md says, that looks every second, and at readiness every three.

    Args:
        servers: targets of TorchServes' metrics.
        readiness: targets of readiness servers; a look may take two seconds.
        hold: for how long an alert holds before it fires, instead of what it says itself.
    """
    binary = of_prometheus("prometheus")
    config, rules = copy.deepcopy(CONFIG), copy.deepcopy(RULES)
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = {"torchserve": servers, "readiness": readiness}[job["job_name"]]
        if job["job_name"] == "readiness":
            job.update(scrape_interval="3s", scrape_timeout="3s")
    for rule in rules["groups"][1]["rules"] if hold else ():
        rule["for"] = hold
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
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


@contextmanager
def readiness_of(server: RunningServer, golden: Path) -> Iterator[str]:
    """Host and port of a readiness server, started as docs/monitoring.md says but on a free port."""
    place = ["--url", server.inference_url, "--management-url", server.management_url, "--key-file", server.key_file]
    command = READY.split()
    assert command[:3] == ["python", "-m", "operate"]
    command[command.index("--http") + 1] = "0"
    command[command.index("--golden") + 1] = str(golden)
    with subprocess.Popen(
        [sys.executable, "-m", "operate", *map(str, place), *command[3:]], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().removeprefix("http://").removesuffix("/readyz")
        finally:
            process.terminate()


def address(server: RunningServer) -> str:
    """Where its metrics are, as Prometheus names a target."""
    return server.metrics_url.removeprefix("http://")


@pytest.fixture(scope="module")
def prometheus(torchserve: RunningServer, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that reads the session's TorchServe and a readiness server of it."""
    of_prometheus("prometheus")
    target = address(torchserve)
    with (
        readiness_of(torchserve, run / "golden") as readiness,
        running_prometheus(
            tmp_path_factory.mktemp("prometheus"),
            servers=[{"targets": [target]}],
            readiness=[{"targets": [readiness], "labels": {"instance": target}}],
        ) as prometheus,
    ):
        yield prometheus


def _await_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(f"http://{address}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False

    wait_for(is_ready, "Prometheus", 30)


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
    """Name and query of all that a server with a CPU has figures for, whether an alert fires or not."""
    for rule in RECORDED:
        if any(name in rule["expr"] for name in MAY_BE_EMPTY):
            continue
        labels = ",".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
        yield rule["record"], f"{rule['record']}{{{labels}}}"
        yield f"{rule['record']}, as it is written", rule["expr"]
    for title, expression, _ in TARGETS:
        if not any(name in expression for name in MAY_BE_EMPTY):
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


def test_the_annotations_of_the_dashboard_are_queries(watched: Prometheus) -> None:
    """They show each alert that fires, by a label that every alert has."""
    [annotation] = DASHBOARD["annotations"]["list"]
    selector = annotation["expr"].replace('{alertstate="firing"}', "")
    watched.query(annotation["expr"])
    assert selector == "ALERTS"
    assert annotation["titleFormat"] == "{{alertname}}"


@dataclass(frozen=True)
class Idle:
    """A server of which nobody wants anything but its readiness server."""

    run_dir: Path
    prometheus: Prometheus

    def firing(self) -> set[tuple[str, str]]:
        """Which alerts of readiness fire for which instance."""
        found = self.prometheus.query('ALERTS{alertstate="firing"}')
        labels = [series["metric"] for series in found]
        return {(one["alertname"], one["instance"]) for one in labels if one["alertname"] in OF_READINESS}


WRONG_OR_BLIND = {("WrongAnswers", "wrong"), ("NotReady", "wrong"), ("ReadinessUnknown", "blind")}


@pytest.fixture(scope="module")
def idle(model_store: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Idle]:
    """One server as three instances: well, measured by another model's golden answers, and with no readiness server."""
    of_prometheus("prometheus")
    folder = tmp_path_factory.mktemp("idle")
    wrong = shutil.copytree(run / "golden", folder / "golden")
    spoil_golden_answers(folder)
    run_dir = folder / "server"
    run_dir.mkdir()
    names = ("well", "wrong", "blind")
    with (
        started(run_dir, model_store) as server,
        readiness_of(server, run / "golden") as of_well,
        readiness_of(server, wrong) as of_wrong,
        running_prometheus(
            folder,
            servers=[{"targets": [address(server)], "labels": {"instance": name}} for name in names],
            readiness=[
                {"targets": [of_well], "labels": {"instance": "well"}},
                {"targets": [of_wrong], "labels": {"instance": "wrong"}},
            ],
            hold="5s",
        ) as prometheus,
    ):
        yield Idle(run_dir, prometheus)


@pytest.mark.slow
def test_an_idle_server_that_is_well_calls_nobody(idle: Idle) -> None:
    """Beside one that answers wrongly and one whose readiness nobody tells, which both are called about."""
    wait_for(lambda: idle.firing() == WRONG_OR_BLIND, "alerts of the other two, and none of this", FIRES_WITHIN_S)
    ready = idle.prometheus.query('min_over_time(model:ready:min{instance="well"}[1m]) == 1')
    assert len(ready) == 1
    assert idle.prometheus.query("sum(rate(Requests4XX[1m]))") == []


def kill(run_dir: Path) -> None:
    """The worker, as often as TorchServe starts it again."""
    for worker in processes.workers(run_dir):
        worker.kill()


def stop(run_dir: Path) -> None:
    """The worker hangs; TorchServe goes on to call it READY."""
    for worker in processes.workers(run_dir):
        worker.suspend()


@pytest.mark.slow
@pytest.mark.parametrize("harm", [kill, stop])
def test_an_idle_server_whose_worker_is_gone_is_called_about(harm: Callable[[Path], None], idle: Idle) -> None:
    """NotReady fires, without a request of any client, and ends once the worker is back."""
    wait_for(lambda: idle.firing() == WRONG_OR_BLIND, "well before", DEADLINE_S)

    def harm_and_ask() -> bool:
        harm(idle.run_dir)
        return ("NotReady", "well") in idle.firing()

    try:
        wait_for(harm_and_ask, "an alert", FIRES_WITHIN_S)
    finally:
        for worker in processes.workers(idle.run_dir):
            with suppress(psutil.NoSuchProcess):
                worker.resume()
    wait_for(lambda: ("NotReady", "well") not in idle.firing(), "well again", DEADLINE_S)
