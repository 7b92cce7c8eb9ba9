#!/usr/bin/env bash
# Serve every NAME.mar in model_store/ with TorchServe, tokens on; returns when all are ready.
# Usage: scripts/serve.sh [cpu|gpu] [--port N] [--run-dir DIR] [--model-store DIR] [--log-format json] [--model-api]
#                         [--foreground [--drain-timeout-s 30]]
# --foreground does not return: it starts the server again when it dies, and on SIGTERM lets it finish its requests.
# Relative paths, also in ARCHIVE_PUBLIC_KEY, are seen from where it is called; the defaults lie in the project's root.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m server --directory "$caller" start "$@"
