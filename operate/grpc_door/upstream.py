"""The HTTP server behind a door, asked on behalf of one caller at a time; its refusals as gRPC has them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import grpc
import requests
from grpc import StatusCode
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidHeader

from client.connection import direct_session
from client.errors import NoAddress
from client.torchserve import TorchServe
from operate.errors import DoorUnusable
from operate.grpc_door.messages import InvalidMessage

LONGEST_WAIT_S = 30.0
"""For an answer, however long the caller waits; an edge gives up after as long (deploy/nginx/nginx.conf)."""
CONNECT_TIMEOUT_S = 2.0
PASSED = ("authorization", "traceparent", "x-request-id", "x-top-k")
"""Metadata of a call that become headers."""
CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    405: StatusCode.UNIMPLEMENTED,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.INVALID_ARGUMENT,
    415: StatusCode.INVALID_ARGUMENT,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    501: StatusCode.UNIMPLEMENTED,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
"""By HTTP status; any other is INTERNAL."""
_MOST_CHARACTERS = 500


class Refused(Exception):
    """Why a call gets no answer: its status, and a message for its caller."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Upstream:
    """One HTTP server; many threads may share it.

    Args:
        server: its address and its certificates count, its tokens do not.
        connections: most that stay open.

    Raises:
        NoAddress: its URL is none.
        DoorUnusable: its URL holds credentials.
    """

    def __init__(self, server: TorchServe, connections: int) -> None:
        address = urlsplit(server.url)
        if "@" in address.netloc:
            raise DoorUnusable("--url has a user or password, which every caller would share: name the address alone")
        if address.scheme not in ("http", "https"):
            raise NoAddress(server.url)
        self._url = server.url
        self._session = direct_session(server.certificate_authority)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # they would be other callers'
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def ask(
        self,
        context: grpc.ServicerContext,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> requests.Response:
        """The answer, whatever its status.

        Args:
            context: of the call, whose deadline and metadata are passed on.

        Raises:
            Refused: there is none.
        """
        wait_s = max(0.001, min(context.time_remaining(), LONGEST_WAIT_S))
        until = time.monotonic() + wait_s
        given = {name: value for name, value in context.invocation_metadata() if name in PASSED}
        # A worker refuses what it could only answer later. An edge replaces this X-Request-Start by its own.
        waits = {"X-Envoy-Expected-Rq-Timeout-Ms": f"{1000 * wait_s:.0f}", "X-Request-Start": f"t={time.time():.3f}"}
        headers = {**given, **waits, **(headers or {})}
        try:
            return self._session.request(
                method,
                self._url + path,
                # As a file it is sent in pieces: the timeout to connect also limits each send.
                data=BytesIO(body) if body else None,
                headers=headers,
                timeout=(min(CONNECT_TIMEOUT_S, wait_s), wait_s),
                allow_redirects=False,
            )
        except (InvalidHeader, UnicodeError):
            raise Refused(StatusCode.INVALID_ARGUMENT, "the metadata of the call cannot be HTTP headers") from None
        except requests.RequestException as error:
            if time.monotonic() >= until:
                raise Refused(StatusCode.DEADLINE_EXCEEDED, f"no answer within {wait_s:.3g} s") from None
            message = f"the server behind the door does not answer ({type(error).__name__})"
            raise Refused(StatusCode.UNAVAILABLE, message) from None

    def document(self, context: grpc.ServicerContext, *arguments: Any) -> Any:
        """The JSON of a good answer; takes what `ask` takes.

        Raises:
            Refused: it is none.
        """
        response = self.ask(context, *arguments)
        if response.status_code != 200:
            raise refusal(response)
        return document(response)


def document(response: requests.Response) -> Any:
    """Raises:
    Refused: it is no JSON.
    """
    with reading():
        return response.json()


@contextmanager
def reading() -> Iterator[None]:
    """For what is made of a server's answer.

    Raises:
        Refused: the answer is of another form.
    """
    try:
        yield
    except InvalidMessage:
        raise
    except Exception:  # another server's answer can fail in any way
        raise Refused(StatusCode.INTERNAL, "the server's answer does not follow this protocol") from None


def refusal(response: requests.Response) -> Refused:
    """Of an answer that is none: an error in TorchServe's form, `{"code", "type", "message"}`, or in another."""
    try:
        said = response.json()
        kind, message = str(said["type"]), str(said["message"])
    except (ValueError, LookupError, TypeError):
        kind, message = response.reason or "", "the server gives no reason"
    code = CODES.get(response.status_code, StatusCode.INTERNAL)
    if (response.status_code, kind) == (400, "InvalidKeyException"):  # TorchServe's, of every token it does not take
        code = StatusCode.UNAUTHENTICATED
    elif kind == "ResourceNotFoundException":  # the server has no such path
        code = StatusCode.UNIMPLEMENTED
    return Refused(code, f"{response.status_code} {kind}: {message}"[:_MOST_CHARACTERS])
