#!/usr/bin/env bash
# Lint, formatting and types.      To mend formatting: .venv/bin/ruff format
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
