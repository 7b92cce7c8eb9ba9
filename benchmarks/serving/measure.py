"""Interleaved rounds: every peer is started, loaded and stopped in turn, then all of them again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import requests

from archive.run_folder import RunFolder
from benchmarks import records
from benchmarks.errors import BenchmarkError
from benchmarks.ports import free_ports
from benchmarks.programs import output
from benchmarks.records import Record
from benchmarks.serving import load
from benchmarks.serving.bodies import FORMS, Form
from benchmarks.serving.home import Home
from benchmarks.serving.models import LENET, RESNET_INT8, network_of
from benchmarks.serving.peers import CORES, IN_PROCESS_INT8, OURS, PEERS, ROOT, Launch, Peer
from benchmarks.serving.process import Server
from benchmarks.serving.steady import by_model, unsteady
from client.tokens import Tokens

CONNECTIONS = (1, 8, 32)
MANY_IMAGES = "multipart-32"
MOST_REPEATS = 3
"""Of a round of a model, until its figures are steady."""
_LIMIT_BATCH_SIZE = 8
_LIMIT_TIMEOUT_S = 180
_WARM_UP_S = 10  # JVMs are still compiling themselves after seconds
_LENET_SECONDS = 2
_ANSWER_TIMEOUT_S = 30


def rounds(
    home: Home, models: Sequence[str], peers: Sequence[str], count: int, seconds: int, say: Callable[[str], None]
) -> list[str]:
    """Measure every peer with every model `count` times and add a line to the results after each.

    What the results have already is not measured again, unless it failed. Rounds that differ are: all peers in the
    round that is furthest off, since ratios are taken within a round.

    Args:
        seconds: of each load; LeNet-5, with a hundred times as many requests, needs no more than two.

    Returns:
        What failed, and what did not become steady, each once.
    """
    known = {(r["round"], r["model"], r["peer"]) for r in records.read(home.results) if not r["error"]}
    failed: list[str] = []
    for number in range(count):
        for model in models:
            left = [name for name in peers if (number, model, name) not in known]
            failed += _round(home, number, model, left, seconds, say)
    for model in models:
        for repeat in range(MOST_REPEATS + 1):
            measured = by_model(records.read(home.results)).get(model, {})
            spreads = unsteady({name: measured[name] for name in peers if name in measured})
            if not spreads:
                break
            name, spread = next(iter(spreads.items()))
            said = f"{name} with {model} at {spread.connections}: its rounds differ by {spread.share:.0%}"
            if repeat == MOST_REPEATS:
                failed += [f"{name} with {model} on a machine that is quiet enough" for name in spreads]
                break
            say(f"{said}; round {spread.furthest + 1} is measured again")
            failed += _round(home, spread.furthest, model, peers, seconds, say)
    return list(dict.fromkeys(failed))


def _round(
    home: Home, number: int, model: str, peers: Sequence[str], seconds: int, say: Callable[[str], None]
) -> list[str]:
    """Measure each of those peers that serve the model once; returns what failed."""
    failed = []
    for name in peers:
        if model not in PEERS[name].models:
            continue
        record = {"round": number, "model": model, "peer": name, **records.about()}
        began = time.monotonic()
        try:
            record |= measure(home, model, name, min(seconds, _LENET_SECONDS) if model == LENET else seconds)
        except (BenchmarkError, subprocess.SubprocessError, OSError, RuntimeError) as error:
            record["error"] = str(error)
            failed.append(f"{name} with {model}")
        records.append(home.results, record)
        say(f"round {number + 1}  {model:9} {name:15} {summary(record)}  {time.monotonic() - began:.0f} s")
    return failed


def summary(record: Record) -> str:
    """One line of progress."""
    if record["error"]:
        return str(record["error"])
    rates = (f"{load['requests_per_s']:8.1f}" for load in record["load"].values())
    return f"{' '.join(rates)} requests/s  cold start {record['cold_start_s']:.1f} s"


def measure(home: Home, model: str, name: str, seconds: int) -> Record:
    """One peer with one model.

    Returns:
        `load`: what each number of connections got; `cold_start_s`; `memory_mb` under load, without a limit's.

    Raises:
        BenchmarkError: it gave no right answer, or could not be loaded.
    """
    if PEERS[name].plan is None:
        return _limit(home, RESNET_INT8 if name == IN_PROCESS_INT8 else network_of(model), model, seconds)
    directory = home.server(name, model)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    many_images = (name, model) == (OURS, LENET)
    return serve(home, model, PEERS[name], directory, seconds, many_images=many_images)


def _limit(home: Home, served: str, model: str, seconds: int) -> Record:
    """In process: one image at a time in one process, and batches in a process for each core."""
    run, images = home.run(served), home.images(model)
    result: Record = {"load": {}, "cold_start_s": _bare_start(run, network_of(model), home), "memory_mb": None}
    for connections, processes, batch_size in ((1, 1, 1), (8, CORES, _LIMIT_BATCH_SIZE)):
        command = (
            sys.executable, "-m", "benchmarks.serving.limits", str(run), "--images", str(images),
            "--processes", str(processes), "--batch-size", str(batch_size), "--seconds", str(seconds),
        )  # fmt: skip
        measured = json.loads(output(command, cwd=ROOT, timeout=_LIMIT_TIMEOUT_S))
        rate = measured.pop("images_per_s")
        result["load"][str(connections)] = {"requests_per_s": rate, **measured, "errors": 0}
    return result


def _bare_start(run: Path, model: str, home: Home) -> float:
    """Seconds of a process that imports torch, loads the run's file and answers once."""
    facts = json.loads(home.network(model).with_suffix(".json").read_text())
    file = run / (RunFolder.int8 if run.name == RESNET_INT8 else RunFolder.model)
    program = ROOT / "benchmarks" / "serving" / "servers" / "bare.py"
    command = (sys.executable, str(program), str(file), str(len(facts["mean"])), str(facts["crop_size"]))
    began = time.monotonic()
    output(command, cwd=ROOT, timeout=_LIMIT_TIMEOUT_S)
    return time.monotonic() - began


def serve(
    home: Home,
    model: str,
    peer: Peer,
    directory: Path,
    seconds: int,
    *,
    connections: Sequence[int] = CONNECTIONS,
    many_images: bool = False,
) -> Record:
    """Start `peer` in `directory`, wait for a right answer, load it, weigh it, and stop it.

    Args:
        many_images: load it with requests of several images as well.

    Raises:
        BenchmarkError: as `measure`; nothing is left running.
    """
    port = free_ports()
    url = f"http://127.0.0.1:{port}{peer.path.format(model=network_of(model))}"
    expected = json.loads(home.expected.read_text())[model]
    body = (home.bodies(model, peer.form) / "00.bin").read_bytes()

    def drive(form: str, connections: int, seconds: int) -> load.Load:
        headers = _headers(FORMS[form], directory)
        return load.generate(url, headers, home.bodies(model, form), connections, seconds)

    def measured(form: str, connections: int) -> Record:
        got = drive(form, connections, seconds)
        if got.requests_per_s == 0:  # percentiles of no answer would look like the fastest
            raise BenchmarkError(f"no good answer to {connections} connections in {seconds} s: give --seconds more")
        return asdict(got)

    assert peer.plan is not None
    server = Server(peer.plan(Launch(home, network_of(model), directory, port)), directory)
    try:
        result: Record = {"cold_start_s": server.await_answer(lambda: _is_right(url, body, peer, directory, expected))}
        drive(peer.form, 8, _WARM_UP_S)
        result["load"] = {str(count): measured(peer.form, count) for count in connections}
        result["memory_mb"] = server.memory_mb()
        if many_images:
            check_every_image(home.bodies(model, MANY_IMAGES), url, _headers(FORMS[MANY_IMAGES], directory))
            result["many_images"] = measured(MANY_IMAGES, 8)
        return result
    finally:
        server.stop()


def check_every_image(bodies: Path, url: str, headers: dict[str, str]) -> None:
    """Raises:
    BenchmarkError: a request of several images is not answered with as many answers.
    """
    answer = requests.post(url, (bodies / "00.bin").read_bytes(), headers=headers, timeout=_ANSWER_TIMEOUT_S)
    images, found = FORMS[MANY_IMAGES].images, answer.json()
    if not isinstance(found, list) or len(found) != images:
        raise BenchmarkError(f"a request of {images} images was answered with {answer.text[:80]}")


def _headers(form: Form, directory: Path) -> dict[str, str]:
    """With the token of a server that wrote one."""
    key_file = directory / "key_file.json"
    if not key_file.is_file():
        return form.all_headers
    token = Tokens(key_file, {}).token("inference")
    return {**form.all_headers, "Authorization": f"Bearer {token.value}"}


def _is_right(url: str, body: bytes, peer: Peer, directory: Path, expected: dict[str, float]) -> bool:
    headers = _headers(FORMS[peer.form], directory)
    response = requests.post(url, data=body, headers=headers, timeout=_ANSWER_TIMEOUT_S)
    if not response.ok:
        raise ValueError(f"status {response.status_code}: {response.text[:200]}")
    return agrees(FORMS[peer.form].decode(response.json()), expected, peer.tolerance)


def agrees(answer: dict[str, float], expected: dict[str, float], tolerance: float | None) -> bool:
    """Whether the best class is the same, and its probability within `tolerance`; None takes any answer."""
    if tolerance is None:
        return True
    best = max(expected, key=expected.__getitem__)
    return max(answer, key=answer.__getitem__) == best and abs(answer[best] - expected[best]) <= tolerance
