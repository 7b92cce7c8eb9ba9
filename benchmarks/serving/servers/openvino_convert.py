"""The network as OpenVINO's int8 model, by NNCF's post-training quantisation on the folder of images given."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import openvino

from benchmarks.serving.servers.work import Work, network_file


def main(images: Path) -> None:
    """Write `NETWORK.int8.xml` beside the network."""
    work = Work()
    pixels = [work.decode(path.read_bytes()).unsqueeze(0) for path in sorted(images.iterdir())]
    model = openvino.convert_model(work.network, example_input=pixels[0], input=[-1, *pixels[0].shape[1:]])
    quantised = nncf.quantize(model, nncf.Dataset([image.numpy() for image in pixels]), subset_size=len(pixels))
    file = network_file().with_suffix(".int8.xml")
    partial = file.with_suffix(".partial.xml")
    openvino.save_model(quantised, partial)
    partial.with_suffix(".bin").replace(file.with_suffix(".bin"))
    partial.replace(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
