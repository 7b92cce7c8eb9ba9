"""Calls to one server's HTTP APIs: pooled connections, tokens renewed before they expire, refusals by meaning."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, InvalidSchema, InvalidURL, MissingSchema, SSLError
from urllib3.exceptions import NewConnectionError

from client import PROGRAM
from client.errors import (
    ClientError,
    ModelApiOff,
    ModelNotFound,
    NoAddress,
    NotAuthorized,
    NothingListens,
    NotTorchServe,
    RequestRefused,
    ServerBusy,
    ServerUnreachable,
    WorkerDied,
)
from client.tokens import Api, TokenKind, Tokens, is_refused

# Another client of the same server may renew a token between our reading and sending it.
_TOKENS_TRIED = 4


class Connection:
    """The inference and management API of one server; may be used by many threads at once.

    Args:
        urls: address of each API, without a slash at the end.
        timeout_s: longest wait for one answer.
        connections: most that are open at a time to either API; further calls wait for one of them.
        certificate_authority: file of the certificates to trust, in PEM; None is those of the public authorities.

    Raises:
        ClientError: that file holds none.
    """

    def __init__(
        self,
        urls: Mapping[Api, str],
        tokens: Tokens,
        timeout_s: float,
        connections: int,
        certificate_authority: Path | None = None,
    ) -> None:
        self.urls = urls
        self.tokens = tokens
        self.timeout_s = timeout_s
        self.has_answered = False
        if certificate_authority is not None:
            _check_certificates(certificate_authority)
        self._session = direct_session(certificate_authority)
        self._session.mount("http://", HTTPAdapter(pool_maxsize=connections, pool_block=True))
        self._session.mount("https://", HTTPAdapter(pool_maxsize=connections, pool_block=True))

    def call(
        self,
        api: Api,
        method: str,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> requests.Response:
        """One call with the token of its API, which is renewed where it is about to expire or refused.

        Args:
            timeout_s: longest wait for one answer, instead of the connection's own.

        Raises:
            ClientError: every answer but a good one, by its meaning.
        """
        for _ in range(_TOKENS_TRIED):
            token = self._fresh_token(api, timeout_s)
            response = self._send(method, self.urls[api] + path, token, data, headers, timeout_s)
            if not is_refused(response.status_code, response.content):
                break
            if not self._renew(api, token, timeout_s):
                break
        if _is_good(response):
            return response
        raise self._refusal(response, api)

    def token(self, api: Api, refused: str | None = None) -> str:
        """The token of an API as `call` would send it, after a try to replace `refused`."""
        if refused is not None:
            self._renew(api, refused)
        return self._fresh_token(api)

    def _fresh_token(self, api: Api, timeout_s: float | None = None) -> str:
        """The token, renewed first where it will soon expire; other threads wait for that."""
        token = self.tokens.token(api)
        if self.tokens.is_due(api, token):
            with suppress(ClientError):  # it is still valid: what is wrong will be said when it no longer is
                self._renew(api, token.value, timeout_s)
        return self.tokens.token(api).value

    def _renew(self, api: Api, old: str, timeout_s: float | None = None) -> bool:
        """As `Tokens.renew`, by this server's management API."""
        return self.tokens.renew(
            api,
            old,
            lambda path, key: _is_good(self._send("GET", self.urls["management"] + path, key, timeout_s=timeout_s)),
        )

    def _send(
        self,
        method: str,
        url: str,
        token: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> requests.Response:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            response = self._session.request(
                method,
                url,
                data=data,
                headers={"Authorization": f"Bearer {token}", **(headers or {})},
                timeout=timeout_s,
                allow_redirects=False,
            )
        except SSLError as error:
            raise no_tls(url, error) from None
        except requests.Timeout:
            raise ServerUnreachable(f"no answer from {url} within {timeout_s:g} s") from None
        except (requests.ConnectionError, ChunkedEncodingError) as error:
            raise _unreachable(url, error) from None
        except (InvalidSchema, InvalidURL, MissingSchema):
            raise NoAddress(url) from None
        except requests.RequestException as error:
            # Its text may hold the token.
            raise ClientError(f"cannot ask {url}: {type(error).__name__}") from None
        self.has_answered = True
        return response

    def _refusal(self, response: requests.Response, api: TokenKind) -> ClientError:
        if 300 <= response.status_code < 400:
            to = response.headers.get("Location", "nowhere")
            return NotTorchServe(
                f"{response.url} answers {response.status_code} and sends on to {to}: name the server's own address"
            )
        try:
            body = response.json()
            name, message = str(body["type"]), str(body.get("message", "no reason given"))
        except (ValueError, KeyError, TypeError, AttributeError):
            name, message = response.reason or "no reason", response.text.strip()[:200] or "(empty answer)"
        if is_refused(response.status_code, response.content):
            return NotAuthorized(
                f"the server refuses the {api} token in {self.tokens.place(api)}, and the API key did not renew it: "
                "it belongs to another server; point --key-file at the file in this server's working directory"
            )
        if response.status_code == 401:  # an edge's; TorchServe itself says 400
            return NotAuthorized(f"401 {name}: {message} (what was sent is in {self.tokens.place(api)})")
        if name in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            return ModelNotFound(f"{message} (`{PROGRAM} models` lists what is served)")
        if response.status_code == 405 and api == "management":
            return ModelApiOff(
                "the server does not let models be registered or removed: start it again with "
                "scripts/serve.sh --model-api, or with enable_model_api=true in the file it is started with, for "
                "example config/config.cpu.properties"
            )
        # "Prediction failed" has this status as well, under another type.
        queue_full = response.status_code == 503 and name == "ServiceUnavailableException"
        if queue_full or response.status_code == 429:
            return ServerBusy(f"{response.status_code} {name}: {message}")
        # 507 where TorchServe already knows that the process was killed, 500 where it does not yet.
        kind = WorkerDied if message == "Worker died." else RequestRefused
        return kind(response.status_code, name, message)


def direct_session(certificate_authority: Path | None = None) -> requests.Session:
    """A session that ignores the environment: a proxy there would be asked for 127.0.0.1, and a .netrc would replace
    the token.

    Args:
        certificate_authority: file of the certificates to trust, in PEM; None is those of the public authorities.
    """
    session = requests.Session()
    session.trust_env = False
    session.verify = str(certificate_authority) if certificate_authority else True
    return session


def no_tls(url: str, error: SSLError) -> ServerUnreachable:
    """The error of a server whose certificate is not trusted, or that speaks no TLS."""
    reason = getattr(error.args[0], "reason", error) if error.args else error
    return ServerUnreachable(
        f"no TLS with {_origin(url)} ({reason}): --ca or TORCHSERVE_CA names the file of certificates to trust"
    )


def _unreachable(url: str, error: requests.RequestException) -> ServerUnreachable:
    origin = _origin(url)
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(reason, NewConnectionError):
        return NothingListens(
            f"no server answers at {origin}: start one with scripts/serve.sh, or name its address with --url"
        )
    return ServerUnreachable(f"the server at {origin} closed the connection before it answered; see logs/ts_log.log")


def _origin(url: str) -> str:
    return "{0.scheme}://{0.netloc}".format(urlsplit(url))


def _check_certificates(file: Path) -> None:
    """Raises:
    ClientError: it cannot be read, or holds none.
    """
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:
        raise ClientError(f"{file} is no file of certificates in PEM: {error.strerror or error}") from None


def _is_good(response: requests.Response) -> bool:
    """By `requests` a redirect, which nobody follows, would be as well."""
    return 200 <= response.status_code < 300
