"""What a server behind an edge does under three times its peak: with a deadline, and without.

    TORCHSERVE_INFERENCE_TOKEN=KEY python -m benchmarks.overload lenet5-digits --url http://127.0.0.1:8000 --images DIR

measures what the server can do, calls 0.7 of it the peak, and sends three times that. Without a deadline the answers
come as late as the queue is long. With one, the time that 99 of 100 requests take at the peak, what would be late is
refused, and 99 of 100 answers should take no longer than at the peak.
"""

from __future__ import annotations

from typing import Annotated

import typer

from client.inputs import expand
from client.torchserve import TorchServe
from operate.tuning.load import LoadResult, load
from system.command_line import reports_errors

PEAK, OVERLOAD = 0.7, 3.0
CLIENTS, MOST_CLIENTS = 16, 256
PATIENT_S = 10.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@reports_errors
def main(
    model: str,
    images: Annotated[list[str], typer.Option(metavar="PATH")],
    url: str = "http://127.0.0.1:8000",
    seconds: float = 10,
) -> None:
    """Print latencies and answered shares, and the ratio of the 99 % latencies."""
    server, data = TorchServe(url, retry_s=0), [source.read() for source in expand(images)]

    def at(rate: float, deadline_s: float) -> LoadResult:
        return load(server, model, data, MOST_CLIENTS, seconds, rate, deadline_s)

    peak = PEAK * load(server, model, data, CLIENTS, seconds).requests_per_s
    calm = at(peak, PATIENT_S)
    deadline_s = calm.latency_ms(0.99) / 1e3
    sides = {
        "peak": calm,
        "3 times peak, no deadline": at(OVERLOAD * peak, PATIENT_S),
        "3 times peak, deadline": at(OVERLOAD * peak, deadline_s),
    }
    print(f"peak {peak:.1f} requests/s, deadline {1e3 * deadline_s:.0f} ms")
    for name, result in sides.items():
        times = f"p50 {result.latency_ms(0.5):7.1f} ms  p99 {result.latency_ms(0.99):7.1f} ms"
        print(f"{name:26}  {result.requests_per_s:7.1f} answered/s  {times}  {result.counts}")
    for name in list(sides)[1:]:
        print(f"p99 of {name} over p99 of peak: {sides[name].latency_ms(0.99) / calm.latency_ms(0.99):.2f}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.overload")
