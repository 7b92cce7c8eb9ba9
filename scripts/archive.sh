#!/usr/bin/env bash
# Bundle a run folder into model_store/NAME.mar, once it is proved that a worker serves it.
# Usage: scripts/archive.sh runs/NAME [--quantise] [--name NAME] [--version 1.0] [--force] [--private-key FILE]
# --quantise first makes an int8 model, which is kept where it is as accurate and faster: python -m train.quantise
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
arguments=()
quantise=
for argument in "$@"; do
    if [[ $argument == --quantise ]]; then quantise=yes; else arguments+=("$argument"); fi
done
if [[ $quantise ]]; then
    # 3: it was measured and not kept, which is no error
    .venv/bin/python -m train.quantise "${arguments[0]:-}" || [[ $? == 3 ]]
fi
exec .venv/bin/python -m archive build "${arguments[@]}"
