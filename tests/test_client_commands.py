"""Commands of the client before any server is asked: the documented ones, and what they refuse; metrics for people."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client import metrics
from client.__main__ import app as client_app
from client.torchserve import TorchServe
from operate.__main__ import app as operate_app
from tests.conftest import MODEL, ROOT
from tests.listening import Quiet, key_file, listening

APPS = {"client": client_app, "operate": operate_app}
DOCUMENTS = [(ROOT / "docs" / page).read_text() for page in ("requests.md", "edge.md", "monitoring.md")]
HELP = [command.epilog or "" for app in APPS.values() for command in app.registered_commands]
EXAMPLES = re.findall(
    r"^(?:Example: )?python -m (client|operate) (?!grpc$)(.+)$", "\n".join([*DOCUMENTS, *HELP]), re.MULTILINE
)
"""All but the one that needs nothing to serve."""


class Described(Quiet):
    """Answers as TorchServe describes a model with a ready worker."""

    status = "READY"

    def do_GET(self) -> None:
        worker = {"id": "9000", "status": self.status, "pid": 1, "memoryUsage": 2e6}
        description = {
            "modelName": "m", "modelVersion": "1.0", "batchSize": 8, "maxBatchDelay": 5, "workers": [worker],
        }  # fmt: skip
        if self.path.endswith("?customized=true"):
            handler = {"channels": 1, "resize_size": 40, "crop_size": 32}
            description["customizedMetadata"] = {
                "variant": "bf16", "threads": 2, "digest": "abc", "handler": handler,
                "class_names": [f"c{number}" for number in range(25)],
            }  # fmt: skip
        self.answer([description])


class Loading(Described):
    status = "LOADING"


def test_describe_shows_classes_input_and_variant(tmp_path: Path) -> None:
    """As a ready worker tells them, and none where no worker is ready, which might be asked for long."""
    tokens = str(key_file(tmp_path, management={"key": "m"}))
    said = []
    for handler in (Described, Loading):
        with listening(handler) as url:
            place = ("--url", url, "--management-url", url, "--key-file", tokens)
            said.append(CliRunner().invoke(client_app, [*place, "describe", "m"]).stdout.splitlines())
    assert said[0][2:] == [
        "variant bf16, 2 threads, archive abc",
        "input   grey, resized to 40 pixels and cropped to 32×32",
        f"25 classes: {', '.join(f'c{number}' for number in range(20))}, and 5 more: --json",
    ]
    assert len(said[1]) == 2


@pytest.mark.parametrize(("room", "example"), EXAMPLES)
def test_every_example_is_understood(room: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documents and --help show gets as far as the missing server, key file or folder, in one line."""
    monkeypatch.chdir(tmp_path)
    environment = {"TORCHSERVE_URL": "http://127.0.0.1:9"}
    finished = CliRunner().invoke(APPS[room], example.split(), env=environment)
    assert finished.exit_code == 1, finished.stderr
    assert re.fullmatch(r"(error: .*\n)+", finished.stderr)


def test_an_example_that_is_wrong_would_be_found() -> None:
    """An option that does not exist has another exit status."""
    assert CliRunner().invoke(client_app, ["models", "--nonsense"]).exit_code == 2


@pytest.mark.parametrize("command", [("scale", MODEL, "10000"), ("register", MODEL, "--workers", "10000")])
def test_more_workers_than_cores_are_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    """Before any server is asked; the message says how to have them all the same."""
    refused = CliRunner().invoke(client_app, [*command])
    assert refused.exit_code == 1
    assert "--ceiling 10000 allows them" in refused.stderr
    missing = ["--key-file", str(tmp_path / "none.json")]
    allowed = CliRunner().invoke(client_app, [*missing, *command, "--ceiling", "10000"])
    assert "cannot read the tokens" in allowed.stderr


def test_a_workerless_registration_is_refused() -> None:
    """TorchServe would accept it and answer 503 to every prediction."""
    with pytest.raises(ValueError, match="at least 1"):
        TorchServe().register(MODEL, workers=0)


PROMETHEUS = r"""# HELP classifier_info x
# TYPE classifier_info gauge
classifier_info{ModelName="m",Version="1.0",Digest="ab\"c",Hostname="h",} 1.0
classifier_stage_seconds_bucket{ModelName="m",Stage="total",le="+Inf",} 4.0
classifier_stage_seconds_count{ModelName="m",Stage="total",} 4.0
classifier_stage_seconds_sum{ModelName="m",Stage="total",} 2.0
classifier_stage_seconds_created{ModelName="m",Stage="total",} 1.7E9
ts_inference_requests_total{model_name="n",model_version="default",hostname="h",} 8.0
ts_inference_latency_microseconds{model_name="n",model_version="default",hostname="h",} 1600.0
Requests2XX{Level="Host",Hostname="h",} 9.0
jvm_threads 5
"""


def test_metrics_become_rows_for_people() -> None:
    """Sums become means, buckets and the JVM's own are left out, a named model has its rows alone."""
    rows = metrics.interesting(metrics.parse(PROMETHEUS))
    assert [(row.name, row.model, row.value) for row in rows] == [
        ("classifier_info", "m", 1),
        ("classifier_stage_seconds_mean", "m", 0.5),
        ("Requests2XX", None, 9),
        ("ts_inference_latency_microseconds_mean", "n", 200),
        ("ts_inference_requests_total", "n", 8),
    ]
    assert rows[0].shown_labels == 'Version=1.0 Digest=ab"c'
    assert {row.model for row in metrics.interesting(metrics.parse(PROMETHEUS), "n")} == {"n"}


def test_a_counter_keeps_its_name_and_what_is_no_metric_is_refused() -> None:
    """TorchServe's counters do not end in _total; a page of something else does not pass for one without figures."""
    [sample] = metrics.parse('# TYPE Requests2XX counter\nRequests2XX{Level="Host",} 9.0\n')
    assert (sample.name, sample.value) == ("Requests2XX", 9)
    with pytest.raises(ValueError, match="html"):
        metrics.parse("<html>it works</html>")
