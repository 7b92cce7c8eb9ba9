"""Calls to one server's HTTP APIs: pooled connections, tokens renewed before they expire, refusals by meaning."""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, InvalidSchema, InvalidURL, MissingSchema, SSLError
from urllib3.exceptions import NewConnectionError

from client.errors import (
    ClientError,
    ModelApiOff,
    ModelNotFound,
    NotAuthorized,
    NothingListens,
    NotTorchServe,
    RequestRefused,
    ServerBusy,
    ServerUnreachable,
    WorkerDied,
)
from client.tokens import TokenKind, Tokens

Api = Literal["inference", "management"]

# Tokens are renewed this long before they expire, or a quarter of their life where that is shorter.
_RENEWAL_MARGIN_S, _RENEWAL_SHARE = 60.0, 0.25
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
        self._session = requests.Session()
        # A proxy of the environment would be asked for 127.0.0.1, and a .netrc would replace the token.
        self._session.trust_env = False
        if certificate_authority is not None:
            _check_certificates(certificate_authority)
            self._session.verify = str(certificate_authority)
        self._session.mount("http://", HTTPAdapter(pool_maxsize=connections, pool_block=True))
        self._session.mount("https://", HTTPAdapter(pool_maxsize=connections, pool_block=True))
        self._renewal = threading.Lock()
        self._margin_s: dict[Api, float] = {}

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
            if not _token_refused(response):
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
        margin_s = self._margin_s.get(api, _RENEWAL_MARGIN_S)
        if token.expires_at is None or token.expires_at - time.time() > margin_s:
            return token.value
        try:
            self._renew(api, token.value, timeout_s)
        except ClientError:
            # It is still valid: what is wrong will be said when it no longer is.
            self._margin_s[api] = -math.inf
        return self.tokens.token(api).value

    def _renew(self, api: Api, old: str, timeout_s: float | None = None) -> bool:
        """Have the server write a new token into its key file, unless another thread has done so.

        Returns:
            Whether there is another token than `old` now.
        """
        with self._renewal:
            if self.tokens.token(api).value != old:
                return True
            key = self._api_key(api)
            renewed = self._send("GET", f"{self.urls['management']}/token?type={api}", key, timeout_s=timeout_s)
            if _is_good(renewed):
                self.tokens.forget_given(api)
            token = self.tokens.token(api)
            left_s = (token.expires_at or 0) - time.time()
            # A clock that differs from the server's must not lead to a renewal for each call.
            is_new = token.value != old and left_s > 0
            self._margin_s[api] = min(_RENEWAL_MARGIN_S, _RENEWAL_SHARE * left_s) if is_new else -math.inf
            return token.value != old

    def _api_key(self, api: Api) -> str:
        try:
            return self.tokens.token("API").value
        except NotAuthorized as error:
            raise NotAuthorized(
                f"the {api} token in {self.tokens.place(api)} is refused and cannot be renewed: {error}"
            ) from None

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
            raise no_address(url) from None
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
        if _token_refused(response):
            return NotAuthorized(
                f"the server refuses the {api} token in {self.tokens.place(api)}, and the API key did not renew it: "
                "it belongs to another server; point --key-file at the file in this server's working directory"
            )
        if response.status_code == 401:  # an edge's; TorchServe itself says 400
            return NotAuthorized(f"401 {name}: {message} (what was sent is in {self.tokens.place(api)})")
        if name in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            return ModelNotFound(f"{message} (`python -m client models` lists what is served)")
        if response.status_code == 405 and api == "management":
            return ModelApiOff(
                "the server does not let models be registered or removed: set enable_model_api=true in the file it "
                "is started with, for example config/config.cpu.properties, and start it again"
            )
        # "Prediction failed" has this status as well, under another type.
        queue_full = response.status_code == 503 and name == "ServiceUnavailableException"
        if queue_full or response.status_code == 429:
            return ServerBusy(f"{response.status_code} {name}: {message}")
        # 507 where TorchServe already knows that the process was killed, 500 where it does not yet.
        kind = WorkerDied if message == "Worker died." else RequestRefused
        return kind(response.status_code, name, message)


def document(answer: requests.Response) -> Any:
    """The JSON of a good answer.

    Raises:
        NotTorchServe: it is none.
    """
    try:
        return answer.json()
    except requests.JSONDecodeError:
        raise NotTorchServe(f"{answer.url} answers, but not as TorchServe does: it sends no JSON") from None


def no_address(url: str) -> ClientError:
    """The error of a URL that nobody can be asked at."""
    return ClientError(
        f"{url} is no address of a server: --url and --management-url begin with http:// or https://, as "
        "http://127.0.0.1:8080 does"
    )


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


def _token_refused(response: requests.Response) -> bool:
    """TorchServe answers every token failure with 400 and this type."""
    return response.status_code == 400 and b"InvalidKeyException" in response.content
