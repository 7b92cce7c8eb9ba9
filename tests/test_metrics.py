"""What the worker tells TorchServe about its batches, read as TorchServe reads it."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import ts
import yaml
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import metrics
from handler.drift import InvalidReference, Reference
from handler.errors import ImageTooLarge, InvalidRequest, RequestError, UnsupportedImage
from handler.identity import Identity
from handler.image_classifier import ImageClassifier, declared_metrics
from handler.metrics import Metrics
from handler.request import Answer, Request
from server.config import ServerConfig
from server.errors import ConfigError
from tests.conftest import CONFIG, MODEL, ROOT
from tests.images import BAD
from tests.worker import make_context

METRICS_FILE = ROOT / "config" / "metrics.yaml"
SHIPPED = Path(ts.__file__).parent / "configs" / "metrics.yaml"

PIXELS = torch.zeros(1, 2, 2)

Series = dict[str, dict[tuple[str, ...], list[float]]]


def cache_of(file: Path) -> MetricsCacheYamlImpl:
    """TorchServe's own cache of metrics, as a worker makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file to be closed by Python
        cache = MetricsCacheYamlImpl(str(file))
    cache.initialize_cache()
    return cache


def told(caplog: pytest.LogCaptureFixture) -> Series:
    """Metric → values of its dimensions after model and version → the values told, read as TorchServe reads them."""
    series: Series = defaultdict(lambda: defaultdict(list))
    for message in caplog.messages:
        if not message.startswith("[METRICS]"):
            continue
        line = re.fullmatch(r"\[METRICS\](\w+)\.\w+:([-.e\d]+)\|#([^|]*)\|#type:\w+\|#hostname:[^,]+,\d+", message)
        assert line, message
        pairs = [pair.split(":") for pair in line[3].split(",")]
        assert all(len(pair) == 2 and all(pair) for pair in pairs), message
        series[line[1]][tuple(value for _, value in pairs[2:])].append(float(line[2]))
    return series


def sums(values: dict[tuple[str, ...], list[float]]) -> dict[str, float]:
    return {dimensions[0]: sum(counts) for dimensions, counts in values.items()}


@pytest.fixture(autouse=True)
def listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ts.metrics.caching_metric")


def gather(names: list[str], reference: Reference | None = None, interval_s: float = 3600) -> Metrics:
    return Metrics(declared_metrics(cache_of(METRICS_FILE)), MODEL, "1.0", names, reference, interval_s)


def answered(*images: torch.Tensor | RequestError, refusal: RequestError | None = None) -> Answer:
    """To a form; a label answers each image that is not refused."""
    request = Request(list(images), top_k=5, protocol="form", refusal=refusal)
    return request.answer([{"a": 1.0}] * len(request.tensors), Identity(MODEL, "1.0", "0" * 12))


def image() -> Answer:
    return answered(PIXELS)


def sure(indices: list[int], classes: int, confidence: float = 0.95) -> torch.Tensor:
    """float32[N,K] whose best classes are `indices`."""
    probabilities = torch.full((len(indices), classes), (1 - confidence) / (classes - 1))
    probabilities[torch.arange(len(indices)), torch.tensor(indices, dtype=torch.long)] = confidence
    return probabilities


def batch(gathered: Metrics, answers: list[Answer], probabilities: torch.Tensor) -> None:
    started = time.perf_counter() - 0.030
    gathered.batch(answers, probabilities, started, started + 0.010, started + 0.025)


def test_batches_are_told_together(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is told before the interval is over; then one line a count, and nothing twice."""
    gathered = gather(["a", "b", "c"])
    for _ in range(3):
        batch(gathered, [image(), image()], sure([0, 2], 3))
    assert not told(caplog)
    gathered.flush()
    series = told(caplog)
    assert series["classifier_batches_total"] == {(): [3]}
    assert series["classifier_requests_total"] == {(): [6]}
    assert series["classifier_predictions_total"] == {("a",): [3], ("c",): [3]}
    assert series["classifier_confidence_mean"] == {(): [pytest.approx(0.95)]}
    gathered.flush()
    assert told(caplog)["classifier_batches_total"] == {(): [3]}
    batch(gathered, [image()], sure([1], 3))
    gathered.flush()
    assert sums(told(caplog)["classifier_predictions_total"]) == {"a": 3, "b": 1, "c": 3}


def test_refusals_are_counted_by_code(caplog: pytest.LogCaptureFixture) -> None:
    """One for a request that is refused as a whole, and one for each refused image of the others."""
    gathered = gather(["a", "b"])
    damaged, large, foreign = InvalidRequest("damaged"), ImageTooLarge("large"), UnsupportedImage("foreign")
    whole = [answered(refusal, refusal=refusal) for refusal in (damaged, large, large)]
    too_many = answered(PIXELS, foreign, refusal=damaged)
    batch(gathered, [*whole, too_many], torch.empty(0, 2))
    batch(gathered, [answered(PIXELS, foreign, foreign)], sure([0], 2))
    gathered.flush()
    assert sums(told(caplog)["classifier_refusals_total"]) == {"400": 2, "413": 2, "415": 2}
    assert sums(told(caplog)["classifier_predictions_total"]) == {"a": 1}


def test_times_are_histograms_and_quantiles(caplog: pytest.LogCaptureFixture) -> None:
    """Each batch is observed while there are few, a sample where there are many, and the quantiles are of all."""
    gathered = gather(["a", "b"])
    for _ in range(5):
        batch(gathered, [image()], sure([0], 2))
    gathered.flush()
    observed = told(caplog)["classifier_stage_seconds"]
    assert observed["decode",] == [pytest.approx(0.010, abs=1e-5)] * 5
    assert observed["forward",] == [pytest.approx(0.015, abs=1e-5)] * 5
    assert all(0.030 <= seconds < 1 for seconds in observed["total",])
    caplog.clear()
    decode_s = np.linspace(0.001, 0.5, 300)
    for seconds in decode_s:
        now = time.perf_counter()
        gathered.batch([image()], sure([0], 2), now - seconds, now, now)
    gathered.flush()
    series = told(caplog)
    assert len(series["classifier_stage_seconds"]["decode",]) == metrics.OBSERVED_BATCHES
    assert len(set(series["classifier_stage_seconds"]["decode",])) > metrics.OBSERVED_BATCHES / 2
    everything = [0.010] * 5 + decode_s.tolist()
    for quantile in metrics.QUANTILES:
        [value] = series["classifier_stage_quantile_seconds"]["decode", str(quantile)]
        assert value == pytest.approx(np.quantile(everything, quantile), abs=1e-4)


def test_classes_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Of a thousand classes the twenty that training met most often have their own series, the rest share one."""
    names = [f"class {index}" for index in range(1000)]
    often = list(range(500, 520))
    reference = Reference.measure(sure([*often, *often, *range(100)], 1000), names)
    gathered = gather(names, reference)
    batch(gathered, [image()] * 1000, sure(list(range(1000)), 1000))
    gathered.flush()
    counted = sums(told(caplog)["classifier_predictions_total"])
    assert counted == {f"class {index}": 1 for index in often} | {"other": 980}
    assert metrics.class_groups(names, None) == [*names[:20], *["other"] * 980]
    assert metrics.class_groups(names[:20], None) == names[:20]


@pytest.mark.parametrize("name", ["tench, Tinca tinca", "a:b", "a|b", "two\nlines", "tab\there", "para\u2029graph", ""])
def test_any_class_name_can_be_read_back(caplog: pytest.LogCaptureFixture, name: str) -> None:
    """What TorchServe splits its lines at does not lose a count."""
    gathered = gather([name, "Äpfel und Birnen"])
    batch(gathered, [image(), image()], sure([0, 1], 2))
    gathered.flush()
    counted = sums(told(caplog)["classifier_predictions_total"])
    assert set(counted.values()) == {1}
    assert "Äpfel und Birnen" in counted
    assert len(counted) == 2


def test_drift_is_small_for_the_same_and_large_for_other_answers(caplog: pytest.LogCaptureFixture) -> None:
    """Both indices tell a shift from none, forget what left the window, and say nothing of under 200 answers."""
    names = ["a", "b", "c"]
    usual = torch.cat([sure([0] * 70 + [1] * 20, 3), sure([2] * 10, 3, confidence=0.55)])
    gathered = gather(names, Reference.measure(usual.repeat(5, 1), names))
    shifted = sure([2] * 100, 3, confidence=0.45)

    def drift_after(probabilities: torch.Tensor) -> list[list[float]]:
        caplog.clear()
        batch(gathered, [image()] * len(probabilities), probabilities)
        gathered.flush()
        series = told(caplog)
        return [series[f"classifier_{figure}_psi"][()] for figure in ("confidence", "classes")]

    assert drift_after(usual.repeat(2, 1)[:-1]) == [[], []]
    for [figure] in drift_after(usual[-1:]):
        assert 0 <= figure < 0.02
    for [figure] in drift_after(shifted.repeat(3, 1)):
        assert figure > 0.25
    for [figure] in drift_after(usual.repeat(10, 1)):
        assert 0 <= figure < 0.02


def test_without_a_reference_there_is_no_drift(caplog: pytest.LogCaptureFixture) -> None:
    """All else is told."""
    gathered = gather(["a", "b"])
    batch(gathered, [image()] * 300, sure([0] * 300, 2))
    gathered.flush()
    assert {name for name in told(caplog) if name.endswith("_psi")} == set()
    assert "classifier_confidence_mean" in told(caplog)


def test_answers_that_are_no_numbers_are_told_as_unsure(caplog: pytest.LogCaptureFixture) -> None:
    """TorchServe could not read NaN."""
    gathered = gather(["a", "b"])
    batch(gathered, [image()], torch.full((1, 2), torch.nan))
    gathered.flush()
    assert told(caplog)["classifier_confidence_mean"] == {(): [0]}


def test_the_last_batch_before_a_pause_is_told() -> None:
    """No further batch is needed: the figures come by themselves."""
    arrived = threading.Event()

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "classifier_predictions_total" in record.getMessage():
                arrived.set()

    logger, waiting = logging.getLogger("ts.metrics.caching_metric"), Waiting()
    logger.addHandler(waiting)
    try:
        batch(gather(["a", "b"], interval_s=0.01), [image()], sure([0], 2))
        assert arrived.wait(timeout=10)
        arrived.clear()
        batch(gather(["a", "b"], interval_s=3600), [image()], sure([0], 2))
        assert not arrived.wait(timeout=0.2), "only the interval can have told the first"
    finally:
        logger.removeHandler(waiting)


def test_counting_from_several_threads_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Batches that arrive while figures are told are in the next figures."""
    gathered = gather(["a", "b"])

    def work(index: int) -> None:
        batch(gathered, [image()], sure([0], 2))
        if index % 10 == 0:
            gathered.flush()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    gathered.flush()
    assert sum(told(caplog)["classifier_batches_total"][()]) == 400


def test_a_batch_costs_less_than_its_budget() -> None:
    """All counting and telling of a batch of 8 takes below 0.15 ms a request."""
    names = [str(index) for index in range(1000)]
    gathered = gather(names, Reference.measure(sure(list(range(1000)), 1000), names))
    answers, probabilities = [image()] * 8, sure(list(range(8)), 1000)
    started = time.thread_time()
    for _ in range(100):
        batch(gathered, answers, probabilities)
    gathered.flush()
    assert (time.thread_time() - started) / 800 < 0.00015


def load(model_dir: Path, metrics_file: Path | None) -> ImageClassifier:
    context = make_context(model_dir)
    context.metrics = cache_of(metrics_file) if metrics_file else None
    classifier = ImageClassifier()
    threads = torch.get_num_threads()
    try:
        classifier.initialize(context)
    finally:
        torch.set_num_threads(threads)
    return classifier


def test_the_handler_counts_what_it_answers(caplog: pytest.LogCaptureFixture, run: Path, digit: bytes) -> None:
    """Good and refused requests through the handler itself, and the model that it says it serves."""
    classifier = load(run, METRICS_FILE)
    bodies = [{"body": digit}] * 3 + [{"body": body} for body, _ in BAD.values()]
    classifier.handle(bodies, make_context(run, len(bodies)))
    classifier.metrics.flush()
    series = told(caplog)
    assert series["classifier_requests_total"] == {(): [len(bodies)]}
    assert sum(sums(series["classifier_predictions_total"]).values()) == 3
    codes = Counter(str(code) for _, code in BAD.values())
    assert sums(series["classifier_refusals_total"]) == codes
    digest = hashlib.sha256((run / "model.pt").read_bytes()).hexdigest()[:12]
    assert series["classifier_info"] == {(digest, classifier.variant.name): [1]}
    [[decode], [forward], [total]] = (series["classifier_stage_seconds"][stage,] for stage in metrics.STAGES)
    assert 0 < decode + forward < total < 10


def test_marks_are_counted_and_their_drift_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of 250 answers 125 are accepted where 9 in 10 were: both counts, and the index of the shares; else none."""
    gathered = Metrics(
        declared_metrics(cache_of(METRICS_FILE)), MODEL, "1.0", ["a", "b"], interval_s=3600, accepted=(90, 10)
    )
    for mark in (True, False) * 125:
        answer = Request([PIXELS], top_k=5).answer([{"a": 1.0}], Identity(MODEL, "1.0", "0" * 12), [mark])
        batch(gathered, [answer], sure([0], 2))
    gathered.flush()
    series = told(caplog)
    assert sums(series["classifier_accepted_total"]) == {"true": 125, "false": 125}
    [[index]] = series["classifier_accepted_psi"].values()
    assert index == pytest.approx(0.4 * np.log(5) + 0.4 * np.log(9 / 5), rel=0.1)
    caplog.clear()
    plain = gather(["a", "b"])
    batch(plain, [image()] * 250, sure([0] * 250, 2))
    plain.flush()
    assert not {"classifier_accepted_total", "classifier_accepted_psi"} & told(caplog).keys()


def test_the_archives_digests_name_it(caplog: pytest.LogCaptureFixture, run: Path, tmp_path: Path) -> None:
    """Where the archive lists its members' digests, the model is known by that list."""
    for file in run.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "digests.json").write_text("{}")
    load(tmp_path, METRICS_FILE)
    [(digest, _)] = told(caplog)["classifier_info"]
    assert digest == hashlib.sha256(b"{}").hexdigest()[:12]
    (tmp_path / "reference.json").unlink()
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(InvalidReference, match=r"reference\.json: images: field required"):
        load(tmp_path, METRICS_FILE)


def test_another_list_of_metrics_is_no_reason_to_fail(
    caplog: pytest.LogCaptureFixture, run: Path, digit: bytes
) -> None:
    """With TorchServe's own metrics.yaml the handler answers, says which file is missing, and tells nothing."""
    classifier = load(run, SHIPPED)
    assert "set metrics_config to this project's metrics.yaml" in caplog.text
    assert len(classifier.handle([{"body": digit}], make_context(run, 1))) == 1
    classifier.metrics.flush()
    assert not told(caplog)


def test_our_list_keeps_torchserves_metrics() -> None:
    """All that TorchServe's own file lists is in ours, but for what reads wrong and what no handler of ours gives."""

    def listed(file: Path) -> set[tuple[str, str, str, str, tuple[str, ...]]]:
        document = yaml.safe_load(file.read_text())
        return {
            (section, kind, entry["name"], entry["unit"], tuple(entry["dimensions"]))
            for section in ("ts_metrics", "model_metrics")
            for kind, entries in document[section].items()
            for entry in entries
        }

    missing = listed(SHIPPED) - listed(METRICS_FILE)
    assert {name for _, _, name, _, _ in missing} == {"CPUUtilization", "HandlerTime"}
    ours = {name for names in metrics.DECLARED.values() for name in names}
    assert {name for _, _, name, _, _ in listed(METRICS_FILE) - listed(SHIPPED)} == ours


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_list_is_found_from_the_root_and_from_elsewhere(device: str) -> None:
    """As TorchServe resolves it where the README starts it, and as `server` passes it on."""
    config = ServerConfig.read(CONFIG.with_name(f"config.{device}.properties"))
    [relative] = re.findall(r"^metrics_config=(.+)$", config.text, flags=re.MULTILINE)
    assert ROOT / relative == METRICS_FILE
    assert config.with_absolute_paths().value("metrics_config") == str(METRICS_FILE)


def test_a_list_that_is_not_there_is_named() -> None:
    """TorchServe itself would start and lose every worker."""
    with pytest.raises(ConfigError, match=r"metrics_config=config/none\.yaml: no such file"):
        ServerConfig("metrics_config=config/none.yaml\n").with_absolute_paths()


def test_paths_are_written_as_java_reads_them(tmp_path: Path) -> None:
    """Java's properties know neither UTF-8 nor a plain backslash."""
    file = tmp_path / "Zähler\\x.yaml"
    file.touch()
    text = ServerConfig(f"metrics_config={file}").with_absolute_paths().text
    assert text.splitlines()[-1] == f"metrics_config={tmp_path}/Z\\u00e4hler\\\\x.yaml"
