"""A folder with a Ray Serve application around the modules that serve under TorchServe; `python app.py` starts it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from archive import build, serving
from archive.serving import ServedRecipe
from export.finished_run import FinishedRun
from handler import torchserve_defaults
from system.cores import cores

APP_FILE, CONFIG_FILE, MODEL = "app.py", "serve.yaml", "model"
_APP = Path(__file__).with_name("ray_app.py")
_METRICS = Path(__file__).parents[1] / "config" / "metrics.yaml"
_KEY_FILE = "key_file.json"
_PORT = 8080
_HEAD = "# Read by app.py; tried with `serve deploy` on a cluster of one machine, not of several.\n"
_REQUIREMENTS = """\
captum
numpy
pi-heif
pillow
pydantic
python-multipart
pyyaml
ray[serve]
torch
"""


def write(known: FinishedRun, folder: Path, name: str, version: str, earlier: Path) -> None:
    """Fill `folder`, which exists; settings and token of an `earlier` export stay.

    Raises:
        IncompleteRun, UnsafeFile: the run cannot be served.
    """
    run = known.run.path
    build.check_complete(run)
    recipe = serving.read(run)
    build.stage(run, folder / MODEL)
    for room in ("handler", "system"):
        (folder / MODEL / room).rename(folder / room)
    shutil.copy2(run / recipe.model_file, folder / MODEL)
    serving.write_config(recipe, folder / MODEL)
    shutil.copy2(_APP, folder / APP_FILE)
    shutil.copy2(_METRICS, folder)
    forms = ["onnxruntime\n"] if [*(folder / MODEL).glob("*.onnx")] else []
    (folder / "requirements.txt").write_text("".join([_REQUIREMENTS, *forms]))
    document = config(recipe, name)
    if earlier.exists():
        document = yaml.safe_load((earlier / CONFIG_FILE).read_text(encoding="utf-8"))
        if (earlier / _KEY_FILE).exists():
            shutil.copy2(earlier / _KEY_FILE, folder)
    document["applications"][0]["args"] = {"name": name, "version": version}
    (folder / CONFIG_FILE).write_text(_HEAD + yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def config(recipe: ServedRecipe, name: str) -> dict[str, Any]:
    """Ray Serve's configuration: as many replicas as the recipe wants workers, or as the load needs and cores allow."""
    section = recipe.serving
    scaling = {"min_replicas": 1, "max_replicas": cores(), "target_ongoing_requests": section.batch_size}
    deployment = {
        "name": "Server",
        **({"num_replicas": section.workers} if section.workers else {"autoscaling_config": scaling}),
        "max_ongoing_requests": 2 * section.batch_size,
        "max_queued_requests": section.torchserve.get("jobQueueSize", torchserve_defaults.JOB_QUEUE_SIZE),
        "max_surge_percent": 100,  # a new replica is ready before an old one ends
        "max_constructor_retry_count": 1,  # a golden check that fails will fail again
        "ray_actor_options": {"num_cpus": section.threads or 1},
        "logging_config": {"enable_access_log": False},
    }
    application = {"name": name, "route_prefix": "/", "import_path": "app:build", "deployments": [deployment]}
    return {"http_options": {"host": "127.0.0.1", "port": _PORT}, "applications": [application]}
