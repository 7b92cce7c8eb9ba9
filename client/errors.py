"""What can go wrong between this client and a server.

ClientError
├── NoAddress           nobody can be asked at the URL
├── ServerUnreachable   nothing answers at the address, or not in time
│   └── NothingListens  the connection was refused, so nobody has seen the request
├── NotTorchServe       what answers at the address is something else
├── NotAuthorized       no token or edge's key, or one that is refused and could not be renewed
├── ModelNotFound       the server has no model of that name or version
├── ModelApiOff         the server's configuration does not let models be registered or removed
├── NoWorkers           the model is registered and has no worker
├── ServerBusy          the model's queue is full, or an edge's limit is reached
├── RequestRefused      the server understood and refused: carries its status, type and message
│   └── WorkerDied      the worker that had the request was killed
├── NotReady            the model did not come up in time
├── TooManyWorkers      more workers were asked for than the ceiling allows
├── PageUnusable        the page cannot be served, or was asked for a file that is not its own
├── NoImages            a folder or pattern holds no image
├── NotCaptured         a folder holds nothing to label, or no folder could have a class's name
└── OutputUnusable      the file for the results holds something else
"""

from __future__ import annotations

from system.errors import KnownError


class ClientError(KnownError):
    """The base: a command prints its message in one line and exits 1."""


class NoAddress(ClientError):
    def __init__(self, url: str) -> None:
        super().__init__(
            f"{url} is no address of a server: --url and --management-url begin with http:// or https://, as "
            "http://127.0.0.1:8080 does"
        )


class ServerUnreachable(ClientError):
    pass


class NothingListens(ServerUnreachable):
    pass


class NotTorchServe(ClientError):
    pass


class NotAuthorized(ClientError):
    pass


class ModelNotFound(ClientError):
    pass


class ModelApiOff(ClientError):
    pass


class NoWorkers(ClientError):
    pass


class ServerBusy(ClientError):
    pass


class RequestRefused(ClientError):
    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"{status} {kind}: {message}")
        self.status = status
        self.kind = kind


class WorkerDied(RequestRefused):
    pass


class NotReady(ClientError):
    pass


class TooManyWorkers(ClientError):
    pass


class PageUnusable(ClientError):
    pass


class NoImages(ClientError):
    pass


class NotCaptured(ClientError):
    pass


class OutputUnusable(ClientError):
    pass
