"""One request can be followed: by its id and trace, by a line with the time of each stage, and by `operate slow`."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from handler.arrival import Arrival
from operate import slow
from operate.errors import NoLogs
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT, run_module, wait_for
from tests.worker import ask, load, make_context

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TORCHSERVE_ID = "6f0c5a52-9c3e-4f57-8a39-0d8f0c6f9a11"


def test_id_and_trace_are_taken() -> None:
    """The client's, and a later version of the header is read as far as it is known."""
    arrival = Arrival.of({"x-request-id": "camera-1/42", "traceparent": TRACEPARENT}, TORCHSERVE_ID)
    assert (arrival.request_id, arrival.engine_id) == ("camera-1/42", TORCHSERVE_ID)
    assert (arrival.trace_id, arrival.parent_id, arrival.sampled) == (TRACE, PARENT, True)
    assert re.fullmatch(f"00-{TRACE}-(?!{PARENT})[0-9a-f]{{16}}-01", arrival.traceresponse)
    later = Arrival.of({"traceparent": f"cc-{TRACE}-{PARENT}-00-more"})
    assert (later.trace_id, later.sampled) == (TRACE, False)


@pytest.mark.parametrize(
    "broken",
    ["", "a" * 10_000, "two words", "a\nb", "a\r\nx: y", "café", '"', "\x00", "٣", {"content-type": "image/png"}],
)
def test_a_broken_id_is_replaced_by_torchserves(broken: object) -> None:
    arrival = Arrival.of({"x-request-id": broken}, TORCHSERVE_ID)
    assert arrival.request_id == TORCHSERVE_ID
    assert arrival.trace_id == TORCHSERVE_ID.replace("-", "")


@pytest.mark.parametrize(
    "broken",
    [
        "", "00", TRACEPARENT.upper(), TRACEPARENT + "-more", TRACEPARENT + "\n", f" {TRACEPARENT}",
        f"ff{TRACEPARENT[2:]}",
        f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{PARENT}-1", TRACEPARENT[:-3],
        f"cc-{TRACE}-{PARENT}-00more", f"cc-{TRACE}-{PARENT}-00-{'m' * 10_000}", {"content-type": "text/plain"},
    ],
)  # fmt: skip
def test_a_broken_traceparent_begins_a_new_trace(broken: object) -> None:
    """Of its own id, and another one for each request that has no UUID."""
    first, second = (Arrival.of({"x-request-id": "mine", "traceparent": broken}) for _ in range(2))
    assert first.parent_id is None
    assert re.fullmatch("[0-9a-f]{32}", first.trace_id)
    assert len({TRACE, first.trace_id, second.trace_id}) == 3


@pytest.fixture(scope="module")
def worker_of(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The handler in this process with other settings."""

    def with_settings(**settings: object) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("model")
        for name in ("model.pt", "index_to_name.json", "golden"):
            (folder / name).symlink_to(run / name)
        config = yaml.safe_load((run / "model-config.yaml").read_text())
        config["handler"] |= settings
        (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
        return load(folder), folder

    return with_settings


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    found = [json.loads(message[8:]) for message in caplog.messages if message.startswith("request {")]
    caplog.clear()
    return found


def test_a_slow_request_leaves_a_line(worker_of: Any, digit: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Of a batch each that took long from the edge on; none where none is asked for, and all with 0."""
    caplog.set_level(logging.INFO)
    classifier, folder = worker_of(log_slower_s=30.0, max_wait_s=100)
    late = {"X-Request-ID": "late", "X-Request-Start": f"t={time.time() - 40:.3f}", "X-Edge-Time": "1.500"}
    skewed = {"X-Request-Start": f"t={time.time() + 40:.3f}", "X-Edge-Time": "soon"}
    bodies, headers = [digit, b"", digit], {0: late, 2: skewed}
    ask(classifier, folder, bodies, headers)
    [line] = lines_of(caplog)
    assert (line["id"], line["status"], line["images"], line["batch"]) == ("late", 200, 1, 3)
    assert line["edge_s"] == 1.5
    assert 40 <= line["queue_s"] < 60
    assert all(0 <= line[f"{stage}_s"] < 30 for stage in ("decode", "forward", "answer"))
    for log_slower_s, expected in ((None, []), (0.0, [200, 400, 200])):
        other, _ = worker_of(log_slower_s=log_slower_s, max_wait_s=100)
        ask(other, folder, bodies, headers)
        assert [line["status"] for line in lines_of(caplog)] == expected


def test_a_line_has_a_bounded_length(worker_of: Any, digit: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the headers hold, and what they hold never breaks it."""
    caplog.set_level(logging.INFO)
    classifier, folder = worker_of(log_slower_s=0.0)
    for value in ("a" * 128, "a" * 10_000, "a\nrequest {}", '"}'):
        ask(classifier, folder, [digit], {0: {"X-Request-ID": value, "traceparent": value, "X-Edge-Time": value}})
        [message] = [message for message in caplog.messages if message.startswith("request ")]
        assert len(message) < 600
        assert len(lines_of(caplog)) == 1


def test_an_explanation_counts_as_its_answer(run: Path, digit: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The requests of its batch that are answered before it are not charged with it."""
    caplog.set_level(logging.INFO)
    classifier = load(run)
    classifier.trail._log_slower_s = 0.0
    context = make_context(run, 1)
    context.request_processor[0].get_request_properties()["explain"] = "True"
    classifier.handle([{"body": digit}], context)
    [line] = lines_of(caplog)
    assert line["status"] == 200
    assert line["answer_s"] > line["forward_s"]


def test_through_torchserve(torchserve: RunningServer, session: requests.Session, digit: bytes) -> None:
    """A request that waited is listed by its id, with the stages; one that did not leaves no line."""
    url = f"{torchserve.inference_url}/predictions/{MODEL}"
    headers = {
        "X-Request-ID": "followed-1", "traceparent": TRACEPARENT,
        "X-Request-Start": f"t={time.time() - 2:.3f}", "X-Edge-Time": "0.250",
    }  # fmt: skip
    answer = session.post(url, data=digit, headers=headers, timeout=30)
    quick = session.post(url, data=digit, headers={"X-Request-ID": "followed-2"}, timeout=30)
    assert answer.ok
    assert quick.ok
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    found: list[slow.Slow] = []

    def is_listed() -> bool:
        found[:] = slow.find([torchserve.key_file.parent], time.time() - 60)
        return any(request.id == "followed-1" for request in found)

    wait_for(is_listed, "the slow request is listed")
    [request] = [request for request in found if request.id == "followed-1"]
    assert request.trace == TRACE
    assert request.edge == 0.25
    assert request.queue is not None
    assert 2 <= request.queue <= request.total
    assert not any(request.id == "followed-2" for request in found)
    logs = torchserve.key_file.parent / "logs"
    assert "followed" not in (logs / "model_log.log").read_text() + (logs / "console.log").read_text()
    lines = (logs / "requests.log").read_text().splitlines()
    assert answer.headers["x-request-id"] in [json.loads(line.removeprefix("request "))["engine_id"] for line in lines]


def test_no_header_keeps_torchserve_from_answering(
    torchserve: RunningServer, session: requests.Session, digit: bytes
) -> None:
    """A folded id, one that is no UTF-8, and one of 7 kB, beside the limit of TorchServe itself."""
    host, port = torchserve.inference_url.removeprefix("http://").split(":")
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(digit)}\r\n"
    head += f"Authorization: {session.headers['Authorization']!s}\r\nX-Request-ID: "
    for value in (b"a\r\n b", b"\xff\xfe", b"a" * 7000):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head.encode() + value + b"\r\ntraceparent: " + value[:100] + b"\r\n\r\n" + digit)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            answer.read()
        assert answer.status == 200, value
        assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", answer.headers["traceresponse"])


def line(id: str, time: float, **more: object) -> str:  # noqa: A002
    common = {
        "engine_id": "t",
        "trace": TRACE,
        "model": "m",
        "version": "1",
        "status": 200,
        "images": 1,
        "batch": 1,
    }
    stages = {"decode_s": 0.01, "forward_s": 0.02, "answer_s": 0.001}
    return "request " + json.dumps({"time": time, "id": id, **common, **stages, **more}) + "\n"


def edge_line(id: str, time: float, total_s: float, servers_s: str) -> str:  # noqa: A002
    document = {"trace": f"00-{TRACE}-{PARENT}-00", "client": "c", "path": "/predictions/m", "status": 504}
    return json.dumps({"time": time, "id": id, "total_s": total_s, "servers_s": servers_s, **document}) + "\n"


def test_edge_and_worker_tell_of_one_request(tmp_path: Path) -> None:
    """By its id and moment, as ids may come again; older lines, older files and spoilt lines are left out."""
    logs, edge_logs = tmp_path / "server" / "logs", tmp_path / "edge" / "logs"
    for folder in (logs, edge_logs):
        folder.mkdir(parents=True)
    (logs / "requests.log").write_text(
        line("twice", 1000.0, edge_s=0.1, queue_s=0.5)
        + line("twice", 2000.0)
        + '{"time": 1'
        + '\n[]\n{"id": 1}\n\xff\n'
    )
    with gzip.open(logs / "requests.1.log.gz", "wt") as older:
        older.write(line("older", 990.0) + line("oldest", 10.0))
    with gzip.open(logs / "requests.2.log.gz", "wt") as unread:
        unread.write(line("unread", 995.0))
    (edge_logs / "access.log").write_text(
        edge_line("twice", 1000.1, 0.8, "0.500, 0.200 : 0.010") + edge_line("unanswered", 1500.0, 10.0, "-")
    )
    found = {
        (request.id, request.ended): request for request in slow.find([tmp_path / "server", tmp_path / "edge"], 900)
    }
    assert set(found) == {("twice", 1000.1), ("twice", 2000.0), ("unanswered", 1500.0), ("older", 990.0)}
    joined = found["twice", 1000.1]
    stages = (joined.edge, joined.queue, joined.decode, joined.forward, joined.answer)
    assert stages == pytest.approx((0.09, 0.5, 0.01, 0.02, 0.18))
    assert (joined.total, joined.status, joined.model) == (0.8, 504, "m")
    assert (found["unanswered", 1500.0].queue, found["unanswered", 1500.0].trace) == (None, TRACE)
    assert found["twice", 2000.0].total == pytest.approx(0.031)


@pytest.mark.process
def test_the_command_lists_the_slowest_first(tmp_path: Path) -> None:
    """As a table and as JSON; a folder without logs is an error in one line."""
    (tmp_path / "logs").mkdir()
    now = time.time()
    (tmp_path / "logs" / "requests.log").write_text(line("quick", now) + line("slow", now, queue_s=0.7, edge_s=0.0))
    shown = run_module("operate", "slow", tmp_path).stdout.splitlines()
    assert [row.split()[-1] for row in shown] == ["id", "slow", "quick"]
    assert shown[1].split()[:6] == ["731.0", "0.0", "700.0", "10.0", "20.0", "1.0"]
    assert json.loads(run_module("operate", "slow", tmp_path, "--json", "--most", 1).stdout)[0]["id"] == "slow"
    with pytest.raises(NoLogs, match="run directory"):
        slow.find([ROOT / "docs"], 0)
