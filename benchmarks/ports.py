"""Ports for a server that is started to be tested or measured."""

from __future__ import annotations

import itertools
import random
import socket
from contextlib import suppress

PORTS = 5
"""How many from its first one a server may take."""
_FIRST, _END = 15_000, 32_000
"""Below the ports that outgoing connections are given."""
_blocks = itertools.count(random.randrange((_END - _FIRST) // PORTS))


def free_ports() -> int:
    """The first of `PORTS` in a row that nobody listens on; this process gets each of them once.

    Servers take seconds to listen, so that a port drawn twice meanwhile would look free to both.
    """
    while True:
        first = _FIRST + next(_blocks) * PORTS % (_END - _FIRST)
        with suppress(OSError):
            for port in range(first, first + PORTS):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
