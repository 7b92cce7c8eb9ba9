"""The packages that a worker runs with, as a CycloneDX 1.6 bill of materials.

Listed are TorchServe with the Java libraries inside its jar, what the handler's files import, and all that these need
in turn, as installed where the archive is built, for that is where the doctor proves that it loads.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from archive import java_libraries
from archive.errors import IncompleteRun
from archive.members import MODEL_FILES
from archive.run_folder import RunFolder

if sys.version_info >= (3, 11):
    from importlib.metadata import packages_distributions
else:  # that of Python 3.10 does not see packages without a top_level.txt, such as pydantic
    from importlib_metadata import packages_distributions

_SERVER = "torchserve"


def bill_of_materials(content: Path, name: str, version: str) -> dict[str, Any]:
    """The document for the model in the folder `content`, without time or serial number: the same for the same run.

    Raises:
        IncompleteRun: `provenance.json` cannot be read.
    """
    try:
        provenance = json.loads((content / RunFolder.provenance).read_text(encoding="utf-8"))
        data, commit = provenance["data_sha256"], provenance["code"]["commit"]
    except (ValueError, KeyError, TypeError) as error:
        raise IncompleteRun(
            f"{RunFolder.provenance} does not say where the model comes from ({error!r}): train it again"
        ) from None
    carried = next(content / name for name in MODEL_FILES if (content / name).exists())
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": version,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(carried.read_bytes()).hexdigest()}],
        "properties": [
            {"name": "training:data_sha256", "value": str(data)},
            {"name": "training:code_commit", "value": str(commit)},
        ],
    }
    return document(model, imported_packages(content))


def document(about: dict[str, Any], roots: list[str], platforms: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A CycloneDX document of packages, all that they require, and the Java libraries inside TorchServe's jar.

    Args:
        about: the component that needs them.
        platforms: name → version of what it runs on, beside Python.
    """
    platforms = {"python": platform.python_version(), **(platforms or {})}
    inside = java_libraries.read()
    components = [
        *(
            {"type": "platform", "bom-ref": name, "name": name, "version": version}
            for name, version in platforms.items()
        ),
        *(
            {
                "type": "library",
                "bom-ref": package,
                "name": package,
                "version": installed,
                "purl": _purl(package, installed),
            }
            for package, installed in with_requirements(roots).items()
        ),
        *map(_java_component, inside),
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": about},
        "components": components,
        "dependencies": [
            {"ref": about["bom-ref"], "dependsOn": [*platforms, *roots]},
            {"ref": _SERVER, "dependsOn": [library.purl for library in inside]},
        ],
    }


def _java_component(library: java_libraries.Library) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": library.purl,
        "group": library.group,
        "name": library.name,
        **({"version": library.version} if library.version else {}),
        "purl": library.purl,
        "properties": [{"name": "version:source", "value": library.source}],
    }


def imported_packages(*folders: Path) -> list[str]:
    """TorchServe and the packages of which the code in these folders imports modules, where they are installed."""
    trees = [ast.parse(path.read_bytes()) for folder in folders for path in folder.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    installed = packages_distributions()
    packages = {package for module in modules for package in installed.get(module.partition(".")[0], ())}
    return sorted({_SERVER, *map(canonicalize_name, packages)})


def with_requirements(roots: list[str]) -> dict[str, str]:
    """Name and installed version of packages and of all that they require, by name."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(root, "") for root in roots]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # where it is needed after all, the doctor misses it
        found[name] = installed.version
        for requirement in map(Requirement, installed.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return dict(sorted(found.items()))


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{quote(version)}"
