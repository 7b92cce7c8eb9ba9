"""One model as a Ray Serve application, with the HTTP interface that it has under TorchServe.

    python app.py                  on this machine alone; SIGHUP takes a new export, SIGTERM ends it in order
    serve deploy serve.yaml        on a Ray cluster; again after a change

Either replaces one replica after another. Requests carry the token of `key_file.json`, or TORCHSERVE_INFERENCE_TOKEN.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

if __name__ == "__main__":
    # Everyone who reaches Ray's own ports can run code, so they require a random key. Ray reads this at its import,
    # and listens on the loopback interface where no cluster is enabled.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import ray
import yaml
from ray import serve
from ray.util import metrics
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from handler import fields
from handler.classifier import Classifier
from handler.files import CONFIG_FILE, ONNX_FILE
from handler.identity import Identity
from system.cores import cores

HERE = Path(__file__).resolve().parent
SHUTDOWN_S = 20.0
MOST_BYTES = 6_553_500  # of a body, as under TorchServe
BUCKETS_S = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
NAME = "(?P<name>[^/:]+)(/(?P<version>[^/:]+))?"
PREDICT = f"/predictions/{NAME}", f"/v1/models/{NAME}:predict", f"/v2/models/{NAME}/infer"
INVOKE = f"/models/{NAME}/invoke", "/invocations"
EXPLAIN = f"/explanations/{NAME}", f"/v1/models/{NAME}:explain", f"/v2/models/{NAME}/explain"
DESCRIBE, MODELS = f"/models/{NAME}(/set-default)?", "/models"
SAYS = {
    "/ping": {"status": "Healthy"},
    "/v2": {"name": "Ray Serve", "version": ray.__version__, "extensions": ["kserve"]},
    "/v2/health/live": {"live": True},
    "/v2/health/ready": {"ready": True},
}
ROUTES = (*PREDICT, *INVOKE, *EXPLAIN, *SAYS, MODELS, DESCRIBE)


@serve.deployment
class Server:
    """A replica: one model, one batch at a time."""

    def __init__(self, name: str, version: str, token: str) -> None:
        [model_file] = [*(HERE / "model").glob("model.pt*")] or [HERE / "model" / ONNX_FILE]
        self.config = yaml.safe_load(model_file.with_name(CONFIG_FILE).read_text())
        self.authorization = f"Bearer {token}".encode()
        self.identity = Identity.of(name, version, model_file)
        self.classifier = Classifier()
        gpu = 0 if ray.get_gpu_ids() else None
        self.classifier.load(model_file, self.config, self.identity, figures(), workers=None, gpu=gpu)
        self.batch.set_max_batch_size(self.config["batchSize"])
        self.batch.set_batch_wait_timeout_s(self.config["maxBatchDelay"] / 1000)
        self.computing = ThreadPoolExecutor(1)

    async def __call__(self, http: HttpRequest) -> Response:
        """Answer as TorchServe's inference API does, and to GET as its management API."""
        if not secrets.compare_digest(http.headers.get("authorization", "").encode(), self.authorization):
            return error(400, "InvalidKeyException", "Token Authorization failed: send the token of key_file.json")
        path = http.scope["path"]
        route, found = next(((each, found) for each in ROUTES if (found := re.fullmatch(each, path))), (None, None))
        if route is None or found is None:
            return error(404, "ResourceNotFoundException", "Requested resource is not found")
        name, version = map(found.groupdict().get, ("name", "version"))
        if name not in (None, self.identity.name):
            return error(404, "ModelNotFoundException", f"Model not found: {name}")
        if version not in (None, self.identity.version):
            return error(404, "ModelVersionNotFoundException", f"Model version: {version} does not exist for: {name}")
        if route in (*PREDICT, *INVOKE, *EXPLAIN):
            return await self.classify(http, {"explain": "True"} if route in EXPLAIN else {})
        if http.method not in ("GET", "HEAD"):
            return error(501, "NotImplemented", "Ray Serve has no management API: change serve.yaml and deploy again")
        return as_json(self.described() if route == DESCRIBE else SAYS.get(path) or {"models": [self.named()]})

    async def classify(self, http: HttpRequest, asked: dict[str, str]) -> Response:
        """Predict or explain."""
        try:
            parameters = fields.chosen(await parameters_of(http))
        except HTTPException as refusal:
            return error(refusal.status_code, "InvalidRequest", refusal.detail)
        named = {parameter["name"]: parameter["value"] for parameter in parameters}
        request, answer, predictions = await self.batch((named, {**http.headers, **asked}))
        headers = self.classifier.headers(answer)
        if request.wants == "explanation":
            time_s = self.classifier.settings.explanation_time_s
            answer = await self.compute(self.classifier.explained, request, predictions, time_s)
        return Response(answer.body, answer.refusal.code if answer.refusal else 200, headers, answer.content_type)

    @serve.batch  # type: ignore[untyped-decorator]
    async def batch(self, asked: list[tuple[dict[str, Any], dict[str, str]]]) -> Any:
        """Fields and headers → request, answer and predictions of each; explanations are still to come."""
        return await self.compute(self.answer_all, asked)

    def answer_all(self, asked: list[tuple[dict[str, Any], dict[str, str]]]) -> Any:
        started = time.perf_counter()
        named, headers = zip(*asked, strict=True)
        requests = self.classifier.read(named, headers, [None] * len(asked))
        return list(zip(requests, *self.classifier.answer_all(requests, started), strict=True))

    async def compute(self, function: Any, *arguments: Any) -> Any:
        """Beside the loop that receives requests."""
        return await asyncio.get_running_loop().run_in_executor(self.computing, function, *arguments)

    def named(self) -> dict[str, str]:
        return {"modelName": self.identity.name, "modelVersion": self.identity.version}

    def described(self) -> list[dict[str, Any]]:
        """What TorchServe's management API says of a model, with this replica as its worker."""
        replica = serve.get_replica_context().replica_id.unique_id
        worker = {"id": replica, "status": "READY", "pid": os.getpid(), "memoryUsage": 0}
        batches = {key: self.config[key] for key in ("batchSize", "maxBatchDelay")}
        described = {"minWorkers": 1, "workers": [worker], "customizedMetadata": self.classifier.describe()}
        return [{**self.named(), **batches, **described}]


async def parameters_of(http: HttpRequest) -> fields.Parameters:
    """As TorchServe makes them of a body; of a URL's parameters and a form's text, `top_k` and JSON alone.

    Raises:
        HTTPException: it is too large, or a form that is broken.
    """
    left = MOST_BYTES

    async def receive() -> Any:
        nonlocal left
        message = await http.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
        return message

    bounded = HttpRequest(http.scope, receive)
    found: list[tuple[str, Any]] = list(http.query_params.multi_items())
    if http.headers.get("content-type", "").lower().startswith(("multipart/form-data", "application/x-www-form-url")):
        try:
            async with bounded.form() as form:
                parts = form.multi_items()
                found += [(name, part if isinstance(part, str) else await part.read()) for name, part in parts]
        except (MultiPartException, ValueError) as broken:
            raise HTTPException(400, f"the form cannot be read: {broken}") from None
    elif body := await bounded.body():
        found.append((fields.RAW_BODY, body))
    return [
        {"name": name, "value": value, "contentType": None if isinstance(value, str) else "application/octet-stream"}
        for name, value in found
        if isinstance(value, bytes) or name == fields.TOP_K_FIELD or name.lstrip().startswith(("{", "["))
    ]


def as_json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status, media_type="application/json")


def error(status: int, kind: str, message: str) -> Response:
    """In TorchServe's form."""
    return as_json({"code": status, "type": kind, "message": message}, status)


class Figure:
    """One metric of metrics.yaml in Ray's metrics API."""

    def __init__(self, kind: str, name: str, dimensions: list[str]) -> None:
        # Ray has a `Version` of its own.
        self.tags = ["ModelVersion" if dimension == "Version" else dimension for dimension in dimensions]
        more = {"boundaries": BUCKETS_S} if kind == "histogram" else {}
        metric = getattr(metrics, kind.capitalize())(name, tag_keys=tuple(self.tags), **more)
        self.tell = getattr(metric, {"counter": "inc", "gauge": "set", "histogram": "observe"}[kind])

    def add_or_update(self, value: float, dimension_values: list[str]) -> None:
        self.tell(value, dict(zip(self.tags, dimension_values, strict=True)))


def figures() -> dict[str, Figure]:
    declared = yaml.safe_load((HERE / "metrics.yaml").read_text())["model_metrics"]
    every = [(kind, each["name"], each["dimensions"]) for kind, of_kind in declared.items() for each in of_kind]
    return {name: Figure(kind, name, dimensions) for kind, name, dimensions in every}


def token() -> str:
    """Of the environment, or of the key file, which is made where there is none."""
    file = HERE / "key_file.json"
    if given := os.environ.get("TORCHSERVE_INFERENCE_TOKEN"):
        return given
    if not file.exists():
        key = {"key": secrets.token_urlsafe(32)}
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:  # noqa: PTH123
            json.dump({"inference": key, "management": key}, new)
    return str(json.loads(file.read_text())["inference"]["key"])


def build(arguments: dict[str, str]) -> Any:
    """What serve.yaml imports; its arguments are the model's name and version."""
    return Server.bind(**arguments, token=token())  # type: ignore[attr-defined]


def deploy(config: dict[str, Any]) -> None:
    """Serve what serve.yaml says on this machine."""
    [application] = config["applications"]
    [options] = application["deployments"]
    server = Server.options(**options)  # type: ignore[attr-defined]
    serve.run(server.bind(**application["args"], token=token()), name=application["name"])


def reason(failure: Exception) -> str:
    """In one line; of a replica that does not start, the end of its traceback."""
    applications = serve.status().applications.values() if ray.is_initialized() else ()
    replicas = [replica.message for each in applications for replica in each.deployments.values() if replica.message]
    return f"error: {(replicas or [str(failure)])[0].strip().splitlines()[-1]}"


def main() -> None:
    file = HERE / "serve.yaml"
    config = yaml.safe_load(file.read_text())
    http = config["http_options"]
    os.chdir("/")  # a new export replaces this folder
    try:
        ray.init(
            num_cpus=2 * cores(),  # to Ray's scheduler: a new version's replicas start beside the old one's
            include_dashboard=False,
            logging_level="WARNING",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(HERE)}},
            _metrics_export_port=http["port"] + 1,
        )
        asked: SimpleQueue[int] = SimpleQueue()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: asked.put(number))
        serve.start(http_options=http)
        deploy(config)
    except Exception as failure:  # Ray raises what it likes
        print(reason(failure), file=sys.stderr, flush=True)
        ending = Thread(target=ray.shutdown, daemon=True)  # which may wait without end for what did not start
        ending.start()
        ending.join(SHUTDOWN_S)
        os._exit(1)
    print(f"http://{http['host']}:{http['port']}", flush=True)
    while asked.get() == signal.SIGHUP:
        try:
            deploy(yaml.safe_load(file.read_text()))
        except Exception as failure:  # what was there before goes on
            print(reason(failure), file=sys.stderr, flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
