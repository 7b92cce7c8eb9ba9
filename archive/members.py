"""What an archive may hold and how it may be called. Nothing else is packed, and nothing else is let pass."""

from __future__ import annotations

import re
from pathlib import Path

from archive.errors import InvalidName
from archive.run_folder import RunFolder
from handler.identity import DIGESTS_FILE

HANDLER_FILE = "image_classifier.py"
# The first that an archive holds is what workers load; only the last may lie beside another.
MODEL_FILES = (RunFolder.model, RunFolder.exported_program, RunFolder.onnx)
# What the worker needs beside model and configuration, and what says where the model comes from.
EXTRA_FILES = (RunFolder.labels, RunFolder.metrics, RunFolder.provenance, RunFolder.recipe, RunFolder.golden)
# Bundled where the run folder has them.
OPTIONAL_FILES = (
    RunFolder.int8, RunFolder.onnx, RunFolder.quantisation, RunFolder.reference, RunFolder.acceptance, RunFolder.card,
)  # fmt: skip

MANIFEST_FILE = "MAR-INF/MANIFEST.json"
SBOM_FILE = "sbom.cdx.json"
GATE_FILE = "gate.json"

REQUIRED = frozenset(
    (
        *(HANDLER_FILE, RunFolder.config, MANIFEST_FILE, SBOM_FILE, GATE_FILE, DIGESTS_FILE),
        *(name for name in EXTRA_FILES if name != RunFolder.golden),
    )
)
_KNOWN = REQUIRED.union(OPTIONAL_FILES, MODEL_FILES)
_KNOWN_PATTERN = re.compile(rf"(handler|system)/[A-Za-z0-9_]+\.py|{RunFolder.golden}/[^/]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 200
"""In bytes; a file's name has at most 255, and a temporary one or that of a signature is longer than the model's."""
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,3}")


def is_known(name: str) -> bool:
    """Whether `archive build` ever writes a member of that name."""
    return name in _KNOWN or _KNOWN_PATTERN.fullmatch(name) is not None


def signature_path(archive: Path) -> Path:
    """Where the signature of an archive lies."""
    return archive.with_name(f"{archive.name}.sig")


def check_name(name: str, version: str) -> None:
    """Raises:
    InvalidName: TorchServe could not serve or manage a model of that name or version.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(f"model name {name!r}: use letters, digits, '.', '_' and '-', a letter or digit first")
    if len(name) > _LONGEST_NAME:
        raise InvalidName(f"model name {name[:20]!r}...: {len(name)} characters, at most {_LONGEST_NAME} are allowed")
    if "token" in name.lower():
        raise InvalidName(f"model name {name!r}: TorchServe takes management calls on it for token requests")
    if not _VERSION.fullmatch(version):
        raise InvalidName(f"version {version!r}: use numbers and dots, such as 1.0")
