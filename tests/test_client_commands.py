"""Commands of the client before any server is asked: the documented ones, and what they refuse; metrics for people."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client import metrics
from client.__main__ import app
from client.torchserve import TorchServe
from tests.conftest import MODEL, ROOT

DOCUMENT = (ROOT / "docs" / "client.md").read_text()
EXAMPLES = [
    *re.findall(r"^python -m client (.+)$", DOCUMENT, flags=re.MULTILINE),
    *((command.epilog or "").partition("python -m client ")[2] for command in app.registered_commands),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_understood(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the document and --help show gets as far as the missing server, key file or folder, in one line."""
    monkeypatch.chdir(tmp_path)
    environment = {"TORCHSERVE_URL": "http://127.0.0.1:9"}
    finished = CliRunner().invoke(app, example.split(), env=environment)
    assert finished.exit_code == 1, finished.stderr
    assert re.fullmatch(r"(error: .*\n)+", finished.stderr)


def test_an_example_that_is_wrong_would_be_found() -> None:
    """An option that does not exist has another exit status."""
    assert CliRunner().invoke(app, ["models", "--nonsense"]).exit_code == 2


@pytest.mark.parametrize("command", [("scale", MODEL, "10000"), ("register", MODEL, "--workers", "10000")])
def test_more_workers_than_cores_are_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    """Before any server is asked; the message says how to have them all the same."""
    refused = CliRunner().invoke(app, [*command])
    assert refused.exit_code == 1
    assert "--ceiling 10000 allows them" in refused.stderr
    missing = ["--key-file", str(tmp_path / "none.json")]
    allowed = CliRunner().invoke(app, [*missing, *command, "--ceiling", "10000"])
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
    assert rows[0].shown_labels == r"Version=1.0 Digest=ab\"c"
    assert {row.model for row in metrics.interesting(metrics.parse(PROMETHEUS), "n")} == {"n"}
