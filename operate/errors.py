"""What can go wrong around a server, besides what the client meets.

OperateError
├── NotAsMeasured   a golden image got another answer than training measured, or there are none to compare with
├── LoadRefused     a load without bounds, or on a host that is not this one
├── NotTunable      the model's archive or run folder cannot be varied
├── BoundNotMet     no layout answers within the time that was asked for
├── RolloutRefused  a new version cannot be rolled out, or was left half way
├── EdgeUnusable    an edge cannot give a share: no file of its own, or no nginx that runs
├── DoorUnusable    a gRPC door cannot listen there, or has no certificate with its key
└── NoLogs          a folder is neither a server's run directory nor an edge's
"""

from __future__ import annotations

from client.errors import ClientError


class OperateError(ClientError):
    """The base: `python -m operate` prints its message in one line and exits 1."""


class NotAsMeasured(OperateError):
    pass


class LoadRefused(OperateError):
    pass


class NotTunable(OperateError):
    pass


class BoundNotMet(OperateError):
    pass


class RolloutRefused(OperateError):
    pass


class EdgeUnusable(OperateError):
    pass


class DoorUnusable(OperateError):
    pass


class NoLogs(OperateError):
    pass
