"""What kind of model a source is, by the options and by what the file holds."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from networks import weights
from networks.errors import ModelError
from train.adopt import files, networks, onnx_files, stock
from train.adopt.source import Source
from train.adopt.wrappers import LogOf, Reversed

_SAY = (
    "these are weights, so say of which network: --architecture NAME of torchvision or timm/NAME, or --network "
    "FILE.py:NAME, the function in your file that builds it"
)


def open_source(
    given: str, architecture: str, network: str, sections: dict[str, Any], run_model_file: bool = False
) -> Source:
    """The model of a file, or the published one.

    Args:
        given: a file, or `pretrained` for a library's network.
        architecture: a library's network that the weights are for.
        network: `FILE.py:NAME` that builds the network that they are for.
        sections: what the user says of the recipe.
        run_model_file: whether code in a `.mar` may be run.

    Raises:
        ArchiveError, ModelError: it cannot be adopted, with what to do.
    """
    if given != "pretrained" and not Path(given or ".").is_file():
        raise ModelError(
            f"no file {given}" if given else "give the file of the model, or --architecture NAME --weights pretrained"
        )
    if architecture and network:
        raise ModelError("--architecture and --network both name the network: give one of them")
    if architecture:
        return networks.of_library(architecture, given, (sections.get("input") or {}).get("channels", 3))
    if network:
        return networks.of_file(network, given)
    if given == "pretrained":
        raise ModelError("--weights pretrained needs --architecture NAME of torchvision, or timm/NAME")
    return _of_content(Path(given), run_model_file)


def wrapped(source: Source, outputs: str, channel_order: str) -> Source:
    """The source whose network takes RGB and gives logits, by what the user says of it."""
    for applies, wrapper in ((outputs == "probabilities", LogOf), (channel_order == "bgr", Reversed)):
        if applies:
            source.network, inner = wrapper(source.network), source.for_export
            if inner is not None:
                source.for_export = lambda example, inner=inner, wrapper=wrapper: wrapper(inner(example))
    return source


def _of_content(file: Path, run_model_file: bool) -> Source:
    if file.suffix == ".onnx":
        files.check_data(file, ".onnx", 'make one file of it: onnx.save(onnx.load("model.onnx"), "one.onnx")')
        return onnx_files.read(file, files.about("ONNX", file))
    if file.suffix == ".mar":
        return stock.open_archive(file, run_model_file)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("models/model.json") for name in names):
            return files.exported_program(file)
        if any("/code/" in name for name in names) and any(name.endswith("/constants.pkl") for name in names):
            return files.torchscript(file)
    elif file.read_bytes()[:2] == b"PK":
        raise ModelError(f"{file} is cut short: copy or download it again")
    weights.read(file)
    raise ModelError(f"{file}: {_SAY}")
