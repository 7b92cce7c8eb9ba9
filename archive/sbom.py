"""The packages that a worker runs with, as a CycloneDX 1.6 bill of materials.

Listed are TorchServe, what the handler's files import, and all that these need in turn, as installed where the archive
is built, for that is where the doctor proves that it loads.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from archive.errors import IncompleteRun
from archive.members import PROVENANCE_FILE, SERIALIZED_FILE

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
        provenance = json.loads((content / PROVENANCE_FILE).read_text(encoding="utf-8"))
        data, commit = provenance["data_sha256"], provenance["code"]["commit"]
    except (ValueError, KeyError, TypeError) as error:
        raise IncompleteRun(
            f"{PROVENANCE_FILE} does not say where the model comes from ({error!r}): train it again"
        ) from None
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": version,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256((content / SERIALIZED_FILE).read_bytes()).hexdigest()}],
        "properties": [
            {"name": "training:data_sha256", "value": str(data)},
            {"name": "training:code_commit", "value": str(commit)},
        ],
    }
    roots = imported_packages(content)
    components = [
        {"type": "platform", "bom-ref": "python", "name": "python", "version": platform.python_version()},
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
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": components,
        "dependencies": [{"ref": "model", "dependsOn": ["python", *roots]}],
    }


def imported_packages(content: Path) -> list[str]:
    """TorchServe and the packages of which the archive's own code imports modules, where they are installed."""
    trees = [ast.parse(path.read_bytes()) for path in content.rglob("*.py")]
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
