#!/usr/bin/env bash
# Stop the TorchServe that was started in a directory, by scripts/serve.sh or by torchserve --start, and no other.
# One with --foreground finishes its requests first.
# Usage: scripts/stop.sh [--run-dir DIR]      seen from where it is called; by default the project's root
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m server --directory "$caller" stop "$@"
