#!/usr/bin/env bash
# Test every room in five minutes, a real TorchServe included: all but the tests with the mark `slow`.
# Usage: scripts/test.sh [--all] [PYTEST OPTION]...      --all runs the slow ones too, in half an hour
#        scripts/test.sh -m "not server and not slow"    within a minute
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
unset PYTHONDONTWRITEBYTECODE  # without it, pytest keeps the tests as it rewrites them
# Three on two cores, since a test often waits; each comes to hold 1.5 GB. With threads besides they would wait for each
# other.
export OMP_NUM_THREADS=1
options=(--numprocesses 3 --dist loadfile --no-loadscope-reorder)
if [[ ${1:-} == --all ]]; then
    shift
else
    options+=(-m "not slow")
fi
exec .venv/bin/python -m pytest "${options[@]}" "$@"
