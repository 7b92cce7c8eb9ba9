#!/usr/bin/env bash
# Resolve pyproject.toml anew into the two lock files: versions and hashes for every platform and Python, no addresses.
# Usage: scripts/lock.sh [--upgrade-package NAME]...
set -euo pipefail
cd "$(dirname "$0")/.."
uv=(uv pip compile pyproject.toml --extra server --universal --python-version 3.10 --generate-hashes
    --no-annotate --no-header --quiet)
if ! command -v uv >/dev/null; then
    echo "error: uv is needed to resolve: pip install uv" >&2
    exit 1
fi
"${uv[@]}" --output-file requirements.lock "$@"
"${uv[@]}" --extra dev --constraint requirements.lock --output-file requirements-dev.lock "$@"
