"""Networks whose code is at hand: a library's by its name, or one's own by its file, and weights that fit exactly."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from networks import models, pretraining, weights
from networks.errors import ModelError
from networks.section import OWN_NETWORKS, ModelSection
from system.errors import reason
from system.printable import printable
from train.adopt.source import PIXELS, Source, digest

TRAINED_ON_IMAGENET = 1000
_SHOWN = 10
"""Keys that an error names."""


def of_library(architecture: str, given: str, channels: int) -> Source:
    """A network of torchvision, of timm (`timm/NAME`) or of ours, with a file's weights or the published ones.

    Args:
        given: a file, or `pretrained`.

    Raises:
        ModelError: there is no such network, or the weights cannot be had or do not fit it.
    """
    if given == "pretrained":
        network, names = _published(architecture, channels)
        about: dict[str, Any] = {"kind": "library", "weights": "pretrained"}
    else:
        found = weights.read(Path(given))
        network = _build(architecture, channels, _count(architecture, channels, found))
        load_exactly(network, found, given)
        names = None
        about = {"kind": "library", "file": Path(given).name, "sha256": digest(Path(given))}
    if architecture in OWN_NETWORKS:
        return Source(network, about, architecture, given)
    own = pretraining.of(architecture).for_channels(channels)
    pixels = {**PIXELS, "channels": channels, **own.missing({})}
    normalisation = {"mean": list(own.mean), "std": list(own.std)}
    if architecture.startswith("timm/"):
        import timm

        config: Any = timm.get_pretrained_cfg(pretraining.timm_name(architecture))
        if config is not None and config.crop_mode == "squash":
            pixels["resize_mode"] = "squash"
    return Source(network, about, architecture, given, pixels, normalisation, names)


def imagenet_names() -> list[str]:
    """Of the 1,000 classes that most published networks know, as torchvision has them."""
    return list(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])


def of_file(place: str, given: str) -> Source:
    """One's own network: what the function or class in `FILE.py:NAME` gives, called without arguments.

    That file is run. The weights are read as data.

    Raises:
        ModelError: it cannot be run, gives no network, or the weights do not fit it.
    """
    name, colon, function = place.rpartition(":")
    file = Path(name)
    if not colon or file.suffix != ".py" or not file.is_file():
        raise ModelError(f"--network {place}: give FILE.py:NAME, a file and the function in it that builds the network")
    specification = importlib.util.spec_from_file_location(f"adopted_{file.stem}", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        specification.loader.exec_module(module)
        network = getattr(module, function)()
    except Exception as error:  # whatever a user's code raises
        raise ModelError(f"--network {place} failed ({reason(error)}): it is called without arguments") from None
    finally:
        sys.path.remove(str(file.parent.resolve()))
    if not isinstance(network, nn.Module):
        raise ModelError(f"--network {place} gives {type(network).__name__}: return a torch.nn.Module")
    load_exactly(network, weights.read(Path(given)), given)
    about = {"kind": "network file", "network": file.name, "network_sha256": digest(file)}
    return Source(network, {**about, "file": Path(given).name, "sha256": digest(Path(given))}, weights=given)


def load_exactly(network: nn.Module, found: Sequence[Mapping[str, torch.Tensor]], source: str) -> None:
    """Copy the first weights of a file that fit, under whatever prefix; averaged ones come first.

    Raises:
        ModelError: none fit, with keys that are missing, left over or of another shape.
    """
    complaints = []
    for given in found:
        if not (complaint := _load(network, given)):
            return
        complaints.append(complaint)
    raise ModelError(f"{source} does not fit the network: {min(complaints, key=len)}")


def _load(network: nn.Module, given: Mapping[str, torch.Tensor]) -> str | None:
    """What does not fit; None where all was copied."""
    own = network.state_dict()
    given = _without_prefix(given, own)
    shapes = [
        f"{key} is {list(given[key].shape)}, in the network {list(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    problems = [
        f"{what} {', '.join(keys[:_SHOWN])}{f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''}"
        for what, keys in (("missing are", missing), ("unexpected are", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        return "; ".join(problems)
    if bad := [key for key, value in given.items() if value.is_floating_point() and not value.isfinite().all()]:
        return f"NaN or infinity in {bad[0]}: its training has failed"
    network.load_state_dict(dict(given), strict=False)
    return None


def _without_prefix(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the words, such as `module.` or `model.`, that make most names the network's."""
    prefixes = {key.removesuffix(name) for name in own for key in given if key.endswith(f".{name}")}
    best = max(["", *sorted(prefixes)], key=lambda prefix: sum(f"{prefix}{name}" in given for name in own))
    inside = {key.removeprefix(best): value for key, value in given.items() if key.startswith(best)}
    if best and (outside := [key for key in given if not key.startswith(best)]):
        print(printable(f"left out what does not begin with {best}: {', '.join(outside)}"), file=sys.stderr)
    return inside


def _build(architecture: str, channels: int, classes: int) -> nn.Module:
    section = ModelSection(architecture=architecture, mean=[0.5] * channels, std=[0.5] * channels)
    return models.build(section, channels, classes).network


def _count(architecture: str, channels: int, found: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """How many classes the weights are for: what the network's shapes follow the number of classes in."""
    with torch.device("meta"):
        two, three = (_build(architecture, channels, count).state_dict() for count in (2, 3))
    heads = [key for key in two if two[key].shape != three[key].shape]
    for given in found:
        inside = _without_prefix(given, two)
        if known := [key for key in heads if key in inside]:
            return len(inside[known[0]])
    return TRAINED_ON_IMAGENET


def _published(architecture: str, channels: int) -> tuple[nn.Module, list[str] | None]:
    """A library's network as it was published, and the names of its classes where those are known."""
    if architecture in OWN_NETWORKS:
        raise ModelError(f"there are no pretrained weights for {architecture}: give a file by --weights")
    try:
        if architecture.startswith("timm/"):
            import timm

            network: Any = timm.create_model(pretraining.timm_name(architecture), pretrained=True, in_chans=channels)
        else:
            pretraining.check_torchvision(architecture)
            network = torchvision.models.get_model(architecture, weights="DEFAULT")
    except ModelError:
        raise
    except Exception as error:  # each way to download has errors of its own
        raise ModelError(
            f"the pretrained weights of {architecture} cannot be had ({reason(error)}): download them on a machine "
            "that can, and give the file by --weights FILE"
        ) from None
    return network, None
