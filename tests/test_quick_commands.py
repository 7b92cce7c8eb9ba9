"""Help and a mistyped option are answered at once: what takes long to import is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.write_commands import MODULES

SLOW = ("torch", "pydantic", "PIL", "requests", "prometheus_client", "grpc")
"""To import: seconds for the first, and a tenth of one for each of the others."""
RUN = f"""
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print("exit", ended.code, *sys.modules.keys() & {set(SLOW)})
"""


def exit_and_slow(*command: str) -> tuple[str, set[str]]:
    """Exit code of a command, and what it has imported of `SLOW`."""
    ran = subprocess.run([sys.executable, "-c", RUN, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    _, code, *slow = ran.stdout.splitlines()[-1].split()
    return code, set(slow)


@pytest.mark.process
@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("benchmarks")])
def test_a_help_text_needs_nothing_slow(module: str) -> None:
    """Whatever the commands themselves import."""
    assert exit_and_slow(module, "--help") == ("0", set())


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [
        "train no-such-recipe",
        "train lenet5-digits --set training.epohcs=3",
        "train finetune --set training.epohcs=3",
        "train.quantise no-such-run",
        "train.evaluate no-such-run --data docs",
    ],
)
def test_what_is_mistyped_needs_no_torch(command: str) -> None:
    """It is refused before the work begins."""
    code, slow = exit_and_slow(*command.split())
    assert (code, "torch" in slow) == ("1", False)


@pytest.mark.process
@pytest.mark.slow
def test_what_is_slow_shows_where_it_is_imported() -> None:
    """The negative control: a benchmark, which imports torch and more for its help."""
    code, slow = exit_and_slow("benchmarks.handler", "--help")
    assert code == "0"
    assert {"torch", "pydantic", "PIL"} <= slow
