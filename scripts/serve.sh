#!/usr/bin/env bash
# Serve every archive in model_store/ with TorchServe, tokens on; returns when all are ready.
# Usage: scripts/serve.sh [cpu|gpu] [--port N] [--run-dir DIR] [--model-store DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m server start "$@"
