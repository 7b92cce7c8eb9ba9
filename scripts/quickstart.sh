#!/usr/bin/env bash
# From a bare clone to a served prediction: environment, training, archive, server, answer. Leaves the server up.
# Usage: scripts/quickstart.sh [--port N]      what is already there is reused
set -euo pipefail
cd "$(dirname "$0")/.."
model=lenet5-digits
python=.venv/bin/python
usage="usage: scripts/quickstart.sh [--port N]"

if [[ $# == 2 && $1 == --port && $2 =~ ^[0-9]+$ ]]; then
    export TORCHSERVE_URL=http://127.0.0.1:$2
elif [[ $# == 1 && $1 == --help ]]; then
    echo "$usage"
    exit
elif (($# > 0)); then
    echo "$usage" >&2
    exit 2
fi
scripts/setup.sh

[[ -d runs/$model ]] || $python -m train $model
[[ -f model_store/$model.mar ]] || scripts/archive.sh runs/$model
if ! $python -m operate ready $model --timeout-s 0 2>/dev/null; then
    device=cpu
    nvidia-smi --list-gpus >/dev/null 2>&1 && device=gpu
    scripts/serve.sh $device "$@"
fi

image=$(ls runs/$model/golden/*.png | head -n 1)
accuracy=$($python - runs/$model/metrics.json <<'EOF'
import json, sys
print("{acc1:.2%} of {images} images".format(**json.load(open(sys.argv[1]))["test"]))
EOF
)
echo
echo "held-out accuracy: $accuracy"
echo "a held-out image, predicted by the server:"
$python -m client predict $model "$image"
cat <<EOF

The server is up. Next, from this directory:

  . .venv/bin/activate${TORCHSERVE_URL:+
  export TORCHSERVE_URL=$TORCHSERVE_URL}
  python -m client predict $model YOUR_FILE      # white on black, like the digits it learnt
  python -m client scale $model 1                # one worker instead of two
  scripts/stop.sh
EOF
