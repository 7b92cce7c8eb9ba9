"""What Prometheus finds at /metrics of a real TorchServe after good and bad requests."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from client.errors import RequestRefused
from client.torchserve import TorchServe
from dataset import labelled_images
from handler import metrics
from server.launch import RunningServer
from tests.conftest import MODEL
from tests.images import BAD
from tests.observed import of, reached, settled, totals
from train import recipe

EDGES_S = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]


@pytest.mark.slow
def test_prometheus_finds_everything(torchserve: RunningServer, client: TorchServe) -> None:
    """After the held-out images and some bad ones, /metrics has every figure, and each is plausible."""
    chosen = recipe.load(MODEL)
    held_out = labelled_images.load(chosen.data, chosen.handler, chosen.training.seed).test
    bodies = [*list(held_out.encoded) * 3, *(body for body, _ in BAD.values())]

    def ask(body: bytes) -> int:
        try:
            torchserve.client().predict(MODEL, body)
        except RequestRefused as refusal:
            return refusal.status
        return 200

    client.scale(MODEL, 1)  # the window of one worker is filled with these images
    before = settled(torchserve)
    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(ask, bodies))
    assert set(statuses) == {200, 400, 413, 415}
    labels = f'ModelName="{MODEL}",Version="1.0",'
    gains = {
        "classifier_requests_total": len(bodies),
        "classifier_predictions_total": statuses[200],
        "classifier_refusals_total": len(bodies) - statuses[200],
    }
    wanted = {name: totals(before)[name] + gain for name, gain in gains.items()}
    after = reached(torchserve, wanted)

    assert {name: totals(after)[name] for name in wanted} == wanted
    assert 0 < totals(after)["classifier_batches_total"] - totals(before)["classifier_batches_total"] < len(bodies)
    for code in (400, 413, 415):
        refused = [of(series["classifier_refusals_total"], labels, f'Code="{code}"') for series in (before, after)]
        assert sum(refused[1].values()) - sum(refused[0].values()) == statuses[code]
    assert len(of(after["classifier_predictions_total"], labels)) == 10
    infos = of(after["classifier_info"], labels)
    assert set(infos.values()) == {1}
    assert all(re.search(r'Digest="[0-9a-f]{12}",Variant="\w+"', info) for info in infos)
    [mean] = of(after["classifier_confidence_mean"], labels).values()
    assert 0.9 < mean <= 1
    for figure in ("confidence", "classes"):
        [index] = of(after[f"classifier_{figure}_psi"], labels).values()
        assert 0 <= index < 0.1, "the images are those that training measured"
    for stage in metrics.STAGES:
        _check_histogram(after, f'Stage="{stage}"')
    assert after["PredictionTime"]
    assert after["ts_inference_requests_total"]


def _check_histogram(series: dict[str, dict[str, float]], stage: str) -> None:
    """TorchServe's buckets, rising, that agree with the sum; and quantiles that rise with their number."""
    found = of(series["classifier_stage_seconds_bucket"], stage)
    assert re.findall(r'le="([^"]+)"', " ".join(found)) == [*map(str, EDGES_S), "+Inf"]
    counts = np.diff([0, *found.values()])
    assert (counts >= 0).all()
    [count] = of(series["classifier_stage_seconds_count"], stage).values()
    [total_s] = of(series["classifier_stage_seconds_sum"], stage).values()
    assert counts.sum() == count > 0
    assert counts[-1] == 0, "no batch took longer than 10 s"
    assert counts[:-1] @ [0, *EDGES_S[:-1]] < total_s <= counts[:-1] @ EDGES_S
    quantiles = [of(series["classifier_stage_quantile_seconds"], stage, f'"{q}"') for q in metrics.QUANTILES]
    [p50, p90, p99] = (value for one in quantiles for value in one.values())
    assert 0 < p50 <= p90 <= p99 < 10
