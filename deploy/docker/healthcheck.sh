#!/usr/bin/env bash
# Healthy: every archive of the model store has as many ready workers as it declares.
# Usage: deploy/docker/healthcheck.sh [MODEL_STORE]
set -euo pipefail
cd "$(dirname "$0")/../.."
for archive in "${1:-model_store}"/*.mar; do
    python -m client ready "$(basename "$archive" .mar)" --timeout-s 0
done
