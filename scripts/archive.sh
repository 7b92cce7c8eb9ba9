#!/usr/bin/env bash
# Bundle a run folder into model_store/NAME.mar, once it is proved that a worker serves it.
# Usage: scripts/archive.sh runs/NAME [--quantise] [--name NAME] [--version 1.0] [--force] [--private-key FILE]
# --quantise first makes an int8 model and keeps it if it is faster and loses at most 0.5 points of accuracy.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
trap 'exit 130' INT
arguments=()
quantise=
while (($# > 0)); do
    case $1 in
        --quantise) quantise=yes ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ $quantise ]]; then
    run=$(.venv/bin/python -m archive build "${arguments[@]}" --dry-run)
    # 3: it was measured and not kept, or cannot be had of this network, which is no error
    .venv/bin/python -m train.quantise "$run" || [[ $? == 3 ]]
fi
.venv/bin/python -m archive build "${arguments[@]}"
