"""Which signals end a command in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from system import signals


@pytest.fixture(autouse=True)
def given() -> Iterator[None]:
    """Afterwards every signal has its handler from before."""
    handlers = {number: signal.getsignal(number) for number in signals.INTERRUPTS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_ends_what_runs(number: int) -> None:
    """As Ctrl-C does, so that `with` and `finally` have their turn; or as a handler says."""
    signal.signal(number, signal.SIG_DFL)
    signals.catch()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    caught = []
    signals.catch(lambda number, _: caught.append(number))
    signal.raise_signal(number)
    assert caught == [number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_ignored_stays_so(number: int) -> None:
    """As nohup has SIGHUP: a command that is to outlive its terminal does."""
    signal.signal(number, signal.SIG_IGN)
    signals.catch()
    signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_IGN
