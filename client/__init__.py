"""A running TorchServe from the outside: predictions, models and workers, tokens, readiness.

from client.torchserve import TorchServe

TorchServe().predict("lenet5-digits", Path("digit.png").read_bytes())
"""

import sys
from pathlib import Path

INSTALLED_COMMAND = "torchserve-client"
PROGRAM = INSTALLED_COMMAND if Path(sys.argv[0]).stem == INSTALLED_COMMAND else "python -m client"
"""What a user types before a command of the client, for messages and examples."""
