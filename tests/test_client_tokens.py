"""Which tokens the client takes, from where, and that it shows none."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.__main__ import app
from client.errors import ClientError, NotAuthorized
from client.tokens import Tokens, is_refused
from client.torchserve import TorchServe
from tests.conftest import MODEL
from tests.listening import key_file


def test_tokens_of_the_environment_go_first(tmp_path: Path) -> None:
    """A set variable is taken, an empty one is not, and once replaced it is forgotten."""
    path = key_file(tmp_path, inference={"key": "filed"}, management={"key": "filed too"}, API={"key": "api"})
    environment = {"TORCHSERVE_INFERENCE_TOKEN": "given", "TORCHSERVE_MANAGEMENT_TOKEN": ""}
    tokens = Tokens(path, environment)
    assert tokens.token("inference").value == "given"
    assert tokens.token("management").value == "filed too"
    assert tokens.place("inference") == "TORCHSERVE_INFERENCE_TOKEN"
    assert tokens.renew("inference", "given", lambda path, key: True)
    assert tokens.token("inference").value == "filed"
    assert Tokens(tmp_path / "none.json", environment).token("inference").value == "given"


def test_a_line_break_after_a_token_is_cut_off(tmp_path: Path) -> None:
    """As a file that was read into the variable ends with; nothing but that is as if it were not set."""
    path = key_file(tmp_path, management={"key": "filed"})
    tokens = Tokens(path, {"TORCHSERVE_INFERENCE_TOKEN": "given\r\n", "TORCHSERVE_MANAGEMENT_TOKEN": "\n"})
    assert tokens.token("inference").value == "given"
    assert tokens.token("management").value == "filed"


@pytest.mark.parametrize("value", ["very\nsecret", "very secret", "vëry-secret", "ὁ-secret"])
def test_what_cannot_be_sent_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Neither in the message nor in the results, where there is no row that a corrected run would skip."""
    monkeypatch.setenv("TORCHSERVE_INFERENCE_TOKEN", value)
    (tmp_path / "a.png").write_bytes(b"image")
    output = tmp_path / "results.jsonl"
    refused = CliRunner().invoke(app, ["predict", MODEL, str(tmp_path / "a.png"), "--output", str(output)])
    assert (refused.exit_code, output.read_text()) == (1, "")
    assert refused.stderr.startswith("error: TORCHSERVE_INFERENCE_TOKEN is set to what cannot be a token")
    assert "secret" not in refused.output


def test_a_token_that_cannot_be_sent_is_not_shown(tmp_path: Path) -> None:
    """One of the key file's too, of which `requests` itself would tell."""
    path = key_file(tmp_path, inference={"key": "very\nsecret"})
    with pytest.raises(ClientError, match=r"^cannot ask http://127\.0\.0\.1:9/\S+: InvalidHeader$"):
        TorchServe("http://127.0.0.1:9", key_file=path).predict(MODEL, b"image")


@pytest.mark.parametrize("decimals", ["", ".5", ".123456", ".123456789"])
def test_the_key_file_says_when_a_token_expires(tmp_path: Path, decimals: str) -> None:
    """Java writes as many decimals as it has; none of them, or nothing at all, is in the way."""
    entry = {"key": "k", "expiration time": f"2026-01-02T03:04:05{decimals}Z"}
    path = key_file(tmp_path, inference=entry, management={"key": "k", "expiration time": "soon"}, API={"key": "k"})
    assert Tokens(path, {}).token("inference").expires_at == 1767323045
    assert Tokens(path, {}).token("management").expires_at is None
    assert Tokens(path, {}).token("API").expires_at is None


def test_a_key_file_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """TorchServe empties its file before it writes it; a reader in between gets the token all the same."""
    path = tmp_path / "key_file.json"
    path.write_text("")
    timer = threading.Timer(0.1, key_file, (tmp_path,), {"inference": {"key": "late"}})
    timer.start()
    assert Tokens(path, {}).token("inference").value == "late"
    timer.join()


def expiring(folder: Path, left_s: float) -> Path:
    """A key file whose inference token, named for its time, has so long to live."""
    end = datetime.fromtimestamp(time.time() + left_s, timezone.utc)
    entry = {"key": f"lives-{left_s}", "expiration time": f"{end:%Y-%m-%dT%H:%M:%S}Z"}
    return key_file(folder, inference=entry, API={"key": "api"})


@pytest.mark.parametrize(
    ("left_s", "client", "edge"), [(3600, False, False), (90, False, True), (50, True, True), (-10, True, True)]
)
def test_a_token_is_due_a_minute_before_its_end(tmp_path: Path, left_s: float, client: bool, edge: bool) -> None:
    """For an edge twice as early, so that no client of the same server is before it."""
    tokens = Tokens(expiring(tmp_path, left_s), {})
    token = tokens.token("inference")
    assert (tokens.is_due("inference", token), tokens.is_due("inference", token, lead=2)) == (client, edge)


@pytest.mark.parametrize("new_s", [20, -20])
def test_a_token_that_was_renewed_is_not_due_at_once(tmp_path: Path, new_s: float) -> None:
    """Neither one that lives for seconds nor one that is from a server with another clock."""
    tokens = Tokens(expiring(tmp_path, 10), {})
    asked = []

    def exchange(path: str, key: str) -> bool:
        asked.append((path, key))
        return expiring(tmp_path, new_s).exists()

    assert tokens.is_due("inference", tokens.token("inference"))
    assert tokens.renew("inference", "lives-10", exchange)
    assert tokens.renew("inference", "lives-10", exchange), "another thread's renewal is enough"
    assert asked == [("/token?type=inference", "api")]
    assert not tokens.is_due("inference", tokens.token("inference"), lead=2)


@pytest.mark.parametrize("left_s", [50, -50])
def test_a_renewal_that_fails_is_not_tried_at_each_call(tmp_path: Path, left_s: float) -> None:
    """It is due again closer to the end, and no more when it has expired: a refusal decides then."""
    tokens = Tokens(expiring(tmp_path, left_s), {})
    assert not tokens.renew("inference", f"lives-{left_s}", lambda path, key: False)
    assert not tokens.is_due("inference", tokens.token("inference"))
    expiring(tmp_path, 5)
    assert tokens.is_due("inference", tokens.token("inference")) == (left_s > 0)


@pytest.mark.parametrize(
    ("status", "body", "refused"),
    [
        (400, b'{"code": 400, "type": "InvalidKeyException", "message": "Token Authentication failed."}', True),
        (400, b'{"code": 400, "type": "BadRequest", "message": "not an image"}', False),
        (503, b"InvalidKeyException", False),
    ],
)
def test_a_refused_token_is_told_from_other_refusals(status: int, body: bytes, refused: bool) -> None:
    """By TorchServe's type, under the status that it gives it."""
    assert is_refused(status, body) is refused


def test_the_command_prints_the_token_alone(tmp_path: Path) -> None:
    """For `curl`: the inference token, or the one that is named, and nothing but an error without any."""
    path = key_file(tmp_path, inference={"key": "asks"}, management={"key": "manages"})
    command = ["--key-file", str(path), "token"]
    assert CliRunner().invoke(app, command).output == "asks\n"
    assert CliRunner().invoke(app, [*command, "management"]).output == "manages\n"
    path.unlink()
    absent = CliRunner().invoke(app, command)
    assert (absent.exit_code, absent.stdout) == (1, "")
    assert absent.stderr.startswith("error: cannot read the tokens in ")


def test_a_token_is_not_shown(tmp_path: Path) -> None:
    """Neither by repr nor as text, and neither is the client that has it."""
    path = key_file(tmp_path, inference={"key": "very-secret"})
    tokens = Tokens(path, {"TORCHSERVE_MANAGEMENT_TOKEN": "very-secret"})
    client = TorchServe(key_file=path)
    shown = [tokens, vars(tokens), tokens.token("inference"), client, vars(client), vars(client._connection)]
    assert not [thing for thing in shown if "very-secret" in f"{thing!r} {thing!s}"]
    assert tokens.token("inference").value == "very-secret"


def test_no_tokens_name_both_ways(tmp_path: Path) -> None:
    """Who has no key file learns of the variable."""
    with pytest.raises(NotAuthorized, match="or set TORCHSERVE_INFERENCE_TOKEN"):
        TorchServe(key_file=tmp_path / "none.json").predict(MODEL, b"")
