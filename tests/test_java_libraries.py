"""What TorchServe's jar holds, as a scanner can look it up."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from archive import java_libraries
from server.__main__ import app


def test_the_libraries_are_those_of_torchserve_0_12() -> None:
    """By what the jar says of itself, and by its digest for what its build has stripped."""
    found = {library.purl: library.source for library in java_libraries.read()}
    for purl in ("io.netty/netty-codec-http@4.1.53.Final", "io.grpc/grpc-netty-shaded@1.50.0"):
        assert found[f"pkg:maven/{purl}"] == "jar"
    assert found["pkg:maven/io.netty/netty-codec-http2@4.1.79.Final"] == "jar, inside grpc-netty-shaded"
    for purl in ("org.yaml/snakeyaml@2.1", "org.apache.commons/commons-compress@1.25.0"):
        assert found[f"pkg:maven/{purl}"] == "build files of TorchServe 0.12.0"


def test_another_jar_is_read_anew(tmp_path: Path) -> None:
    """Its own versions, none where only the build files of 0.12.0 would tell, and nothing that it does not hold."""
    jar = tmp_path / "model-server.jar"
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr("META-INF/io.netty.versions.properties", "netty-handler.version=4.2.0.Final\n")
        archive.writestr("org/yaml/snakeyaml/Yaml.class", b"")
    assert [library.purl for library in java_libraries.read(jar)] == [
        "pkg:maven/io.netty/netty-handler@4.2.0.Final", "pkg:maven/org.yaml/snakeyaml",
    ]  # fmt: skip


@pytest.mark.process
def test_a_server_says_what_it_is_made_of() -> None:
    """Valid by CycloneDX's own schema: Python, Java, packages and the jar's libraries, each with its version."""
    from cyclonedx.schema import SchemaVersion  # takes seconds, which every process of tests would pay for
    from cyclonedx.validation.json import JsonStrictValidator

    printed = CliRunner().invoke(app, ["sbom"]).stdout
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(printed) is None
    versions = {component["name"]: component["version"] for component in json.loads(printed)["components"]}
    assert {"python", "java", "torchserve", "requests", "netty-codec-http2"} <= versions.keys()
