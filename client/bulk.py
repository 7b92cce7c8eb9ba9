"""Many images through one server, several at a time, answers in the order of the images."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from client.errors import RequestRefused
from client.inputs import Source
from client.torchserve import Prediction, TorchServe

# Images that may be under way or answered and not yet taken, for each that is asked at a time.
_AHEAD = 4


@dataclass(frozen=True)
class Outcome:
    """What became of one image."""

    name: str
    prediction: Prediction | None = None
    error: str | None = None
    """Why there is no prediction."""
    accepted: bool | None = None
    """Whether the server accepts its answer; None where it marks none."""


def predict(
    server: TorchServe, model: str, sources: Sequence[Source], concurrency: int
) -> Generator[Outcome, None, None]:
    """Classify images, `concurrency` at a time; one that is refused or cannot be read does not end the others.

    Raises:
        ClientError: an error that would hit every remaining image: no server, no token, no such model, no worker.
    """
    under_way: deque[Future[Outcome]] = deque()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="predict")
    try:
        for source in sources:
            under_way.append(pool.submit(_predict, server, model, source))
            if len(under_way) >= _AHEAD * concurrency:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _predict(server: TorchServe, model: str, source: Source) -> Outcome:
    try:
        image = source.read()
    except OSError as error:
        return Outcome(source.name, error=error.strerror or str(error))
    try:
        answer = server.classify(model, image)
    except RequestRefused as error:
        return Outcome(source.name, error=str(error))
    return Outcome(source.name, prediction=answer.prediction, accepted=answer.accepted)
