#!/usr/bin/env bash
# Make .venv from the lock file, Java included; silent and quick when it is up to date.
# Usage: scripts/setup.sh [--dev | --cpu]      --dev adds the tools that scripts/test.sh and scripts/check.sh use
#        --cpu takes PyTorch without CUDA, from the index of wheels for the CPU that TORCH_INDEX_URL names
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: scripts/setup.sh [--dev | --cpu]"
lock=requirements.lock
cpu=
[[ $# -le 1 ]] || set -- "$*"
for argument in "$@"; do
    case $argument in
        --dev) lock=requirements-dev.lock ;;
        --cpu) cpu=yes ;;
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
if [[ -n $cpu && -e .venv/installed.lock && ! -e .venv/torch.txt ]]; then
    echo "error: .venv has PyTorch with CUDA: remove the folder, then call $0 --cpu again" >&2
    exit 1
fi
# The development lock holds everything that the other one does.
for installed in "$lock" requirements-dev.lock; do
    cmp -s "$installed" .venv/installed.lock && exit 0
done

if [[ -n $cpu && -z ${TORCH_INDEX_URL:-} ]]; then
    echo "error: name PyTorch's index of wheels for the CPU, which pytorch.org has: TORCH_INDEX_URL=... $0 --cpu" >&2
    exit 1
fi

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
install() {  # with pip's options; shows how far it is
    local packages collected=0
    packages=$(grep -c '^[A-Za-z0-9]' "$lock")
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile "$@" |
        while read -r word rest; do
            case $word in
                Collecting | Processing)
                    collected=$((collected + 1))
                    if [[ -t 1 ]]; then
                        printf '\r%4d of %d packages: %-40.40s' "$collected" "$packages" "$(basename "${rest%% *}")"
                    elif ((collected % (packages / 8 + 1) == 0)); then
                        echo "$collected of $packages packages"
                    fi
                    ;;
                Installing) printf '%sunpacking %d packages\n' "$([[ ! -t 1 ]] || printf '\r%60s\r' '')" "$collected" ;;
            esac
        done
}
if [[ -n $cpu ]]; then
    for kind in cpu torch; do
        .venv/bin/python deploy/docker/requirements.py "$kind" >".venv/$kind.txt"
    done
    install --no-deps --require-hashes --requirement .venv/cpu.txt
    # Another build than the locked one, of the same version; its hashes are not in the lock.
    install --no-deps --index-url "$TORCH_INDEX_URL" --requirement .venv/torch.txt
    .venv/bin/python -m pip check
else
    install --require-hashes --requirement "$lock"
    rm -f .venv/torch.txt
fi
# On all cores, which pip does not use. Python would compile what it imports, but not where PYTHONDONTWRITEBYTECODE is set
# or a server's user may not write: there each start would compile PyTorch anew, for 4 s.
echo "compiling the packages' Python code"
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true  # a few files are for other versions of Python
cp "$lock" .venv/installed.lock
