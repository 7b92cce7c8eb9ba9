#!/usr/bin/env bash
# Bundle a run folder into model_store/NAME.mar, once it is proved that a worker serves it.
# Usage: scripts/archive.sh runs/NAME [--quantise [auto]] [--name NAME] [--version 1.0] [--force] [--private-key FILE]
# --quantise first makes int8 models, as TorchScript and, where ONNX's packages are installed, as ONNX; each is kept
# where it can be had and is as accurate and faster: python -m train.quantise
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
trap 'exit 130' INT
arguments=()
quantise=
while (($# > 0)); do
    case $1 in
        --quantise=auto) quantise=yes ;;
        --quantise)
            quantise=yes
            if [[ ${2:-} == auto ]]; then shift; fi
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [[ $quantise ]]; then
    run=$(.venv/bin/python -m archive build "${arguments[@]}" --dry-run)
    onnx=()
    if .venv/bin/python -c "import onnx, onnxruntime, onnxscript" 2>/dev/null; then
        exported=$(mktemp -d)
        trap 'rm -r "$exported"' EXIT
        if .venv/bin/python -m archive export "$run" "$exported" --to onnx >/dev/null; then
            onnx=(--onnx "$exported/model.onnx")
        else
            echo "going on without int8 as ONNX" >&2
        fi
    fi
    # 3: it was measured and not kept, or cannot be had of this network, which is no error
    .venv/bin/python -m train.quantise "$run" "${onnx[@]}" || [[ $? == 3 ]]
fi
.venv/bin/python -m archive build "${arguments[@]}"
