"""Ports for a server that is started to be tested or measured."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = 5
"""How many from its first one a server may take."""


def free_ports() -> int:
    """The first of `PORTS` in a row that nobody listens on, below those that outgoing connections are given."""
    while True:
        first = random.randrange(15_000, 32_000)
        with suppress(OSError):
            for port in range(first, first + PORTS):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
