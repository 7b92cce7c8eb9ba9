"""Classify a mountain of images with an archive and without a server, on one machine or a Ray cluster.

    python -m archive score model_store/lenet5-digits.mar photos/ --out scores

fills `scores/` with Parquet files, each a shard of the images in the order of their names. A shard is finished or not
there: the same command goes on where a killed one ended, and takes up images that were added.

| column | what |
|---|---|
| `path` | below the folder; bytes that are no UTF-8 are written as `\\xNN` |
| `label`, `probability` | the best class; null where the image was refused |
| `labels`, `probabilities` | the `top_k` best, falling |
| `accepted` | by the recipe's `serving.accept`; null where it has none, and where the image was refused |
| `error_code`, `error_message` | null, or what a server refuses the image with; code 0 where it cannot be read |
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from archive.errors import ScoringRefused
from archive.score_worker import DIGEST_KEY, Worker, readable_name
from archive.verify import verify
from system import image_files

SHARD_IMAGES = 1_000
PACKAGES = ("ray", "pyarrow")
# Ray keeps only the names of the images there.
_OBJECT_STORE_BYTES = 128 << 20
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # otherwise it prints an error about every pool of workers
    "RAY_DATA_LOG_LEVEL": "ERROR",
}
# Ray's switch for the systems on which it never listens beyond 127.0.0.1, whose address it replaces elsewhere.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# It waits half a minute for its own processes, which a busy machine may not give them.
_STARTS = 3
# A worker that dies is replaced, and its images may be what kills it.
_MOST_S_WITHOUT_A_SHARD = 1_800


@dataclass(frozen=True)
class Progress:
    """How far scoring has come, counting what earlier runs did."""

    images: int
    done: int
    refused: int
    """Of those that this run has done."""


def score(
    archive: Path,
    folder: Path,
    out: Path,
    *,
    public_key: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    shard_images: int = SHARD_IMAGES,
) -> Iterator[Progress]:
    """Classify every image below `folder` that has no row in `out` yet; yields at the start and after each shard.

    Args:
        public_key: demand a signature by its owner.
        workers: processes, one core each; None is one for each core of the machine or cluster.
        address: of a running Ray cluster, whose machines see the archive, both folders and this code at the same
            paths; None starts Ray on this machine alone, reachable from nowhere else, and ends it.
        shard_images: images of a shard; keep it when going on.

    Raises:
        ScoringRefused: Ray is missing or fails, `folder` has no image, or `out` holds another archive's answers.
        InvalidArchive, SignatureError: the archive is not to be trusted; nothing of it was run.
    """
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ScoringRefused(f"scoring needs {', '.join(missing)}: pip install 'ray[data]'")
    digest = verify(archive, public_key).digest
    files = find_images(folder)
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.glob(".*.partial"):
        partial.unlink()
    done = finished(out, digest)
    remaining = [file for file in files if readable_name(file) not in done]
    progress = Progress(len(files), len(files) - len(remaining), 0)
    yield progress
    if remaining:
        shards = [remaining[start : start + shard_images] for start in range(0, len(remaining), shard_images)]
        worker_options = {
            "archive": archive.resolve(),
            "digest": digest,
            "folder": folder.resolve(),
            "out": out.resolve(),
        }
        for images, refused in _run(shards, worker_options, workers, address):
            progress = Progress(progress.images, progress.done + images, progress.refused + refused)
            yield progress


def find_images(folder: Path) -> list[str]:
    """Paths below `folder`, in order, of its images."""
    return [str(file.relative_to(folder)) for file in image_files.images_below(folder, ScoringRefused)]


def finished(out: Path, digest: str) -> set[str]:
    """Names of the images that have a row in `out`.

    Raises:
        ScoringRefused: a row is not from this archive.
    """
    from pyarrow import ArrowException, parquet

    names: set[str] = set()
    for shard in sorted(out.glob("*.parquet")):
        try:
            with parquet.ParquetFile(shard) as file:
                if (file.schema_arrow.metadata or {}).get(DIGEST_KEY) != digest.encode():
                    raise ScoringRefused(f"{shard} was not written by this archive: name another --out")
                names.update(file.read(["path"]).column("path").to_pylist())
        except ArrowException as error:
            raise ScoringRefused(f"{shard} cannot be read: delete it, or name another --out ({error})") from None
    return names


def _run(
    shards: Sequence[Sequence[str]], worker_options: dict[str, Any], workers: int | None, address: str | None
) -> Iterator[tuple[int, int]]:
    """Let Ray Data's actors answer the shards; yields images and refusals of each.

    Raises:
        ScoringRefused: Ray fails, or a worker cannot load the archive.
    """
    os.environ.update(_RAY_ENVIRONMENT if address else {**_RAY_ENVIRONMENT, **_LOOPBACK_ONLY})
    import pyarrow
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        try:
            _connect(ray, workers, address, temporary)
            settings = ray.data.DataContext.get_current()
            settings.enable_progress_bars = False
            settings.execution_no_progress_timeout_s = _MOST_S_WITHOUT_A_SHARD
            tables = [pyarrow.table({"file": [os.fsencode(file) for file in shard]}) for shard in shards]
            count = min(len(shards), workers or int(ray.cluster_resources()["CPU"]))
            counts = ray.data.from_arrow(tables).map_batches(
                Worker, batch_size=None, batch_format="pyarrow", fn_constructor_kwargs=worker_options, num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=count),
            )  # fmt: skip
            for row in counts.iter_rows():
                yield row["images"], row["refused"]
        except (ray.exceptions.RayError, ExecutionTimeoutError, ConnectionError) as error:
            raise ScoringRefused(
                f"Ray gave up: {_reason(error)}; what is finished stays, call again to go on"
            ) from error
        finally:
            ray.shutdown()


def _connect(ray: Any, workers: int | None, address: str | None, temporary: str) -> None:
    """Raises: ScoringRefused: there is no Ray to connect to, or it does not start."""
    options: dict[str, Any] = {"address": address} if address else {
        "address": "local", "num_cpus": workers, "include_dashboard": False, "_temp_dir": temporary,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }  # fmt: skip
    starts = 1 if address else _STARTS
    others = set(psutil.Process().children())
    while True:
        starts -= 1
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray raises what it likes, a bare Exception where the machine is too busy
            ray.shutdown()
            for process in set(psutil.Process().children()) - others:  # Ray leaves those of a start that failed
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if starts == 0:
                where = f"at {address} cannot be reached" if address else "does not start here"
                raise ScoringRefused(f"Ray {where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The last line, which holds the exception, of what Ray reports of several processes."""
    return str(error).strip().splitlines()[-1]
