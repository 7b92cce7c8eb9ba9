"""One running TorchServe: its inference and management APIs, with tokens renewed as they expire."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests

from client.errors import ClientError, ModelNotFound, NotAuthorized, NotReady, RequestRefused, ServerUnreachable
from client.tokens import KeyFile

INFERENCE_URL = "http://127.0.0.1:8080"
KEY_FILE = Path("key_file.json")
_POLL_INTERVAL_S = 0.1

Prediction = dict[str, float]


class TorchServe:
    """A client of one server.

    Args:
        url: the inference address.
        management_url: the management address; by default the next port of the same host, TorchServe's own habit.
        key_file: TorchServe's `key_file.json`, read at every call so that renewed tokens are seen.
        timeout_s: longest wait for one answer.
    """

    def __init__(
        self,
        url: str = INFERENCE_URL,
        management_url: str | None = None,
        key_file: Path = KEY_FILE,
        timeout_s: float = 60.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.management_url = (management_url or _next_port(self.url)).rstrip("/")
        self.keys = KeyFile(key_file)
        self.timeout_s = timeout_s
        self._session = requests.Session()
        # A proxy of the environment would be asked for 127.0.0.1, and a .netrc would replace the token.
        self._session.trust_env = False

    def predict(self, model: str, image: bytes, version: str | None = None) -> Prediction:
        """Classify one encoded image: the most probable classes in falling order.

        Raises:
            RequestRefused: the server does not take this image; `status` and the message say why.
        """
        path = f"/predictions/{model}" + (f"/{version}" if version else "")
        headers = {"Content-Type": "application/octet-stream"}
        answer: Prediction = self._call("inference", "POST", path, data=image, headers=headers).json()
        return answer

    def models(self) -> list[str]:
        """The names of the registered models."""
        return [model["modelName"] for model in self._call("management", "GET", "/models?limit=1000").json()["models"]]

    def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """TorchServe's description of one version (by default the default one): settings, workers and their states."""
        path = f"/models/{model}" + (f"/{version}" if version else "")
        descriptions: list[dict[str, Any]] = self._call("management", "GET", path).json()
        return descriptions[0]

    def ready_workers(self, model: str) -> int:
        """How many workers have loaded the model and take requests."""
        return sum(worker["status"] == "READY" for worker in self.describe(model)["workers"])

    def scale(self, model: str, workers: int, timeout_s: float = 120.0) -> None:
        """Set the number of workers and wait until so many are ready.

        Raises:
            NotReady: they were not within `timeout_s`.
        """
        self._call("management", "PUT", f"/models/{model}?min_worker={workers}&max_worker={workers}")
        deadline = time.monotonic() + timeout_s
        while (ready := self.ready_workers(model)) != workers:
            _wait(
                deadline, f"{model}: {ready} of {workers} workers ready after {timeout_s:g} s; see logs/model_log.log"
            )

    def wait_until_ready(self, model: str, timeout_s: float = 120.0) -> int:
        """Wait until the server answers and the model has as many ready workers as it declares; returns how many.

        Raises:
            NotReady: naming what was awaited.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                declared = max(1, self.describe(model)["minWorkers"])
                ready = self.ready_workers(model)
                if ready >= declared:
                    return ready
                awaited = f"{ready} of {declared} workers ready; see logs/model_log.log"
            except (ServerUnreachable, NotAuthorized, ModelNotFound) as error:
                awaited = str(error)
            _wait(deadline, f"{model} is not ready after {timeout_s:g} s: {awaited}")

    def _call(
        self,
        kind: Literal["inference", "management"],
        method: str,
        path: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """One call with the token of its kind, renewed once if the server refuses it."""
        base = self.url if kind == "inference" else self.management_url
        token = self.keys.token(kind)
        response = self._send(method, base + path, token, data, headers)
        if _token_refused(response):
            self._renew(kind)
            response = self._send(method, base + path, self.keys.token(kind), data, headers)
        if response.ok:
            return response
        raise self._refusal(response, kind)

    def _renew(self, kind: Literal["inference", "management"]) -> None:
        """Have the server write a new token into its key file; no effect where the API key is refused as well."""
        self._send("GET", f"{self.management_url}/token?type={kind}", self.keys.token("API"))

    def _send(
        self, method: str, url: str, token: str, data: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> requests.Response:
        try:
            return self._session.request(
                method,
                url,
                data=data,
                headers={"Authorization": f"Bearer {token}", **(headers or {})},
                timeout=self.timeout_s,
                allow_redirects=False,
            )
        except requests.ConnectionError:
            origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
            raise ServerUnreachable(
                f"no server answers at {origin}: start one with scripts/serve.sh, or name its address with --url"
            ) from None
        except requests.Timeout:
            raise ServerUnreachable(f"no answer from {url} within {self.timeout_s:g} s") from None

    def _refusal(self, response: requests.Response, kind: str) -> ClientError:
        try:
            body = response.json()
            name, message = str(body["type"]), str(body["message"])
        except (ValueError, KeyError, TypeError):
            name, message = response.reason or "no reason", response.text.strip()[:200] or "(empty answer)"
        if _token_refused(response):
            return NotAuthorized(
                f"the server refuses the {kind} token in {self.keys.path.absolute()}, and its API key did not renew "
                "it: the file belongs to another server; point --key-file at the one in this server's working directory"
            )
        if name in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            return ModelNotFound(f"{message} (`python -m client models` lists what is served)")
        return RequestRefused(response.status_code, name, message)


def _token_refused(response: requests.Response) -> bool:
    """TorchServe answers every token failure with 400 and this type."""
    return response.status_code == 400 and b"InvalidKeyException" in response.content


def _next_port(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{(parts.port or 80) + 1}"


def _wait(deadline: float, message: str) -> None:
    """Pause between two looks at a condition.

    Raises:
        NotReady: with `message`, once `deadline` has passed.
    """
    if time.monotonic() >= deadline:
        raise NotReady(message)
    time.sleep(_POLL_INTERVAL_S)
