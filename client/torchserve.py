"""One running TorchServe: what it predicts, which models it has, and how many workers they have."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from client import PROGRAM, retries
from client.errors import (
    ClientError,
    ModelNotFound,
    NoAddress,
    NotAuthorized,
    NothingListens,
    NotReady,
    NotTorchServe,
    NoWorkers,
    RequestRefused,
    ServerBusy,
    ServerUnreachable,
)
from client.tokens import Api, Tokens

if TYPE_CHECKING:
    import requests

INFERENCE_URL = "http://127.0.0.1:8080"
KEY_FILE = Path("key_file.json")
_POLL_INTERVAL_S = 0.1
# Of a model on a GPU TorchServe calls nvidia-smi for each worker that it describes.
_LOADING_INTERVAL_S = 0.5
_APPEARS_WITHIN_S = 2.0
# However little is left, a server that is on time answers a call that is made.
_LEAST_WAIT_S = 2.0

_JSON = {"Accept": "application/json"}

Prediction = dict[str, float]
_MARKS = {"true": True, "false": False}


@dataclass(frozen=True)
class Classified:
    """What a server makes of one image."""

    prediction: Prediction
    accepted: bool | None
    """Whether the answer reaches the thresholds of the recipe's `serving.accept`; None where it has none."""


@dataclass(frozen=True)
class Workers:
    """How many a model has that have loaded it, and how many it should have."""

    ready: int
    declared: int

    @classmethod
    def of(cls, description: dict[str, Any]) -> Workers:
        """By what TorchServe says of a model; one must be there at least, without any it answers nothing."""
        ready = sum(worker["status"] == "READY" for worker in description["workers"])
        return cls(ready, max(1, description["minWorkers"]))

    def check(self, at_least: int | None = None) -> None:
        """Raises:
        NotReady: fewer than these are ready; by default than are declared.
        """
        if self.ready < (self.declared if at_least is None else at_least):
            raise NotReady(f"{self.ready} of {self.declared} workers ready")


class TorchServe:
    """A client of one server; many threads may share it.

    Args:
        url: the inference address.
        management_url: the management address; by default the next port of the same host, TorchServe's own habit.
        key_file: TorchServe's `key_file.json`; tokens in the environment (`client.tokens.VARIABLES`) go before it.
        timeout_s: longest wait for one answer.
        retry_s: how long a prediction or explanation is asked for again where that is safe (`client.retries`).
        connections: most that are open at a time.
        certificate_authority: file of the certificates to trust, in PEM; by default those of the public authorities.
    """

    def __init__(
        self,
        url: str = INFERENCE_URL,
        management_url: str | None = None,
        key_file: str | Path = KEY_FILE,
        timeout_s: float = 60.0,
        retry_s: float = 30.0,
        connections: int = 32,
        certificate_authority: str | Path | None = None,
    ) -> None:
        from client.connection import Connection  # imports requests, which takes time that --help saves

        self.url = url.rstrip("/")
        self.management_url = (management_url or next_port(self.url)).rstrip("/")
        self.key_file = Path(key_file)
        self.tokens = Tokens(self.key_file)
        self.retry_s = retry_s
        self.certificate_authority = Path(certificate_authority) if certificate_authority else None
        urls: dict[Api, str] = {"inference": self.url, "management": self.management_url}
        self._connection = Connection(urls, self.tokens, timeout_s, connections, self.certificate_authority)
        self._have_answered: set[str] = set()

    def predict(
        self,
        model: str,
        image: bytes,
        version: str | None = None,
        within_s: float = math.inf,
        top_k: int | None = None,
    ) -> Prediction:
        """The prediction of `classify`."""
        return self.classify(model, image, version, within_s, top_k).prediction

    def classify(
        self,
        model: str,
        image: bytes,
        version: str | None = None,
        within_s: float = math.inf,
        top_k: int | None = None,
    ) -> Classified:
        """Classify one encoded image: the most probable classes in falling order, and whether they are to be believed.

        Args:
            within_s: longest wait in all where it is shorter than `timeout_s` and `retry_s`; a call gets two seconds.
            top_k: how many classes to answer with; by default as many as the archive says.

        Raises:
            RequestRefused: the server does not take this image; `status` and the message say why.
            NoWorkers, ServerBusy: it takes none at present.
        """
        headers = {**_JSON, **({} if top_k is None else {"X-Top-K": str(top_k)})}
        answer = self._ask("predictions", model, version, image, headers, within_s)
        return Classified(document(answer), _MARKS.get(answer.headers.get("x-accepted", "")))

    def answer(self, model: str, body: bytes, headers: Mapping[str, str], version: str | None = None) -> Any:
        """The JSON that answers a request for a prediction in any of its forms; raises as `classify` does.

        Args:
            headers: `Content-Type` among them, unless the body is one encoded image.
        """
        return document(self._ask("predictions", model, version, body, {**_JSON, **headers}))

    def explain(self, model: str, image: bytes, version: str | None = None) -> dict[str, Any]:
        """Which regions of one encoded image support its class, as a grid of numbers; raises as `predict` does."""
        explanation: dict[str, Any] = document(self._ask("explanations", model, version, image, _JSON))
        return explanation

    def explain_as_png(self, model: str, image: bytes, version: str | None = None) -> bytes:
        """The same as a picture: red where the image supports the class, blue where it contradicts it."""
        return self._ask("explanations", model, version, image, {"Accept": "image/png"}).content

    def models(self) -> list[str]:
        """The names of the registered models."""
        names: list[str] = []
        page: str | None = "0"
        while page is not None:
            answer = document(self._manage("GET", f"/models?limit=100&next_page_token={page}"))
            names += [model["modelName"] for model in answer["models"]]
            page = answer.get("nextPageToken")
        return names

    def describe(self, model: str, version: str | None = None, within_s: float = math.inf) -> dict[str, Any]:
        """TorchServe's description of one version (by default the default one): settings, workers and their states.

        Args:
            within_s: as `predict` takes it.
        """
        answer = self._manage("GET", _model_path(model, version), self._wait_s(within_s))
        descriptions: list[dict[str, Any]] = document(answer)
        return descriptions[0]

    def describe_worker(self, model: str) -> dict[str, Any]:
        """What a worker of the model says of itself; nothing where its handler says nothing."""
        try:
            description = document(self._manage("GET", f"{_model_path(model)}?customized=true"))[0]
        except RequestRefused:  # a handler that cannot say
            return {}
        said = description.get("customizedMetadata")
        return said if isinstance(said, dict) else {}

    def describe_versions(self, model: str) -> list[dict[str, Any]]:
        """TorchServe's description of every registered version of a model."""
        descriptions: list[dict[str, Any]] = document(self._manage("GET", _model_path(model, "all")))
        return descriptions

    def versions(self, model: str) -> list[str]:
        """The registered versions of a model."""
        return [description["modelVersion"] for description in self.describe_versions(model)]

    def ready_workers(self, model: str) -> int:
        """How many workers have loaded the model and take requests."""
        return Workers.of(self.describe(model)).ready

    def scale(self, model: str, workers: int, timeout_s: float = 120.0, wait: bool = True) -> None:
        """Set the number of workers and, by default, wait until so many are ready.

        Raises:
            NotReady: they were not within `timeout_s`.
        """
        self._change(f"{_model_path(model)}?min_worker={workers}&max_worker={workers}")
        deadline = time.monotonic() + timeout_s
        while wait and (ready := self.ready_workers(model)) != workers:
            _wait(
                deadline,
                f"{model}: {ready} of {workers} workers ready after {timeout_s:g} s; see logs/model_log.log. One that "
                f"TorchServe has given up comes back by scaling to 0 and then to {workers}",
            )

    def check_workers(self, model: str, within_s: float = math.inf, at_least: int | None = None) -> int:
        """How many workers have loaded a model.

        Args:
            within_s: as `predict` takes it.
            at_least: so many will do; by default as many as it declares.

        Raises:
            NotReady: fewer.
        """
        workers = Workers.of(self.describe(model, within_s=within_s))
        workers.check(at_least)
        return workers.ready

    def wait_until_ready(self, model: str, timeout_s: float = 120.0) -> int:
        """Wait until the server answers and the model has as many ready workers as it declares; returns how many.

        Raises:
            NotReady: naming what was awaited.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.check_workers(model, deadline - time.monotonic())
            except NotReady as error:
                awaited = f"{error}; see logs/model_log.log"
            except (ServerUnreachable, NotAuthorized, ModelNotFound) as error:
                awaited = str(error)
            _wait(deadline, f"{model} is not ready after {timeout_s:g} s: {awaited}")

    def register(
        self, archive: str, workers: int | None = None, timeout_s: float = 120.0, model: str | None = None
    ) -> str:
        """Register an archive from the server's model store and wait until its workers have loaded it.

        Beside another version of the same model the new one waits until it is named or made the default. One that
        does not load is removed again.

        TorchServe could wait itself (`synchronous`). Then a thread of its frontend waits, and with it the requests of
        every connection that this thread serves.

        Args:
            archive: `NAME`, `NAME.mar` or a path of that file; the server takes it from its own model store.
            workers: at least 1, since a model without any answers nothing; by default as many as the archive says.
            model: name that it is served under; by default the archive's own.

        Returns:
            NAME/VERSION of what is now served.

        Raises:
            ModelApiOff: the configuration does not allow it.
            ModelNotFound: the store has no such file.
            NotReady: no worker could load it, or not in time.
            RequestRefused: 409 where the model has this version already.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected at least 1, found {workers}")
        deadline = time.monotonic() + timeout_s
        file = Path(archive).name.removesuffix(".mar") + ".mar"
        query = {"url": file, "initial_workers": 1, "synchronous": "false"} | ({"model_name": model} if model else {})
        before = self._registered_from(file, model)
        is_refused = False
        try:
            try:
                self._manage("POST", f"/models?{urlencode(query)}", timeout_s)
            except ClientError as error:
                is_refused = not isinstance(error, ServerUnreachable)
                raise
            arrived = self._registered_from(file, model) - before
            if len(arrived) != 1:
                raise NotReady(f"{file} was registered or removed by somebody else meanwhile: ask again")
            [(name, version)] = arrived
            self._wait_until_loaded(name, version, workers, deadline, timeout_s)
        except BaseException:
            if not is_refused:
                with suppress(ClientError):
                    self._remove_arrived(file, model, before)
            raise
        return f"{name}/{version}"

    def _registered_from(self, file: str, model: str | None) -> set[tuple[str, str]]:
        """Name and version of all that came from this file of the model store; of one model, or of every."""
        found = set()
        for name in [model] if model else self.models():
            with suppress(ModelNotFound):
                for description in self.describe_versions(name):
                    if description["modelUrl"] == file:
                        found.add((name, str(description["modelVersion"])))
        return found

    def _wait_until_loaded(
        self, name: str, version: str, workers: int | None, deadline: float, timeout_s: float
    ) -> None:
        """Wait for the workers of a version that is new; TorchServe starts one that does not load again and again.

        Raises:
            NotReady: a worker has ended while it loaded the model, or the deadline has passed.
        """
        if workers is not None:
            self._change(f"{_model_path(name, version)}?min_worker={workers}&max_worker={workers}")
        first_pids: dict[str, int] = {}
        while True:
            try:
                description = self.describe(name, version, within_s=deadline - time.monotonic())
                found = Workers.of(description)
                if found.ready == found.declared:
                    return
                awaited = f"{found.ready} of {found.declared} workers ready"
                for worker in description["workers"]:
                    started = worker["status"] != "READY" and worker["pid"] > 0
                    if started and first_pids.setdefault(worker["id"], worker["pid"]) != worker["pid"]:
                        raise NotReady(f"{name} {version}: a worker ended while it loaded; see logs/model_log.log")
            except ServerUnreachable as error:
                awaited = str(error)
            except ModelNotFound:
                raise NotReady(f"{name} {version} was removed while it loaded") from None
            late = f"{name} {version}: {awaited} after {timeout_s:g} s; see logs/model_log.log"
            _wait(deadline, late, _LOADING_INTERVAL_S)

    def _remove_arrived(self, file: str, model: str | None, before: set[tuple[str, str]]) -> None:
        """Remove the version that has come from a file since; a call that was given up may still bring it."""
        deadline = time.monotonic() + _APPEARS_WITHIN_S
        while not (arrived := self._registered_from(file, model) - before) and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)
        if len(arrived) == 1:
            [(name, version)] = arrived
            self.unregister(name, version)

    def unregister(self, model: str, version: str | None = None) -> str:
        """Remove a model, by default its default version; raises as `register` does.

        After a load TorchServe may answer 500 and leave it registered, so that is asked once more.
        """
        path = _model_path(model, version)
        try:
            status: str = document(self._manage("DELETE", path))["status"]
        except RequestRefused as error:
            if error.status != 500:
                raise
            with suppress(ModelNotFound):  # it went all the same
                self._manage("DELETE", path)
            return f'Model "{model}" unregistered'
        return status

    def set_default(self, model: str, version: str) -> str:
        """Make a version the default."""
        status: str = document(self._change(f"{_model_path(model, version)}/set-default"))["status"]
        return status

    def token(self, api: Api = "inference", refused: str | None = None) -> str:
        """The token for requests that are sent past this object, renewed where it is about to expire.

        Args:
            refused: one that the server has just refused, and that is to be replaced.

        Raises:
            NotAuthorized: there is none.
        """
        return self._connection.token(api, refused)

    def _ask(
        self,
        what: str,
        model: str,
        version: str | None,
        image: bytes,
        headers: Mapping[str, str],
        within_s: float = math.inf,
    ) -> requests.Response:
        path = f"/{what}" + _model_path(model, version).removeprefix("/models")
        named = f"{model}/{version}" if version else model
        headers = {"Content-Type": "application/octet-stream", **headers}
        deadline = time.monotonic() + within_s

        def attempt() -> requests.Response:
            wait_s = self._wait_s(deadline - time.monotonic())
            return self._connection.call("inference", "POST", path, image, headers, wait_s)

        try:
            answer = retries.call(
                attempt,
                min(self.retry_s, within_s),
                lambda error, attempts: self._check_worth_waiting(named, error, attempts, deadline),
            )
        except ServerBusy:
            self._check_has_workers(named, deadline)
            raise
        self._have_answered.add(named)
        return answer

    def _check_worth_waiting(self, model: str, error: ClientError, attempts: int, deadline: float) -> None:
        """Raises:
        NothingListens: no server has been there yet that could be coming back.
        NoWorkers: the model has not answered yet either; one that has is being scaled.
        """
        if isinstance(error, NothingListens) and not self._connection.has_answered:
            raise error
        if isinstance(error, ServerBusy) and attempts == 1 and model not in self._have_answered:
            self._check_has_workers(model, deadline)

    def _check_has_workers(self, model: str, deadline: float) -> None:
        """Raises:
        NoWorkers: TorchServe says the same of a full queue and of a model without workers.
        """
        try:
            workers = self.describe(model, within_s=deadline - time.monotonic())["workers"]
        except ClientError:  # who may only predict cannot ask
            return
        if not workers:
            raise NoWorkers(f"{model} has no worker: {PROGRAM} scale {model} 1 gives it one")

    def _wait_s(self, within_s: float) -> float:
        """For one answer, where nobody waits longer than `within_s`."""
        return min(self._connection.timeout_s, max(_LEAST_WAIT_S, within_s))

    def _change(self, path: str) -> requests.Response:
        """Where several change at once TorchServe may stumble over its own list of workers and answer 500; what is set
        is as good the second time, so that is asked once more."""
        try:
            return self._manage("PUT", path)
        except RequestRefused as error:
            if error.status != 500:
                raise
            return self._manage("PUT", path)

    def _manage(self, method: str, path: str, timeout_s: float | None = None) -> requests.Response:
        return self._connection.call("management", method, path, timeout_s=timeout_s)


def _model_path(model: str, version: str | None = None) -> str:
    """The path of a model, which may be given as NAME/VERSION too."""
    return f"/models/{quote(model)}" + (f"/{quote(version, safe='')}" if version else "")


def document(answer: requests.Response) -> Any:
    """The JSON of a good answer.

    Raises:
        NotTorchServe: it is none.
    """
    try:
        return answer.json()
    except ValueError:
        raise NotTorchServe(f"{answer.url} answers, but not as TorchServe does: it sends no JSON") from None


def next_port(url: str) -> str:
    """The address with the port after this one's, where TorchServe has its next API by default.

    Raises:
        ClientError: it is none.
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        if host := parts.hostname:
            return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{(parts.port or 80) + 1}"
    raise NoAddress(url)


def _wait(deadline: float, message: str, pause_s: float = _POLL_INTERVAL_S) -> None:
    """Pause between two looks at a condition.

    Raises:
        NotReady: with `message`, once `deadline` has passed.
    """
    if time.monotonic() >= deadline:
        raise NotReady(message)
    time.sleep(pause_s)
