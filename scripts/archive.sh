#!/usr/bin/env bash
# Bundle a run folder into model_store/NAME.mar, once it is proved that a worker serves it.
# Usage: scripts/archive.sh runs/NAME [--quantise] [--name NAME] [--version 1.0] [--force] [--private-key FILE]
# --quantise first makes int8 models, as TorchScript and, where ONNX's packages are installed, as ONNX; each is kept where
# it is as accurate and faster: python -m train.quantise
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
arguments=()
quantise=
for argument in "$@"; do
    if [[ $argument == --quantise ]]; then quantise=yes; else arguments+=("$argument"); fi
done
if [[ $quantise ]]; then
    run=${arguments[0]:-} onnx=()
    if .venv/bin/python -c "import onnx, onnxruntime, onnxscript" 2>/dev/null; then
        exported=$(mktemp -d)
        trap 'rm -r "$exported"' EXIT
        .venv/bin/python -m archive export "$run" "$exported" --to onnx >/dev/null
        onnx=(--onnx "$exported/model.onnx")
    fi
    # 3: it was measured and not kept, which is no error
    .venv/bin/python -m train.quantise "$run" "${onnx[@]}" || [[ $? == 3 ]]
fi
.venv/bin/python -m archive build "${arguments[@]}"
