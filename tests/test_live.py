"""A real TorchServe, tokens on: what is served is what was measured, each request is answered alone, workers scale."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from client.errors import ClientError, ModelNotFound, NotAuthorized, RequestRefused, ServerUnreachable
from client.torchserve import TorchServe
from dataset import labelled_images
from handler.variants import load_torchscript
from measure import evaluation
from server import processes
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT, free_ports
from tests.images import BAD
from tests.observed import reached, settled, totals
from train import recipe


def test_served_is_what_was_measured(client: TorchServe, run: Path) -> None:
    """The same encoded images through training's evaluation and through the server: equal to 1e-5."""
    chosen = recipe.load(MODEL)
    held_out = labelled_images.load(chosen.data, chosen.handler, chosen.training.seed).test.subset(range(60))
    measured = evaluation.predict(load_torchscript(run / "model.pt"), held_out, chosen.handler)
    for data, row in zip(held_out.encoded, measured.tolist(), strict=True):
        served = client.predict(MODEL, data)
        assert len(served) == 5
        for name, probability in served.items():
            assert probability == pytest.approx(row[int(name)], abs=1e-5)
        assert max(served, key=served.__getitem__) == str(row.index(max(row)))


@pytest.mark.slow
def test_a_dynamic_batch_of_good_and_bad(client: TorchServe, torchserve: RunningServer, digit: bytes) -> None:
    """Requests that arrive together share batches; each gets its own status, and the good ones their usual answer."""
    alone = client.predict(MODEL, digit)
    bodies = [(digit, 200), *BAD.values()] * 12

    def ask(body: bytes) -> tuple[int, dict[str, float]]:
        try:
            return 200, torchserve.client().predict(MODEL, body)
        except RequestRefused as refusal:
            assert refusal.kind in ("InvalidRequest", "ImageTooLarge", "UnsupportedImage")
            return refusal.status, {}

    before = totals(settled(torchserve))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [body for body, _ in bodies]))
    wanted = {"classifier_requests_total": before["classifier_requests_total"] + len(bodies)}
    batches = totals(reached(torchserve, wanted))["classifier_batches_total"] - before["classifier_batches_total"]
    assert [status for status, _ in answers] == [status for _, status in bodies]
    for status, answer in answers:
        if status == 200:
            assert answer == pytest.approx(alone, abs=1e-5)
    assert 0 < batches < len(bodies), "TorchServe must really have put requests together"


@pytest.mark.slow
def test_scaling_up_and_down_shows_in_describe(client: TorchServe, digit: bytes) -> None:
    """1 → 3 → 1 workers through the management API, answering all the while."""
    for workers in (3, 1):
        client.scale(MODEL, workers)
        states = [worker["status"] for worker in client.describe(MODEL)["workers"]]
        assert states == ["READY"] * workers
        assert len(client.predict(MODEL, digit)) == 5


def _token(torchserve: RunningServer, kind: str = "inference") -> dict[str, str]:
    return {"Authorization": "Bearer " + json.loads(torchserve.key_file.read_text())[kind]["key"]}


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}], ids=["no token", "wrong token"])
def test_without_the_right_token_nothing_is_answered(torchserve: RunningServer, headers: dict[str, str]) -> None:
    """Neither predictions nor management; and the inference token is no management token."""
    for url in (
        f"{torchserve.inference_url}/predictions/{MODEL}",
        f"{torchserve.management_url}/models",
        f"{torchserve.management_url}/models/{MODEL}?min_worker=2",
    ):
        answer = requests.request("PUT" if "min_worker" in url else "GET", url, headers=headers, timeout=30)
        assert answer.status_code == 400
        assert answer.json()["type"] == "InvalidKeyException"
    crossed = requests.get(f"{torchserve.management_url}/models", headers=_token(torchserve), timeout=30)
    assert crossed.status_code == 400


def _spoil(torchserve: RunningServer, target: Path, kinds: tuple[str, ...]) -> Path:
    keys = json.loads(torchserve.key_file.read_text())
    for kind in kinds:
        keys[kind]["key"] = "expired"
    target.write_text(json.dumps(keys))
    return target


def test_the_temporary_folder_is_its_owners_alone(torchserve: RunningServer) -> None:
    """Java writes there what does not stay in memory, and workers unpack archives there."""
    folder = processes.temp_dir(torchserve.key_file.parent)
    java = processes.find(torchserve.key_file.parent)
    assert java is not None
    assert java.environ()["TMPDIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_expired_tokens_are_renewed_where_the_api_key_allows(torchserve: RunningServer, digit: bytes) -> None:
    """The client renews both tokens by the API key, and the call that found them expired succeeds."""
    _spoil(torchserve, torchserve.key_file, ("inference", "management"))
    client = torchserve.client()
    assert len(client.predict(MODEL, digit)) == 5
    assert client.models() == [MODEL]
    assert "expired" not in torchserve.key_file.read_text()


def test_a_foreign_key_file_is_named(torchserve: RunningServer, tmp_path: Path, digit: bytes) -> None:
    """Where the API key is wrong too, the message says which file was read, and shows no token."""
    foreign = _spoil(torchserve, tmp_path / "foreign.json", ("inference", "management", "API"))
    client = TorchServe(torchserve.inference_url, torchserve.management_url, foreign)
    with pytest.raises(NotAuthorized, match=r"foreign\.json") as refusal:
        client.predict(MODEL, digit)
    assert "expired" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "scripts/serve.sh"), ("{}", "no inference token"), ("[", "no inference token")]
)
def test_an_unusable_key_file_is_named(tmp_path: Path, content: str | None, complaint: str) -> None:
    """Missing, empty and broken key files say which file, and what to do."""
    if content is not None:
        (tmp_path / "key_file.json").write_text(content)
    with pytest.raises(NotAuthorized, match=rf"key_file.json.*{complaint}"):
        TorchServe(key_file=tmp_path / "key_file.json").predict(MODEL, b"")


def test_no_server_says_how_to_start_one(torchserve: RunningServer) -> None:
    """Connection refused is not a traceback."""
    client = TorchServe(f"http://127.0.0.1:{free_ports()}", key_file=torchserve.key_file)
    with pytest.raises(ServerUnreachable, match=r"scripts/serve\.sh"):
        client.predict(MODEL, b"")


def test_an_unknown_model_is_said(client: TorchServe, digit: bytes) -> None:
    """Predicting with, and describing, a model that is not there."""
    for call in (lambda: client.predict("nobody", digit), lambda: client.describe("nobody")):
        with pytest.raises(ModelNotFound, match="nobody"):
            call()


def test_the_command_line_classifies_what_it_can(torchserve: RunningServer, tmp_path: Path, digit: bytes) -> None:
    """Good files are answered, bad ones reported on stderr with the reason, and the exit status is 1."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(digit)
    bad.write_bytes(b"no image")
    command = [
        sys.executable,
        "-m",
        "client",
        "--url",
        torchserve.inference_url,
        "--key-file",
        str(torchserve.key_file),
    ]
    finished = subprocess.run(
        [*command, "predict", MODEL, str(bad), str(tmp_path / "none.png"), str(good), "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    [line] = finished.stdout.splitlines()
    assert len(json.loads(line)["prediction"]) == 5
    assert "bad.png: 415" in finished.stderr
    assert "none.png: No such file" in finished.stderr
    assert "Traceback" not in finished.stderr
    listed = subprocess.run([*command, "models"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout == f"{MODEL}\n"


def test_not_ready_in_time_is_said(client: TorchServe) -> None:
    """Waiting has an end, and says what was awaited."""
    with pytest.raises(ClientError, match="nobody is not ready after 0 s: Model not found"):
        client.wait_until_ready("nobody", timeout_s=0)
