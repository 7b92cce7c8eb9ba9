#!/usr/bin/env bash
# Run all tests, live ones against a real TorchServe included.
# Usage: scripts/test.sh [PYTEST OPTION]...      for example: scripts/test.sh -m "not live"
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
exec .venv/bin/python -m pytest "$@"
