#!/usr/bin/env bash
# Healthy: every archive that a start serves has its workers ready, and its golden images are answered as measured.
# Usage: deploy/docker/healthcheck.sh [--workers] [MODEL_STORE]
# --workers looks only at the workers: for tools that restart unhealthy containers, which a full queue is no reason for.
set -euo pipefail
# Less than Docker and Kubernetes give; 0 is one look.
seconds=4
if [[ ${1:-} == --workers ]]; then
    seconds=0
    shift
fi
store=$(realpath "${1:-$(dirname "$0")/../../model_store}")
cd "$(dirname "$0")/../.."
archives=$(python - "$store" <<'EOF'
import sys
from pathlib import Path
from server import store
print(*(archive.path for archive in store.archives(Path(sys.argv[1]))[0]), sep="\n")
EOF
)
if [[ -z $archives ]]; then
    echo "error: no archive in $store" >&2
    exit 1
fi
while read -r archive; do
    # Workers may serve in lower precision than golden answers were measured in; one that is wrong or hangs shows.
    golden=(--golden "$archive" --tolerance 0.1)
    ((seconds)) || golden=()
    python -m operate ready --timeout-s "$seconds" "${golden[@]}" -- "$(basename "$archive" .mar)"
done <<<"$archives"
