"""What can go wrong between this client and a server.

ClientError
├── ServerUnreachable  nothing answers at the address
├── NotAuthorized      no token, or one that the server refuses and that could not be renewed
├── ModelNotFound      the server has no model of that name or version
├── RequestRefused     the server understood and refused: carries its status, type and message
└── NotReady           the model did not come up in time
"""

from __future__ import annotations


class ClientError(Exception):
    """The base: `python -m client` prints its message in one line and exits 1."""


class ServerUnreachable(ClientError):
    pass


class NotAuthorized(ClientError):
    pass


class ModelNotFound(ClientError):
    pass


class RequestRefused(ClientError):
    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"{status} {kind}: {message}")
        self.status = status
        self.kind = kind


class NotReady(ClientError):
    pass
