#!/usr/bin/env bash
# Bundle a run folder into model_store/NAME.mar, once a worker has loaded it and it meets the floors of its recipe.
# Usage: scripts/archive.sh runs/NAME [--name NAME] [--version 1.0] [--private-key KEY] [--force]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m archive build "$@"
