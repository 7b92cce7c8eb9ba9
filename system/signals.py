"""The signals that ask a command to end: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends that is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch(handler: Callable[[int, FrameType | None], object] = signal.default_int_handler) -> None:
    """Have `handler` called for each; by default it raises KeyboardInterrupt, so that what a command began is cleared.

    One that is ignored stays so, as nohup has SIGHUP.
    """
    for number in INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
