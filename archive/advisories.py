"""Known vulnerabilities of TorchServe and of the libraries inside its jar: which are reachable here, what closes them.

`advisories.yaml` says it. docs/security.md shows it as a table, and the document of `python -m server sbom` as
CycloneDX `vulnerabilities` (VEX), so that a scanner does not report what cannot be reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import BaseModel, ConfigDict

from archive import java_libraries, strict_yaml

_FILE = Path(__file__).with_name("advisories.yaml")
_TORCHSERVE = "torchserve"
_SUFFIX = re.compile(r"\.Final|-android")
_STATES: dict[str, dict[str, Any]] = {
    "nowhere": {"state": "not_affected", "justification": "code_not_reachable"},
    "this machine": {"state": "not_affected", "justification": "protected_at_perimeter"},
    "anywhere": {"state": "exploitable", "response": ["will_not_fix", "workaround_available"]},
    "fixed": {"state": "resolved"},
}


class Row(BaseModel):
    """Advisories that one thing answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    where: tuple[Literal["own", "grpc"], ...]
    """In which of the two nettys: TorchServe's own, or gRPC's copy."""
    reachable: Literal["nowhere", "this machine", "anywhere", "fixed"]
    why: str
    classes: tuple[str, ...] = ()
    """Beginnings of the names of Java classes that TorchServe cannot come to load."""
    test: str = ""
    """FILE::FUNCTION that shows it."""
    remains: str = ""
    affected: dict[str, dict[str, str]]
    """Library → advisory → versions, `>=1.3 <1.26.0`."""


class Finding(NamedTuple):
    """One advisory about one component."""

    advisory: str
    purl: str
    is_affected: bool


def read() -> list[Row]:
    """The rows of `advisories.yaml`, in its order."""
    return [Row.model_validate(row) for row in strict_yaml.load(_FILE.read_text(encoding="utf-8"))]


def findings(row: Row, libraries: list[java_libraries.Library]) -> Iterator[Finding]:
    """Each advisory of a row with each component that the row is about."""
    for name, advisories in row.affected.items():
        components = (
            [(f"pkg:pypi/{name}@{version(name)}", version(name))]
            if name == _TORCHSERVE
            else [
                (library.purl, library.version)
                for library in libraries
                if name == f"{library.group}:{library.name}" and ("grpc" if library.is_of_grpc else "own") in row.where
            ]
        )
        for advisory, versions in advisories.items():
            for purl, installed in components:
                yield Finding(advisory, purl, installed is not None and _is_within(installed, versions))


def _is_within(installed: str, versions: str) -> bool:
    """Whether a version, which may end in `.Final` or `-android`, is one of `>=1.3 <1.26.0`."""
    plain = _SUFFIX.sub("", versions).replace(" ", ",")
    return Version(_SUFFIX.sub("", installed)) in SpecifierSet(plain)


def vulnerabilities(libraries: list[java_libraries.Library]) -> list[dict[str, Any]]:
    """CycloneDX 1.6 `vulnerabilities` of the components that are there."""
    result: list[dict[str, Any]] = []
    for row in read():
        affects: dict[str, list[dict[str, str]]] = {}
        for finding in findings(row, libraries):
            if finding.is_affected == (row.reachable == "fixed"):
                continue
            ref = _TORCHSERVE if finding.purl.startswith("pkg:pypi/") else finding.purl
            affects.setdefault(finding.advisory, []).append({"ref": ref})
        detail = " ".join(filter(None, [f"{row.what}:", row.why, row.remains]))
        result += [
            {
                "id": advisory,
                "source": {"name": "CVE", "url": f"https://www.cve.org/CVERecord?id={advisory}"},
                "analysis": {**_STATES[row.reachable], "detail": detail},
                "affects": refs,
            }
            for advisory, refs in affects.items()
        ]
    return result


def table(libraries: list[java_libraries.Library]) -> str:
    """What docs/security.md shows, in Markdown, with the libraries that no advisory of a row affects."""
    rows = [
        "| what, in which library | reachable from | why, and which test shows it | what remains |",
        "|---|---|---|---|",
    ]
    for row in read():
        what = f"{row.what}: {'; '.join(f'{_short(name)} {_ids(ids)}' for name, ids in row.affected.items())}"
        if row.where == ("grpc",):
            what = f"gRPC's copy of netty, {what}"
        test = f" (`pytest {row.test}`)" if row.test else ""
        if row.classes:
            test = " (`pytest tests/test_advisories.py -k load`)"
        rows.append(f"| {what} | {row.reachable} | {row.why}{test} | {row.remains} |")
    named = {finding.purl for row in read() for finding in findings(row, libraries) if finding.is_affected}
    releases: dict[tuple[str, str | None], list[str]] = {}
    for each in libraries:
        if each.purl not in named:
            releases.setdefault((each.group, each.version), []).append(each.name)
    clean = sorted(f"{', '.join(names)} {version}" for (_, version), names in releases.items())
    return "\n".join([*rows, "", f"No advisory of these rows affects: {'; '.join(clean)}.", ""])


def _short(library: str) -> str:
    return library.partition(":")[2] or library


def _ids(advisories: Mapping[str, str]) -> str:
    return ", ".join(advisories)
