#!/usr/bin/env bash
# Bundle a run folder into model_store/NAME.mar.
# Usage: scripts/archive.sh runs/NAME [--name NAME] [--version 1.0]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m archive build "$@"
