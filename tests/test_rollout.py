"""A new version beside the old one: promoted if it answers as well, rolled back if not, harmless if it is killed."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import pytest
import requests
from typer.testing import CliRunner

from client.errors import ClientError, NotReady
from client.inputs import Source
from client.tokens import VARIABLES, Tokens
from client.torchserve import TorchServe
from operate.__main__ import app
from operate.edge.backends import Server, State
from operate.edge.nginx import Nginx
from operate.edge.servers import ServerEntry
from operate.edge.share import LEASE_S, EdgeShare
from operate.errors import EdgeUnusable, RolloutRefused
from operate.golden import GoldenFile
from operate.rollout.asking import Plan
from operate.rollout.comparison import Answer, Comparison, Limits
from operate.rollout.versions import Rollout
from operate.tuning import layouts
from server.launch import RunningServer
from system import locks
from tests.broken import repacked, spoil_golden_answers
from tests.commands import command, command_line
from tests.conftest import MODEL, ROOT, free_ports, signals_of_a_terminal, started, wait_for, with_model_api
from tests.edges import (
    TAKEN_BACK_WITHIN_S,
    TEMPLATE,
    RunningEdge,
    behind,
    make_folder,
    running,
)
from tests.listening import Quiet, key_file, listening

MARK = "MAR-INF/MANIFEST.json"
VERSIONS = count(2)
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="the program nginx is not installed")
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def rolling(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With two threads for all connections, so that one which waits for a version is seen."""
    few = "number_of_netty_threads=2\n"
    with with_model_api(tmp_path_factory.mktemp("rollout"), model_store, few) as server:
        yield server


@pytest.fixture(scope="module")
def store(rolling: RunningServer) -> Path:
    """The model store of that server."""
    return rolling.key_file.parent / "model_store"


@pytest.fixture
def server(rolling: RunningServer) -> Iterator[TorchServe]:
    """A client of it; before and after a test one version is served."""
    client = rolling.client()
    yield client
    assert command(rolling, "rollout", MODEL, "--abort").returncode == 0
    assert len(client.versions(MODEL)) == 1


def packed(store: Path, folder: Path, change: Change = lambda content: None) -> tuple[str, str]:
    """File name and version of an archive in the store: the served model in its next version, with a change."""
    version = f"{next(VERSIONS)}.0"

    def renumber(content: Path) -> None:
        manifest = json.loads((content / MARK).read_text())
        manifest["model"]["modelVersion"] = version
        (content / MARK).write_text(json.dumps(manifest))
        change(content)

    shutil.copy(repacked(store / f"{MODEL}.mar", folder, renumber), store / f"next-{version}.mar")
    return f"next-{version}.mar", version


def swap_two_labels(content: Path) -> None:
    """In labels and golden answers alike, so that a worker loads it."""
    labels = json.loads((content / "index_to_name.json").read_text())
    golden = json.loads((content / "golden" / "golden.json").read_text())
    best = Counter(max(range(10), key=row.__getitem__) for row in golden["probabilities"].values())
    one, other = (index for index, _ in best.most_common(2))
    labels[str(one)], labels[str(other)] = labels[str(other)], labels[str(one)]
    golden["class_names"] = [labels[str(index)] for index in range(10)]
    (content / "index_to_name.json").write_text(json.dumps(labels))
    (content / "golden" / "golden.json").write_text(json.dumps(golden))


def of_a_swapped_class(run: Path) -> bytes:
    """A golden image whose label they change."""
    rows = json.loads((run / "golden" / "golden.json").read_text())["probabilities"]
    best = {name: max(range(10), key=row.__getitem__) for name, row in rows.items()}
    [(most, _)] = Counter(best.values()).most_common(1)
    return (run / "golden" / next(name for name, label in best.items() if label == most)).read_bytes()


def options(run: Path, watch: str) -> list[str]:
    """Enough evidence within seconds, and a p99 that other work on this machine does not decide."""
    quick = ["--rate", "20", "--canary", "100%", "--min-compared", "5", "--max-p99-ratio", "100"]
    return ["--images", str(run / "golden"), "--watch", watch, *quick]


def watching(server: TorchServe, version: str) -> bool:
    """Whether the rollout is past the new version's registration."""
    if version not in server.versions(MODEL):
        return False
    return any(worker["status"] == "READY" for worker in server.describe(MODEL, version)["workers"])


def after_a_restart(store: Path, run_dir: Path) -> str:
    """The version that a fresh start serves."""
    with started(run_dir, store) as server:
        return str(server.client().describe(MODEL)["modelVersion"])


@contextmanager
def killed_at_last(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that would go on for minutes, while the block runs."""
    with signals_of_a_terminal():
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_good_version_is_promoted_also_after_a_kill(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, digit: bytes, tmp_path: Path, number: int
) -> None:
    """Ended while it watches, it leaves the old one serving; the next promotes, for a restart too; no request fails."""
    archive, new = packed(store, tmp_path)
    old = server.describe(MODEL)["modelVersion"]
    with killed_at_last(command_line(rolling, "rollout", MODEL, archive, *options(run, "10m"))) as first:
        wait_for(lambda: watching(server, new), "the new version", 120)
        for second in ((archive, *options(run, "10m")), ("--abort",)):
            refused = command(rolling, "rollout", MODEL, *second)
            assert (refused.returncode, refused.stderr) == (1, f"error: another rollout of {MODEL} is under way\n")
        assert watching(server, new)
        first.send_signal(number)
        _, complaint = first.communicate(timeout=60)
    assert server.describe(MODEL)["modelVersion"] == old
    assert set(server.versions(MODEL)) == ({old, new} if number == signal.SIGKILL else {old})
    if number != signal.SIGKILL:
        assert (first.returncode, complaint.splitlines()[-1]) == (130, b"interrupted")
        assert f"{archive} was rolled back and {old} serves on".encode() in complaint
        return
    place = ("--model-store", store)
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(command, rolling, "rollout", MODEL, archive, *options(run, "8s"), *place, "--json")
        while not again.done():
            assert len(server.predict(MODEL, digit)) == 5
    finished = again.result()
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    document = json.loads(finished.stdout)
    assert (document["promoted"], document["disagreements"], document["new"]["errors"]) == (True, 0, 0)
    assert document["new"]["requests"] == document["old"]["requests"] >= 5
    assert server.versions(MODEL) == [new]
    assert not (store / archive).exists()
    assert layouts.find_archive(server, MODEL, store) == store / f"{MODEL}.mar"
    assert after_a_restart(store, tmp_path / "restart") == new
    shutil.copy(store / f"{MODEL}.mar", store / archive)
    refused = command(rolling, "rollout", MODEL, archive, *options(run, "4s"))
    (store / archive).unlink()
    assert f"serves {new} by default already" in refused.stderr
    assert server.versions(MODEL) == [new]


@pytest.mark.slow
def test_a_version_that_answers_otherwise_is_rolled_back(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, tmp_path: Path
) -> None:
    """Two labels swapped: before the time is over it is removed, the reason said; a restart serves the old version."""
    archive, new = packed(store, tmp_path, swap_two_labels)
    old = server.describe(MODEL)["modelVersion"]
    place = ("--model-store", store)
    finished = command(rolling, "rollout", MODEL, archive, *options(run, "30s"), *place, "--max-disagreement", "1%")
    assert finished.returncode == 1
    assert re.search(rf"error: {MODEL} {new} was rolled back and {old} serves on: .*another class for", finished.stderr)
    assert re.search(rf"^ *{re.escape(new)} +\d+ +0 +[\d.]+ +[\d.]+ +\d+ *$", finished.stdout, flags=re.MULTILINE)
    assert server.versions(MODEL) == [old]
    assert (store / archive).exists()
    assert after_a_restart(store, tmp_path / "restart") == old


@pytest.mark.slow
def test_a_version_that_does_not_load_is_removed(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, tmp_path: Path
) -> None:
    """Its golden answers are others: the worker refuses, and the old version was never touched."""
    archive, _ = packed(store, tmp_path, spoil_golden_answers)
    old = server.describe(MODEL)
    finished = command(rolling, "rollout", MODEL, archive, *options(run, "10s"))
    assert finished.returncode == 1
    why = "a worker ended while it loaded; .*"
    assert re.fullmatch(
        rf"error: {archive} does not load .*{why}; {old['modelVersion']} serves on: .*\n", finished.stderr
    )
    with pytest.raises(NotReady, match=why):
        server.register(archive, model=MODEL)
    assert [worker["pid"] for worker in server.describe(MODEL)["workers"]] == [old["workers"][0]["pid"]]
    assert server.versions(MODEL) == [old["modelVersion"]]


def register_synchronously(server: TorchServe, archive: str) -> None:
    """As TorchServe's own documentation does it."""
    server._manage("POST", f"/models?url={archive}&initial_workers=1&synchronous=true", 300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("register", "waits"), [(TorchServe.register, False), (register_synchronously, True)], ids=["ours", "synchronous"]
)
def test_nobody_waits_while_a_version_loads(
    rolling: RunningServer, server: TorchServe, store: Path, digit: bytes, tmp_path: Path,
    register: Callable[[TorchServe, str], object], waits: bool,
) -> None:  # fmt: skip
    """On no connection a request takes as long as a good part of the loading; TorchServe's own way of waiting for it
    stops every second connection."""
    archive, new = packed(store, tmp_path)
    headers = {"Authorization": f"Bearer {server.token()}"}
    longest, over = [], threading.Event()

    def ask() -> None:
        address = urlsplit(rolling.inference_url)
        with closing(HTTPConnection(str(address.hostname), address.port, timeout=300)) as connection:
            while not over.wait(0.05):
                began = time.monotonic()
                connection.request("POST", f"/predictions/{MODEL}", digit, headers)
                answer = connection.getresponse()
                assert (answer.status, bool(answer.read())) == (200, True)
                longest.append(time.monotonic() - began)

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        try:
            wait_for(lambda: len(longest) > 60, "answers")
            longest.clear()
            began = time.monotonic()
            register(server, archive)
            took = time.monotonic() - began
        finally:
            over.set()
        assert [future.result() for future in asking] == [None] * 6
    server.unregister(MODEL, new)
    assert (max(longest) > 0.8 * took) == waits, (max(longest), took)


@pytest.fixture(scope="module")
def edge(rolling: RunningServer, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEdge]:
    """The nginx of deploy/nginx before that server."""
    port = free_ports()
    folder = lone(tmp_path_factory.mktemp("edge") / "edge", port, rolling, run / "golden")
    with running(folder, port) as edge:
        yield edge


def lone(folder: Path, port: int, server: RunningServer, golden: Path) -> Path:
    """An edge's folder as it is shipped where nobody else can be asked: with patience on a busy machine."""
    return make_folder(folder, port, behind({"a": server}, golden), read_timeout_s=10)


class Users:
    """Real requests through an edge, one after another: which versions answered since when, and what failed."""

    def __init__(self, edge: RunningEdge, digit: bytes) -> None:
        self.versions: list[str] = []
        self.latest: dict[str, float] = {}
        """When each version answered last."""
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._ask = partial(edge.predict, digit)

    def __enter__(self) -> Users:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            answer = self._ask()
            if answer.ok:
                self.versions.append(answer.headers["x-model-version"])
                self.latest[self.versions[-1]] = time.monotonic()
            else:
                self.failed.append(f"{answer.status_code} {answer.text}")

    def next(self, count: int) -> Counter[str]:
        """Which versions answer the next requests; those on their way when it is called are left out."""
        first = len(self.versions) + 1
        wait_for(lambda: self.failed or len(self.versions) >= first + count, f"{count} answers", 60)
        assert self.failed == []
        return Counter(self.versions[first : first + count])


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize(("change", "promoted"), [(lambda content: None, True), (swap_two_labels, False)])
def test_users_behind_an_edge_get_the_share_and_no_failure(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, digit: bytes, edge: RunningEdge, tmp_path: Path,
    change: Change, promoted: bool,
) -> None:  # fmt: skip
    """While it is compared a third of their requests reach the new version, then all of them or none."""
    archive, new = packed(store, tmp_path, change)
    old = server.describe(MODEL)["modelVersion"]
    canary = edge.folder / "canary.conf"
    watch = "10s" if promoted else "30s"  # of which the share is out for about a quarter
    share = [*options(run, watch), "--canary", "33%", "--edge", canary]
    with Users(edge, digit) as users, ThreadPoolExecutor(1) as pool:
        assert users.next(10) == {old: 10}
        finished = pool.submit(command, rolling, "rollout", MODEL, archive, *share)
        wait_for(lambda: new in users.next(20) or finished.done(), "the share", 120)
        assert 0.1 < users.next(100)[new] / 100 < 0.6
        assert finished.result().returncode == (0 if promoted else 1), finished.result().stderr
        assert users.next(50) == {new if promoted else old: 50}
    assert (f"in its store, mv {archive} {MODEL}.mar\n" in finished.result().stderr) == promoted
    assert users.failed == []
    assert server.versions(MODEL) == [new if promoted else old]
    assert canary.read_text().splitlines()[-3:] == (TEMPLATE / "canary.conf").read_text().splitlines()[-3:]


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize(("change", "promoted"), [(lambda content: None, True), (swap_two_labels, False)])
def test_copies_of_what_users_send_decide(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, edge: RunningEdge, tmp_path: Path,
    change: Change, promoted: bool,
) -> None:  # fmt: skip
    """Two labels swapped, and it is refused by real requests alone; until the verdict the old version answers them."""
    archive, new = packed(store, tmp_path, change)
    old = server.describe(MODEL)["modelVersion"]
    canary = edge.folder / "canary.conf"
    share = ["--mirror", "--edge", canary, "--canary", "50%", "--watch", "5s" if promoted else "60s", "--rate", "20"]
    limits = ["--min-compared", "20", "--max-p99-ratio", "100"]
    with Users(edge, of_a_swapped_class(run)) as users:
        finished = command(rolling, "rollout", MODEL, archive, *share, *limits, "--json")
        assert users.next(10) == {new if promoted else old: 10}
    document = json.loads(finished.stdout)
    assert (finished.returncode, document["promoted"]) == ((0, True) if promoted else (1, False)), finished.stderr
    assert document["new"]["errors"] == 0
    assert (document["disagreements"] == 0) == promoted
    assert document["new"]["requests"] >= 20 if promoted else "another class for 100.0 %" in finished.stderr
    assert users.failed == []
    assert new not in users.versions if not promoted else users.versions.index(new) >= 20
    assert server.versions(MODEL) == [new if promoted else old]
    assert canary.read_text().splitlines()[-3:] == (TEMPLATE / "canary.conf").read_text().splitlines()[-3:]


@pytest.mark.slow
@needs_nginx
def test_users_get_the_old_version_again_after_a_kill(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, digit: bytes, edge: RunningEdge, tmp_path: Path
) -> None:
    """The share stays for twice its lease while the rollout lives, and goes by itself once that is killed."""
    archive, new = packed(store, tmp_path)
    old = server.describe(MODEL)["modelVersion"]
    canary = edge.folder / "canary.conf"
    share = [*options(run, "10m"), "--canary", "33%", "--edge", canary]
    with Users(edge, digit) as users:
        with killed_at_last(command_line(rolling, "rollout", MODEL, archive, *share)):
            wait_for(lambda: new in users.next(20), "the share", 120)
            given = time.monotonic()
            another = command(rolling, "rollout", "another", archive, *share)
            assert another.stderr.startswith("error: another rollout is under way at the edge in ")
            wait_for(lambda: time.monotonic() > given + 2 * LEASE_S, "twice the lease")
            assert set(users.next(50)) == {old, new}
        killed = time.monotonic()
        wait_for(lambda: users.next(50) == {old: 50}, "the old version alone")
        assert users.latest[new] - killed < TAKEN_BACK_WITHIN_S
        assert "error: the share in canary.conf was not renewed for 5 s" in edge.said
        assert set(server.versions(MODEL)) == {old, new}
        aborted = command(rolling, "rollout", MODEL, "--abort", "--edge", canary)
        assert aborted.stdout == f"{MODEL} {old} serves on; removed {new}\n"
        assert users.next(50) == {old: 50}
    assert users.failed == []


@pytest.mark.slow
def test_from_another_machine_a_registered_version_is_respected(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no lock can be seen, what is beside the default may be another rollout's: refused until --abort."""
    archive, new = packed(store, tmp_path)
    other, _ = packed(store, tmp_path)
    old = server.describe(MODEL)["modelVersion"]
    tokens = Tokens(rolling.key_file, {})
    for kind, variable in VARIABLES.items():
        monkeypatch.setenv(variable, tokens.token(kind).value)
    here = [sys.executable, "-m", "operate", "--url", rolling.inference_url, "--key-file", str(tmp_path / "none.json")]

    def there(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*here, "rollout", MODEL, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
        )

    server.register(archive, model=MODEL)
    for candidate in (archive, other):
        refused = there(candidate, *options(run, "4s"))
        assert refused.returncode == 1
        assert re.fullmatch(
            rf"error: {MODEL} {new} is beside {old}, and another rollout may .* --abort\n", refused.stderr
        )
        assert set(server.versions(MODEL)) == {old, new}
    assert there("--abort").stdout == f"{MODEL} {old} serves on; removed {new}\n"
    finished = there(other, *options(run, "4s"))
    assert finished.returncode == 0, finished.stderr


def states(server: Server, looks: int) -> set[State]:
    """Of so many looks, of which each asks for the next golden image."""
    return {server.look().state for _ in range(looks)}


@pytest.mark.slow
def test_an_edge_takes_the_golden_answers_of_either_version(
    rolling: RunningServer, server: TorchServe, store: Path, tmp_path: Path
) -> None:
    """Those of the archive from before while the server gives them, then those of the new one, and never back."""
    archive, new = packed(store, tmp_path, swap_two_labels)
    old = server.describe(MODEL)["modelVersion"]
    golden = GoldenFile(Path(shutil.copy(store / f"{MODEL}.mar", tmp_path / "served.mar")))
    looks = len(golden.images)
    entry = ServerEntry(
        name="a", url=rolling.inference_url, management_url=rolling.management_url, key_file=rolling.key_file
    )
    behind_edge = Server(entry, tmp_path, {MODEL: golden})
    server.register(archive, model=MODEL)
    assert states(behind_edge, looks) == {"ready"}
    server.set_default(MODEL, new)
    assert "out" in states(behind_edge, looks)
    server.set_default(MODEL, old)
    Path(shutil.copy(store / archive, tmp_path / "next.mar")).replace(golden.place)
    golden.refresh()
    assert states(behind_edge, looks) == {"ready"}
    server.set_default(MODEL, new)
    assert states(behind_edge, looks) == {"ready"}
    server.set_default(MODEL, old)
    assert "out" in states(behind_edge, looks)


@pytest.mark.slow
@needs_nginx
def test_an_edge_needs_no_restart_after_a_promotion(
    rolling: RunningServer, server: TorchServe, store: Path, run: Path, digit: bytes, edge: RunningEdge, tmp_path: Path
) -> None:
    """It asks for the golden images of NAME.mar, which the promotion replaces; an edge with the old ones is out."""
    port = free_ports()
    folder = lone(tmp_path / "edge", port, rolling, store / f"{MODEL}.mar")
    place = ("--model-store", store, "--max-disagreement", "100%")
    old = server.describe(MODEL)["modelVersion"]
    with running(folder, port) as following, Users(following, digit) as users:
        for stays in (False, True):
            archive, new = packed(store, tmp_path, swap_two_labels)
            promoted = command(rolling, "rollout", MODEL, archive, *options(run, "4s"), *place)
            assert promoted.returncode == 0, promoted.stderr
            assert users.next(100) == {new: 100}
            wait_for(lambda stays=stays: edge.ready() == stays, "the edge with the first golden images")
    assert users.failed == []
    assert old in users.versions
    assert "out of service" not in following.said
    assert "a: out of service" in edge.said


SEVEN = [{"7": 0.9, "1": 0.1}]
GOOD, OTHER, SLOW = Answer(SEVEN, 10.0), Answer([{"1": 0.5, "7": 0.5}], 10.0), Answer(SEVEN, 40.0)
FAILED = Answer((), 10.0, "500 InternalServerException: Worker died.")


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([(GOOD, GOOD)] * 100, None),
        ([(GOOD, GOOD)] * 99, "only 99 requests to compare, 100 are evidence"),
        ([(FAILED, FAILED)] * 100, "only 0 requests"),
        ([(FAILED, FAILED), *[(GOOD, GOOD)] * 100], None),
        ([(GOOD, FAILED), *[(GOOD, GOOD)] * 99], "1 errors against 0 in 100 requests (500 InternalServerException"),
        ([(FAILED, GOOD), *[(GOOD, GOOD)] * 100], None),
        ([*[(GOOD, OTHER)] * 5, *[(GOOD, GOOD)] * 95], None),
        ([*[(GOOD, OTHER)] * 6, *[(GOOD, GOOD)] * 94], "another class for 6.0 % of the requests"),
        ([(GOOD, SLOW), *[(GOOD, GOOD)] * 99], None),
        ([*[(GOOD, SLOW)] * 2, *[(GOOD, GOOD)] * 98], "p99 40.0 ms against 10.0, 20.0 are allowed"),
        ([*[(GOOD, Answer(SEVEN, 19.0))] * 2, *[(GOOD, GOOD)] * 98], None),
    ],
)
def test_each_limit_is_kept(pairs: list[tuple[Answer, Answer]], reason: str | None) -> None:
    """Errors, classes, p99 and evidence: at the limit it may stay, one more and it goes with a reason."""
    comparison = compared(pairs)
    reasons = comparison.reasons(Limits())
    assert bool(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_a_rollout_is_lost_when_nothing_can_save_it() -> None:
    """Not while the images to come could still make up for it."""
    limits = Limits(errors=0.02)
    for pair in ((GOOD, FAILED), (GOOD, OTHER)):
        most = 2 if pair[1] is FAILED else 5
        assert not compared([pair] * most).is_lost(limits)
        assert compared([pair] * (most + 1)).is_lost(limits)
    assert not compared([(FAILED, FAILED)] * 50).is_lost(limits)


def compared(pairs: list[tuple[Answer, Answer]]) -> Comparison:
    comparison = Comparison(planned=100)
    for pair in pairs:
        comparison.add(*pair)
    return comparison


def test_a_plan_sends_the_new_version_its_share() -> None:
    """All images equally often, exactly the share of them twice, in an order that the seed repeats."""
    images = [Source(f"{number}.png") for number in range(7)]
    plan = Plan(images, watch_s=10, rate=14, share=0.25)
    turns = plan.turns()
    assert turns == plan.turns()
    assert turns != Plan(images, watch_s=10, rate=14, share=0.25, seed=1).turns()
    assert Counter(source.name for source, _ in turns) == {source.name: 20 for source in images}
    assert sum(twice for _, twice in turns) == plan.compared == 35


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name NEW.mar and --images, or --mirror with --edge"),
        (["new.mar"], "name NEW.mar and --images"),
        (["new.mar", "--mirror"], "--mirror with --edge"),
        (["new.mar", "--mirror", "--images", "{folder}"], "--images, or --mirror"),
        (["new.mar", "--images", "{folder}", "--canary", "10"], "--canary: expected a percentage such as 10%"),
        (["new.mar", "--images", "{folder}", "--watch", "5"], "--watch: expected a time such as 30s, 5m or 1h"),
        (["new.mar", "--images", "{folder}", "--watch", "5s"], "5 requests would be compared and 100 are evidence"),
        ([f"{MODEL}.mar", "--images", "{folder}", "--model-store", "."], "is what the server's next start takes"),
        (["new.mar", "--images", "{folder}", "--model-store", "{folder}"], "new.mar is not there: name the server's"),
        (["new.mar", "--images", "{folder}", "--edge", "{folder}/nowhere"], "is not the canary.conf of an edge"),
    ],
)
def test_what_cannot_be_rolled_out_is_said_first(run: Path, arguments: list[str], complaint: str) -> None:
    """Before any server is asked, in one line."""
    folder = str(run / "golden")
    filled = [argument.replace("{folder}", folder) for argument in arguments]
    refused = CliRunner().invoke(app, ["--url", "http://127.0.0.1:9", "rollout", MODEL, *filled])
    assert refused.exit_code == 1
    assert re.fullmatch(rf"error: .*{re.escape(complaint)}.*\n", refused.stderr)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        (
            {"model": {"modelName": "another", "modelVersion": "1.0"}},
            f"is the model another, and as {MODEL}.mar no start serves it",
        ),
        ({"model": {}}, "names no model and version"),
        ({"model": {"modelName": MODEL, "modelVersion": "1.0"}}, "cannot read the tokens"),
    ],
)
def test_the_archive_is_one_of_the_model(tmp_path: Path, run: Path, manifest: object, complaint: str) -> None:
    """What would take the name NAME.mar is looked into before any server is asked; one of the model goes on."""
    with zipfile.ZipFile(tmp_path / "new.mar", "w") as archive:
        archive.writestr(MARK, json.dumps(manifest))
    place = ["--images", str(run / "golden"), "--min-compared", "1", "--model-store", str(tmp_path)]
    missing = ["--url", "http://127.0.0.1:9", "--key-file", str(tmp_path / "none.json")]
    refused = CliRunner().invoke(app, [*missing, "rollout", MODEL, "new.mar", *place])
    assert refused.exit_code == 1
    assert re.fullmatch(rf"error: .*{re.escape(complaint)}.*\n", refused.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["new.mar"]


class FullDisk:
    """An edge whose share cannot be changed any more."""

    def withdraw(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("end", [Rollout.promote, Rollout.withdraw])
def test_what_the_file_system_refuses_is_told_with_the_way_on(
    tmp_path: Path, end: Callable[[Rollout, float], None]
) -> None:
    """Whichever version is the default by then, nobody reads that the new one was rolled back: --abort clears up."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.answer([{"modelVersion": "1.0", "workers": []}])

        def do_PUT(self) -> None:
            self.answer({"status": "set"})

    tokens = key_file(tmp_path, management={"key": "m"})
    with listening(Handler) as url:
        rollout = Rollout(TorchServe(url, url, tokens), MODEL, cast("EdgeShare", FullDisk()))
        with pytest.raises(RolloutRefused, match=rf"No space left on device; .*rollout {MODEL} --abort removes it"):
            end(rollout, 0)


NGINX = """
pid run/nginx.pid;
error_log logs/error.log;
events {}
http {
    access_log off;
    include canary.conf;
    server {
        listen 127.0.0.1:PORT;
        location / { return 200 "$canary_model $canary_version"; }
    }
}
"""


@pytest.mark.server
@needs_nginx
def test_an_edge_gives_the_share_and_takes_it_back(tmp_path: Path) -> None:
    """A real nginx sends about the share to the new version, then none; a name that is configuration is refused."""
    port = free_ports()
    file = tmp_path / "canary.conf"
    file.write_text('map "" $canary_model { default ""; }\nmap "" $canary_version { default ""; }\n')
    (tmp_path / "nginx.conf").write_text(NGINX.replace("PORT", str(port)))
    with pytest.raises(EdgeUnusable, match="python -m operate edge"):
        EdgeShare(file)
    nginx = Nginx(tmp_path)
    nginx.start()
    try:
        with locks.held(nginx.watch_lock, ClientError()):
            edge = EdgeShare(file)
        edge.give(MODEL, "2.0", 0.25)
        shares = asked(port)
        assert set(shares) == {f"{MODEL} 2.0", f"{MODEL} "}
        assert 60 < shares[f"{MODEL} 2.0"] < 140
        with pytest.raises(EdgeUnusable):
            edge.give(MODEL, '2.0"; } evil', 0.25)
        edge.withdraw()
        assert set(asked(port)) == {" "}
        assert sorted(path.name for path in tmp_path.glob("*.conf*")) == ["canary.conf", "nginx.conf"]
    finally:
        nginx.stop()


def asked(port: int) -> Counter[str]:
    """What 400 requests were told."""
    with requests.Session() as session:
        session.trust_env = False
        return Counter(session.get(f"http://127.0.0.1:{port}/", timeout=10).text for _ in range(400))
