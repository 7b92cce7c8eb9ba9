"""Fork TorchServe's workers from a process that has imported PyTorch already.

    python forkserver.py serve SOCKET PID            until the process PID, Java, has ended
    python forkserver.py ask SOCKET [ARGUMENT ...]   the arguments that Java gives Python

Java starts a program for each worker, which asks the server. The server forks, and the new process becomes the worker:
it needs no second for its imports, and shares their memory. The program that asked waits, because Java kills it and
waits for its end: each of the two ends with the other. Without a server, it becomes the worker itself.

This script stands alone: workers get the project's modules from their archive.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

WORKER_NAME = "ts-worker"
"""What the system calls a worker that was forked, as in `top`."""
WORKER_SCRIPT = "model_service_worker.py"
_IMPORTS = ("ts.model_service_worker", "torch", "numpy", "PIL.Image", "pydantic")
"""What workers import that no archive brings. ONNX Runtime is missing: it starts a thread, which forks would lack."""
_LONGEST_REQUEST_BYTES = 1 << 18
_REQUEST_TIMEOUT_S = 10
_LEFT_TO_JAVA = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
"""Signals that the server ignores: Java may have requests to finish, and nobody waits for the workers."""


def ask(address: str, arguments: list[str]) -> None:
    """Have a worker forked, and return when it has ended. Without a server, become a Python with these arguments."""
    request = {"arguments": arguments, "directory": str(Path.cwd()), "environment": dict(os.environ)}
    if arguments and arguments[0].endswith(WORKER_SCRIPT):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.connect(address)
            socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
            server.recv(1)
            return
    os.execv(sys.executable, [sys.executable, *arguments])


def serve(address: str, java_pid: int) -> None:
    """Return to who started this, once askers can connect, and fork workers until Java ends."""
    import gc
    import importlib
    import resource
    import select

    try:
        java = os.pidfd_open(java_pid)
    except ProcessLookupError:
        return  # Java has said why it ended
    except (AttributeError, OSError) as error:
        sys.exit(f"workers are not forked and need more memory, since this system lacks pidfd_open: {error}")
    for number in _LEFT_TO_JAVA:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        if os.fork() != 0:
            return
        _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # as Java does for what it starts
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads, which forks would lack
        for name in _IMPORTS:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a collection in a worker would write to the pages of all objects
        while java not in select.select([listener.fileno(), java], [], [])[0]:
            asker = listener.accept()[0]
            descriptors: list[int] = []
            try:
                asker.settimeout(_REQUEST_TIMEOUT_S)
                said, descriptors, *_ = socket.recv_fds(asker, _LONGEST_REQUEST_BYTES, 3)
                is_worker = bool(said) and os.fork() == 0
            except OSError as error:
                print(f"a worker was not forked: {error}", file=sys.stderr)
                is_worker = False
            if is_worker:
                listener.close()
                os.close(java)
                _become(json.loads(said), descriptors, asker)
            asker.close()
            for descriptor in descriptors:
                os.close(descriptor)


def _become(request: dict[str, Any], descriptors: list[int], asker: socket.socket) -> NoReturn:
    """Run the worker's script as Java meant it, and raise its SystemExit."""
    import runpy
    import select

    for number in _LEFT_TO_JAVA:
        signal.signal(number, signal.SIG_DFL)
    # The kernel kills this process when the asker ends, also one that hangs.
    connection = asker.detach()
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([connection], [], [], 0)[0]:
        sys.exit("the program that asked for this worker has ended")
    Path("/proc/self/comm").write_text(WORKER_NAME, encoding="utf-8")
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    script = sys.argv[0]
    sys.path[:0] = [str(Path(script).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(script, run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    command, address, *rest = sys.argv[1:]
    if command == "serve":
        sys.path.pop(0)  # this folder, whose modules have common names
        serve(address, int(rest[0]))
    else:
        ask(address, rest)
