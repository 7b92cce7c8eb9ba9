#!/bin/sh
# What Java starts for each worker in place of Python: it asks for one that is forked. `launch.py` sets both variables.
exec "$WORKER_PYTHON" -I -S "${0%/*}/forkserver.py" ask "$TEMP/fork.sock" "$@"
