"""Where the client finds its server: addresses, the management port, and certificates."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.__main__ import app
from client.torchserve import TorchServe
from operate.tuning.wire import Wire
from tests.conftest import MODEL
from tests.edges import certificate_command
from tests.listening import Quiet, key_file, listening


@pytest.mark.parametrize("url", ["localhost:8080", "http//localhost", "http://localhost:port", "http://[::1"])
def test_what_is_no_address_is_said(tmp_path: Path, url: str) -> None:
    """Once and by its name; no image gets a row that a corrected run would skip, but a file that is missing does."""
    (tmp_path / "a.png").write_bytes(b"image")
    output = tmp_path / "results.jsonl"
    place = ["--url", url, "--key-file", str(key_file(tmp_path, inference={"key": "i"}, management={"key": "m"}))]
    asked = ["predict", MODEL, str(tmp_path / "none.png"), str(tmp_path / "a.png"), "--output", str(output)]
    refused = CliRunner().invoke(app, [*place, "--management-url", "http://127.0.0.1:9", *asked])
    assert refused.exit_code == 1
    assert re.search(rf"^error: {re.escape(url)}\S* is no address of a server.*\n$", refused.stderr, re.MULTILINE)
    [row] = map(json.loads, output.read_text().splitlines())
    assert row["file"] == str(tmp_path / "none.png")
    without = CliRunner().invoke(app, [*place, "models"])
    assert re.fullmatch(rf"error: {re.escape(url)} is no address of a server.*\n", without.stderr)


@pytest.mark.parametrize(
    ("url", "management_url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8081"),
        ("http://models.example/", "http://models.example:81"),
        ("http://[::1]:8080", "http://[::1]:8081"),
        ("https://[fe80::1]:9", "https://[fe80::1]:10"),
    ],
)
def test_management_is_at_the_next_port(url: str, management_url: str) -> None:
    """Of the same host by the same scheme; an IPv6 address keeps its brackets, without which it has no port."""
    assert TorchServe(url).management_url == management_url


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """One that was made by the documented line, with its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on this machine")
    subprocess.run(["bash", "-ec", certificate_command()], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "certificate.pem"


@pytest.mark.process
def test_a_private_authority_is_named(certificate: Path, tmp_path: Path) -> None:
    """By option or variable, for calls, metrics and loads alike; without it nothing is sent, and the option is said."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, certificate.with_suffix(".key"))
    path = key_file(tmp_path, management={"key": "m"})

    class Handler(Quiet):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.send_response(200)
                self.end_headers()
            else:
                self.answer({"models": [{"modelName": "m"}]})

    with listening(Handler, tls) as url:
        place, own = ["--url", url, "--management-url", url, "--key-file", str(path)], ["--ca", str(certificate)]
        asked = (["models"], ["metrics", "--metrics-url", url])
        for command in asked:
            untrusted = CliRunner().invoke(app, [*place, *command])
            assert untrusted.exit_code == 1
            complaint = rf"error: no TLS with {url} \(.*certificate verify failed.*\): --ca or TORCHSERVE_CA names .*\n"
            assert re.fullmatch(complaint, untrusted.stderr)
            assert CliRunner().invoke(app, [*place, *own, *command]).exit_code == 0
        assert CliRunner().invoke(app, [*place, "models"], env={"TORCHSERVE_CA": str(certificate)}).output == "m\n"
        request = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with closing(Wire(url, certificate)) as wire:
            assert wire.ask(request, time.perf_counter() + 10)[0] == 200
        with closing(Wire(url)) as wire, pytest.raises(ssl.SSLCertVerificationError):
            wire.ask(request, time.perf_counter() + 10)


def test_metrics_of_something_else_are_refused() -> None:
    """A page that is not in Prometheus' format does not pass for a server without figures."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.answer({"status": "Healthy"})

    with listening(Handler) as url:
        refused = CliRunner().invoke(app, ["metrics", "--metrics-url", url])
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {url}/metrics answers, but not in Prometheus' format")


@pytest.mark.parametrize("name", ["none.pem", "key_file.json"])
def test_a_file_without_certificates_is_said(tmp_path: Path, name: str) -> None:
    """One that is missing and one that holds something else, before anything is asked."""
    key_file(tmp_path, management={"key": "m"})
    refused = CliRunner().invoke(app, ["--ca", str(tmp_path / name), "models"])
    assert refused.exit_code == 1
    assert re.fullmatch(rf"error: \S+{name} is no file of certificates in PEM: .+\n", refused.stderr)
