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
    for purl in ("org.yaml/snakeyaml@2.1", "org.webjars/jquery@3.5.1", "info.picocli/picocli@4.6.1"):
        assert found[f"pkg:maven/{purl}"] == "jar"
    assert found["pkg:maven/org.apache.commons/commons-compress@1.25.0"] == "build files of TorchServe 0.12.0"
    assert found["pkg:maven/com.google.guava/guava@31.1-android"].startswith("build files of gRPC 1.50.0")
    assert found["pkg:maven/org.testng/testng@7.4.0"].startswith("build files of Groovy 3.0.9")
    assert not any(purl.startswith("pkg:maven/io.netty/netty-tcnative@") for purl in found)  # named, but packed apart


def unlisted(jar: Path) -> set[str]:
    """Folders with classes that are not of a library found in the jar, nor TorchServe's own, nor netty's."""
    with zipfile.ZipFile(jar) as archive:
        names = {name.removeprefix("META-INF/versions/9/") for name in archive.namelist()}
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".class")} - {""}  # module-info has no folder
    found = [f"{library.group}:{library.name}" for library in java_libraries.read(jar)]
    listed = ["org/pytorch/serve/", "io/netty/", *(java_libraries.FOLDERS.get(name, "") for name in found)]
    return {folder for folder in folders if not any(java_libraries.is_in(folder, each) for each in listed)}


def test_every_class_is_of_a_listed_library() -> None:
    """So that no library of the jar is missing in the bill of materials."""
    assert unlisted(java_libraries.JAR) == set()


def test_a_library_that_nobody_listed_is_seen(tmp_path: Path) -> None:
    """The control: one of its own, one beside gRPC's, and one for Java 9 alone."""
    jar = tmp_path / "model-server.jar"
    with zipfile.ZipFile(jar, "w") as archive:
        for name in ("org/yaml/snakeyaml/Yaml", "org/new/New", "io/grpc/okhttp/New", "META-INF/versions/9/nine/New"):
            archive.writestr(f"{name}.class", b"")
    assert unlisted(jar) == {"org/new", "io/grpc/okhttp", "nine"}


def test_classes_fit_the_versions_of_build_files() -> None:
    """Those that only some versions of Guava and TestNG have."""
    with zipfile.ZipFile(java_libraries.JAR) as archive:
        names = set(archive.namelist())
    assert "com/google/common/io/TempFileCreator.class" not in names  # Guava 32 has it
    assert "org/testng/JarFileUtils.class" in names and "com/google/common/base/NullnessCasts.class" in names


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
