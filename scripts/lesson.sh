#!/usr/bin/env bash
# Open the lesson, a notebook, in JupyterLab: prints the address to open and the device that the lesson uses.
# Usage: scripts/lesson.sh [--port N] [--ip ADDRESS] [NOTEBOOK]
#        default: notebooks/first_pytorch_classifier.ipynb; Ctrl-C ends it. --ip 0.0.0.0 is for a container, whose ports
#        deploy/docker/compose.lesson.yaml publishes to this machine alone
# The first call installs JupyterLab into .venv, which it makes where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: scripts/lesson.sh [--port N] [--ip ADDRESS] [NOTEBOOK]"
port=8888
ip=127.0.0.1
notebook=notebooks/first_pytorch_classifier.ipynb
while (($# > 0)); do
    if [[ $1 == --port && ${2:-} =~ ^[0-9]+$ ]]; then
        port=$2
        shift 2
    elif [[ $1 == --ip && ${2:-} =~ ^[0-9.]+$ ]]; then
        ip=$2
        shift 2
    elif [[ $1 == --help ]]; then
        echo "$usage"
        exit
    elif [[ $1 == *.ipynb && -f $1 ]]; then
        notebook=$1
        shift
    else
        echo "$usage" >&2
        exit 2
    fi
done
scripts/setup.sh
python=.venv/bin/python
if ! $python -c "import socket; socket.create_server(('127.0.0.1', $port))" 2>/dev/null; then
    echo "error: port $port is taken: choose another, $0 --port N" >&2
    exit 1
fi
for package in jupyterlab matplotlib; do
    if ! $python -c "import $package" 2>/dev/null; then
        echo "installing $package into .venv"
        $python -m pip install --quiet --disable-pip-version-check "$package"
    fi
done

device=$($python -c 'import torch
device = torch.accelerator.current_accelerator(check_available=True)
print(torch.cuda.get_device_name() if device and device.type == "cuda" else device or "CPU")')
JUPYTER_TOKEN=$($python -c 'import secrets; print(secrets.token_hex(16))')
export JUPYTER_TOKEN
mkdir -p logs
# Root is common in containers; nobody gets in without the token.
$python -m jupyterlab --no-browser --allow-root --ip "$ip" --port "$port" --notebook-dir . >logs/lesson.log 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
until $python -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null; then
        echo "error: JupyterLab ended: logs/lesson.log says why" >&2
        exit 1
    fi
done
cat <<END
device   $device
lesson   http://127.0.0.1:$port/lab/tree/$notebook?token=$JUPYTER_TOKEN
Open the address in a browser. Ctrl-C ends JupyterLab.
END
wait "$server"
