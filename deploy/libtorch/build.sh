#!/usr/bin/env bash
# Compile predict.cpp against the LibTorch inside the installed torch package; takes about 20 seconds.
# Usage: deploy/libtorch/build.sh [PROGRAM]      without it: deploy/libtorch/predict
# PYTHON=/path/to/python chooses whose torch, without it .venv's; CXX=... the compiler, without it g++.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
program=${1:-$here/predict}
python=${PYTHON:-${here%/deploy/libtorch}/.venv/bin/python}
compiler=${CXX:-g++}

fail() {
    echo "error: $1" >&2
    exit 1
}
(($# <= 1)) || fail "usage: $0 [PROGRAM]"
[[ -d $(dirname "$program") ]] || fail "no folder $(dirname "$program")"
command -v "$compiler" >/dev/null || fail "no C++ compiler $compiler: install g++, or name another: CXX=clang++ $0"
about='import torch; print(torch.__version__, int(torch.compiled_with_cxx11_abi()), torch.__path__[0])'
answer=$("$python" -c "$about" 2>/dev/null) ||
    fail "$python does not import torch: run scripts/setup.sh, or name one that does: PYTHON=/path/to/python $0"
read -r version abi torch <<<"$answer"

echo "compiling predict.cpp with $compiler against LibTorch $version in $torch"
# The package's CMake files ask for the whole CUDA toolkit. libtorch_cpu holds all that a model needs on the CPU.
"$compiler" -std=c++20 -O1 -Wall -Wextra -D_GLIBCXX_USE_CXX11_ABI="$abi" \
    -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    "$here/predict.cpp" -o "$program" \
    -L"$torch/lib" -ltorch_cpu -lc10 -Xlinker -rpath -Xlinker "$torch/lib"
echo "built $program"
