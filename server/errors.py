"""Why a server was not started or stopped.

ServerError
├── AlreadyRunning  this run directory has a server
├── PortTaken       another process listens on a port that is needed
├── ConfigError     the configuration file or a folder is missing or wrong
└── StartFailed     TorchServe ended, a model did not become ready, or it died too often
"""

from __future__ import annotations

from system.errors import KnownError


class ServerError(KnownError):
    """The base: `python -m server` prints its message in one line and exits 1."""


class AlreadyRunning(ServerError):
    pass


class PortTaken(ServerError):
    pass


class ConfigError(ServerError):
    pass


class StartFailed(ServerError):
    pass
