#!/usr/bin/env bash
# Make .venv from the lock file, Java included; silent and quick when it is up to date.
# Usage: scripts/setup.sh [--dev]      --dev adds the tools that scripts/test.sh and scripts/check.sh use
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: scripts/setup.sh [--dev]"
lock=requirements.lock
for argument in "$@"; do
    case $argument in
        --dev) lock=requirements-dev.lock ;;
        --help)
            echo "$usage"
            exit
            ;;
        *)
            echo "$usage" >&2
            exit 2
            ;;
    esac
done
# The development lock holds everything that the other one does.
for installed in "$lock" requirements-dev.lock; do
    cmp -s "$installed" .venv/installed.lock && exit 0
done

supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if "$candidate" -c "$supported" 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    found=$("${PYTHON:-python3}" --version 2>&1 || true)
    echo "error: Python 3.10 to 3.13 is needed, found: ${found:-none}. Install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $("$python" --version) has no venv module: install it (Debian and Ubuntu: the package python3-venv)" >&2
    exit 1
fi

echo "making .venv with $("$python" --version) from $lock: PyTorch is large, this takes some minutes the first time"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check --require-hashes --requirement "$lock"
cp "$lock" .venv/installed.lock
