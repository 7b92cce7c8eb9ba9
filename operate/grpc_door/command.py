"""The command `grpc`: answer standard gRPC clients before a server that speaks HTTP."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.command_line import server_of
from operate.errors import DoorUnusable
from server.keys import KEYS
from system import signals
from system.addresses import is_loopback
from system.command_line import reports_errors

if TYPE_CHECKING:
    from grpc import ServerCredentials

MAX_BYTES = int(KEYS["max_request_size"].default or 0)
"""Also in config/config.*.properties, and the edge's limit."""


@reports_errors
def grpc(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0: a free one.")] = 8001,
    certificate: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate in PEM; default: no TLS.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="Its key in PEM, without a password.")
    ] = None,
    most_calls: Annotated[
        int, typer.Option("--calls", min=1, max=1000, help="Most calls at a time; others get RESOURCE_EXHAUSTED.")
    ] = 64,
    max_bytes: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Most bytes of one message.")] = MAX_BYTES,
) -> None:
    """Answer tritonclient and KServe's gRPC clients (Open Inference Protocol) by asking the server at --url over HTTP.

    Callers send their own token. SIGTERM and Ctrl-C stop it after the last answer; a second one, at once.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core would print lines beside the error
    from operate.grpc_door.door import Door, serving  # imports grpc and requests, which take time that --help saves
    from operate.grpc_door.upstream import Upstream

    server = server_of(context)
    door = Door(Upstream(server, most_calls))
    tls = credentials(certificate, key)
    if tls is None and not is_loopback(host):
        print("tokens and images travel unencrypted: --tls-cert and --tls-key turn TLS on", file=sys.stderr)
    stop = threading.Event()

    def end(*_: object) -> None:
        signals.catch(lambda *_: os._exit(1))  # threads that wait for an answer would keep an ordinary exit
        stop.set()

    signals.catch(end)
    with serving(door, host, port, tls, most_calls, max_bytes) as address:
        print(f"{address} asks {server.url}", flush=True)
        stop.wait()


def credentials(certificate: Path | None, key: Path | None) -> ServerCredentials | None:
    """What TLS needs; None where neither file is given.

    Raises:
        DoorUnusable: one is missing, or they do not belong together.
    """
    import ssl

    from grpc import ssl_server_credentials

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise DoorUnusable("TLS needs both --tls-cert and --tls-key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        return ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    except OSError as error:
        reason = error.strerror or error
        raise DoorUnusable(f"{certificate} and {key} are no certificate and its key in PEM: {reason}") from None
