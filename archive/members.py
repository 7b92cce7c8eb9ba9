"""What an archive may hold, by name. Nothing else is packed, and nothing else is let pass."""

from __future__ import annotations

import re
from pathlib import Path

from handler.identity import DIGESTS_FILE

HANDLER_FILE = "image_classifier.py"
SERIALIZED_FILE = "model.pt"
CONFIG_FILE = "model-config.yaml"
RECIPE_FILE = "recipe.yaml"
LABELS_FILE = "index_to_name.json"
METRICS_FILE = "metrics.json"
PROVENANCE_FILE = "provenance.json"
GOLDEN = "golden"
# What the worker needs beside model and configuration, and what says where the model comes from.
EXTRA_FILES = (LABELS_FILE, METRICS_FILE, PROVENANCE_FILE, RECIPE_FILE, GOLDEN)
# Bundled where the run folder has them. Training writes the int8 forms and a worker loads them by these names.
INT8_FILES = ("model.int8.pt", "model.int8.onnx")
QUANTISATION_FILE = "quantisation.json"
OPTIONAL_FILES = (*INT8_FILES, "model.onnx", QUANTISATION_FILE, "reference.json")

MANIFEST_FILE = "MAR-INF/MANIFEST.json"
SBOM_FILE = "sbom.cdx.json"
GATE_FILE = "gate.json"

REQUIRED = frozenset(
    {HANDLER_FILE, SERIALIZED_FILE, CONFIG_FILE, MANIFEST_FILE, SBOM_FILE, GATE_FILE, DIGESTS_FILE}.union(EXTRA_FILES)
    - {GOLDEN}
)
_KNOWN = REQUIRED.union(OPTIONAL_FILES)
_KNOWN_PATTERN = re.compile(r"handler/[A-Za-z0-9_]+\.py|golden/[^/]+")


def is_known(name: str) -> bool:
    """Whether `archive build` ever writes a member of that name."""
    return name in _KNOWN or _KNOWN_PATTERN.fullmatch(name) is not None


def signature_path(archive: Path) -> Path:
    """Where the signature of an archive lies."""
    return archive.with_name(f"{archive.name}.sig")
