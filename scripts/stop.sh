#!/usr/bin/env bash
# Stop the TorchServe that was started here, by scripts/serve.sh or by torchserve --start, and no other.
# One with --foreground finishes its requests first.
# Usage: scripts/stop.sh [--run-dir DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m server stop "$@"
