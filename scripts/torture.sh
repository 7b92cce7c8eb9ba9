#!/usr/bin/env bash
# Harm real servers for as long as docs/reliability.md states, and write what was seen there. Takes an hour, wants root.
# Usage: scripts/torture.sh [PYTEST OPTION]...      for example: scripts/torture.sh -k soak
#        TORTURE=short scripts/torture.sh           in minutes, as scripts/test.sh --all does
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
export TORTURE=${TORTURE:-long}
results=$(mktemp)
trap 'rm -f "$results"' EXIT
status=0
mapfile -t tests < <(.venv/bin/python -m tests.torture.report tests)
.venv/bin/python -m pytest --junitxml "$results" "$@" "${tests[@]}" || status=$?
.venv/bin/python -m tests.torture.report write "$results"
exit "$status"
