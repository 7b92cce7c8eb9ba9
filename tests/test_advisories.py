"""archive/advisories.yaml: each row is about what is in the jar, and what it says can be seen."""

from __future__ import annotations

import ast
import json
import re
import zipfile
from functools import cache
from typing import Any
from xml.etree import ElementTree

import pytest

from archive import advisories, java_libraries
from archive.advisories import Row
from server.config import ServerConfig
from tests import write_commands
from tests.conftest import CONFIG, ROOT
from tests.pages import PAGES

ROWS = {row.what: row for row in advisories.read()}
LIBRARIES = java_libraries.read()
SHADED = "io/grpc/netty/shaded/"
_NAME = re.compile(rb"[\w$]+(?:/[\w$]+)+|[\w$]+(?:\.[\w$]+){2,}")


@cache
def loadable() -> frozenset[str]:
    """The classes that TorchServe's own name, by reference or in text, and those that they name in turn."""
    with zipfile.ZipFile(java_libraries.JAR) as jar:
        classes = {name.removesuffix(".class") for name in jar.namelist() if name.endswith(".class")}
        waiting = [name for name in classes if name.startswith("org/pytorch/serve/")]
        seen = set(waiting)
        while waiting:
            names = {
                match.decode("latin-1").replace(".", "/") for match in _NAME.findall(jar.read(f"{waiting.pop()}.class"))
            }
            # In a signature an L stands before the name, and its length, as a letter, before any.
            names |= {name[at:] for name in names for at in (1, 2)}
            found = (names & classes) - seen
            seen |= found
            waiting += found
    return frozenset(seen)


def unproved(row: Row) -> list[str]:
    """The classes that could be loaded after all, and those that are in neither netty."""
    names = [
        prefix + name
        for name in row.classes
        for where, prefix in (("own", ""), ("grpc", SHADED))
        if where in row.where and (not prefix or name.startswith("io/netty/"))
    ]
    return [f"{name}: {each}" for name in names for each in loadable() if each.startswith(name)]


@pytest.mark.parametrize("what", ROWS)
def test_every_advisory_is_about_what_is_there(what: str) -> None:
    """In a version that is affected, or that has the fix where the row says so."""
    found = list(advisories.findings(ROWS[what], LIBRARIES))
    assert found
    named = {advisory for ids in ROWS[what].affected.values() for advisory in ids}
    affected = {finding.advisory for finding in found if finding.is_affected}
    assert affected == (set() if ROWS[what].reachable == "fixed" else named)


def test_a_row_about_another_version_is_seen() -> None:
    """The control: one that is fixed already, and one about a library that is not there."""
    row = ROWS["request smuggling"]
    for affected in (
        {"io.netty:netty-codec-http": {"A": "<4.1.53.Final"}},
        {"io.netty:netty-codec-http3": {"A": "<5"}},
    ):
        changed = row.model_copy(update={"affected": affected})
        assert [finding for finding in advisories.findings(changed, LIBRARIES) if finding.is_affected] == []


@pytest.mark.parametrize(("installed", "is_affected"), [("31.1-android", True), ("32.0.0-android", False)])
def test_versions_for_android_are_compared(installed: str, is_affected: bool) -> None:
    """As Guava's are named."""
    guava = java_libraries.Library("com.google.guava", "guava", installed, "jar")
    row = ROWS["temporary files that others may read, by Guava"]
    assert {finding.is_affected for finding in advisories.findings(row, [guava])} == {is_affected}


@pytest.mark.parametrize("what", [what for what, row in ROWS.items() if row.classes])
def test_what_is_called_unreachable_cannot_be_loaded(what: str) -> None:
    """No chain of class names leads there from TorchServe's own classes."""
    assert unproved(ROWS[what]) == []


def test_what_can_be_loaded_is_seen() -> None:
    """The control: the decoder of requests, and HTTP/2 for gRPC, which the same search finds."""
    row = ROWS["HTTP/2 of the HTTP ports"]
    assert unproved(row.model_copy(update={"classes": ("io/netty/handler/codec/http/HttpObjectDecoder",)}))
    assert unproved(row.model_copy(update={"where": ("grpc",)}))


def test_every_row_says_how_it_is_known() -> None:
    """By classes, by a test that exists, or by a reason that no test of ours could show."""
    for row in ROWS.values():
        file, _, name = row.test.partition("::")
        if row.test:
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row.test
        assert row.test or row.reachable == "nowhere"


@pytest.mark.parametrize("where", ["own", "grpc"])
def test_an_advisory_of_both_nettys_is_judged_in_both(where: str) -> None:
    """Every advisory that any row names is in a row about this copy, if the copy is affected."""
    needed, judged = set(), set()
    for row in ROWS.values():
        here = row.model_copy(update={"where": (where,)})
        needed |= {(each.advisory, each.purl) for each in advisories.findings(here, LIBRARIES) if each.is_affected}
        if where in row.where:
            judged |= {(each.advisory, each.purl) for each in advisories.findings(row, LIBRARIES)}
    assert needed <= judged


def silent_about_metrics(told: list[dict[str, Any]]) -> set[str]:
    """The advisories of the HTTP codec that only this machine reaches, and that do not name the metrics' port."""
    purl = "pkg:maven/io.netty/netty-codec-http@4.1.53.Final"
    return {
        entry["id"]
        for entry in told
        if {"ref": purl} in entry["affects"]
        and entry["analysis"].get("justification") == "protected_at_perimeter"
        and "8082" not in entry["analysis"]["detail"]
    }


def test_rows_say_what_the_metrics_of_the_image_are_open_to() -> None:
    """There they listen on every address, with the codec of the other ports: the table and scanners are told."""
    assert "http://0.0.0.0:8082" in (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    told = advisories.vulnerabilities(LIBRARIES)
    assert silent_about_metrics(told) == set()
    forgotten = json.loads(json.dumps(told).replace("8082", ""))
    assert {"CVE-2021-43797", "CVE-2026-93491"} <= silent_about_metrics(forgotten)


def test_the_page_shows_the_data() -> None:
    """Written by `python -m tests.write_commands`."""
    assert PAGES["docs/security.md"] == write_commands.security_page(), "python -m tests.write_commands writes it anew"


def test_scanners_are_told() -> None:
    """Each advisory with a state, about components that the document has."""
    told = advisories.vulnerabilities(LIBRARIES)
    refs = {library.purl for library in LIBRARIES} | {"torchserve"}
    assert {each["ref"] for entry in told for each in entry["affects"]} <= refs
    states = {entry["id"]: entry["analysis"]["state"] for entry in told}
    assert states["CVE-2023-43654"] == "resolved" and states["CVE-2026-42586"] == "not_affected"
    assert states["CVE-2021-44228"] == states["CVE-2022-1471"] == "resolved"
    refs = {each["ref"] for entry in told if entry["id"] == "CVE-2025-55163" for each in entry["affects"]}
    assert "pkg:maven/io.grpc/grpc-netty-shaded@1.50.0" in refs
    assert json.dumps(told)


def test_logs_stay_on_this_machine() -> None:
    """No appender of the network and no XML."""
    tree = ElementTree.parse(ROOT / "config" / "log4j2.xml")
    tags = {element.tag for element in tree.iter() if element.tag.endswith(("Appender", "File", "Console", "Layout"))}
    assert tags == {"Console", "RollingFile", "PatternLayout"}


def test_no_address_may_be_registered() -> None:
    """The expression for allowed addresses fits none, and the model API is off."""
    config = ServerConfig.read(CONFIG)
    assert not config.properties.is_true("enable_model_api")
    assert not re.match(config.value("allowed_urls"), "https://example.org/a.mar")


def test_grpc_is_plain_text() -> None:
    """So that it reads no TLS."""
    assert not ServerConfig.read(CONFIG).properties.is_true("enable_grpc_ssl")
