"""The trained network as one file that takes pixels and gives probabilities: TorchScript, torch.export and ONNX."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archive.run_folder import RunFolder
from handler.variants import Predict, load_exported_program, load_torchscript, without_torchscript_warning
from networks.errors import ExportError
from system.errors import reason

TOLERANCE = 1e-5
ONNX_INPUT, ONNX_OUTPUT = "images", "probabilities"


class Network(nn.Module):
    """float32[N,C,H,W] in 0..255 → logits float32[N,K], differentiable."""

    def __init__(self, classifier: nn.Module, average_mirror: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.average_mirror = average_mirror

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(images)
        if self.average_mirror:
            logits = (logits + self.classifier(images.flip(3))) / 2
        return logits


class ServedClassifier(nn.Module):
    """What is exported: normalisation, network, temperature and softmax in one module.

    Args:
        classifier: float32[N,C,H,W] in 0..255 → logits.
        temperature: divides the logits.
        average_mirror: answer with the mean logits of an image and its mirror image.
    """

    def __init__(self, classifier: nn.Module, temperature: float = 1.0, average_mirror: bool = False) -> None:
        super().__init__()
        self.network = Network(classifier, average_mirror)
        self.temperature = nn.Buffer(torch.tensor(temperature))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[N,C,H,W] → probabilities float32[N,K]."""
        return torch.softmax(self.network(images.float()) / self.temperature, dim=1)

    @torch.jit.export
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,C,H,W] in 0..255 → logits float32[N,K], differentiable: for explanations."""
        logits: torch.Tensor = self.network(images)
        return logits

    def around(self, classifier: nn.Module) -> ServedClassifier:
        """The same with another form of the classifier."""
        return ServedClassifier(classifier, float(self.temperature), self.network.average_mirror).eval()


def export(served: ServedClassifier, images: torch.Tensor, folder: RunFolder) -> float:
    """Write `served` as `model.pt` (TorchScript) and `model.pt2` (torch.export), and prove both.

    Args:
        served: on the CPU.
        images: uint8[N,C,H,W], N ≥ 2: real inputs to trace and to compare with.

    Returns:
        The largest difference of a probability from the trained network's.

    Raises:
        ExportError: the network cannot be exported, or a difference is above 1e-5 for a batch size that was tried.
    """
    return max(export_as(name, served, images, folder) for name in (RunFolder.model, RunFolder.exported_program))


def export_as(name: str, served: ServedClassifier, images: torch.Tensor, folder: RunFolder) -> float:
    """One of the two files of `export`, by its name in the run folder, and the largest difference of a probability.

    Raises:
        ExportError: as `export`.
    """
    served.eval()
    write, load = _FORMATS[name]
    try:
        write(served, images, folder.path / name)
    except Exception as error:  # tracing runs the network's own code
        raise ExportError(f"the network cannot be exported as {name}: {reason(error)}") from error
    return prove(name, served, load(folder.path / name), images)


def prove(name: str, served: ServedClassifier, exported: Predict, images: torch.Tensor) -> float:
    """The largest difference of a probability between a form that was written as `name` and the network.

    Raises:
        ExportError: it is above 1e-5 for a batch size that was tried.
    """
    difference = _largest_difference(served, exported, images)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{name} differs from the trained network by {difference:.1e}, allowed {TOLERANCE:.0e}: the network "
            "does something that exporting cannot follow"
        )
    return difference


def write_onnx(run: RunFolder, path: Path) -> None:
    """Convert `model.pt2` to ONNX: `images` uint8[batch,C,H,W] → `probabilities` float32[batch,K], any batch size.

    The ONNX file of a run that has no other model is copied.

    Raises:
        ExportError: it cannot be converted.
    """
    if run.exact == run.onnx:
        shutil.copyfile(run.onnx, path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own inside
        try:
            program = torch.onnx.export(
                torch.export.load(run.exported_program),
                dynamo=True,
                input_names=[ONNX_INPUT],
                output_names=[ONNX_OUTPUT],
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises what it likes
            raise ExportError(f"{run}: not convertible to ONNX: {reason(error)}") from error
    if program is None:
        raise ExportError(f"{run}: the ONNX exporter gave nothing")
    _name_batch(program)
    _forget_where_it_was_made(program)
    program.save(path)


def takes_one_image(graph: Any) -> bool:
    """Whether the ONNX graph of a run folder has a batch size of 1 and no other."""
    return bool(graph.input[0].type.tensor_type.shape.dim[0].dim_value)


def _name_batch(program: Any) -> None:
    program.rename_axes({str(program.model.graph.inputs[0].shape[0]): "batch"})


def _forget_where_it_was_made(program: Any) -> None:
    """Drop the paths and lines of code that the exporter notes for each node."""
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for value in (*program.model.graph.inputs, *program.model.graph.initializers.values()):
        value.metadata_props.clear()


def write_torchscript(served: ServedClassifier, images: torch.Tensor, path: Path) -> None:
    """Write `served` as TorchScript, traced with uint8[N,C,H,W], N ≥ 2."""
    with without_torchscript_warning(), torch.no_grad():
        # What it warns of, that a value becomes a constant, is what other batch sizes are compared for.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(served.network.classifier, images[:2].float(), check_trace=False)
        torch.jit.script(served.around(traced)).save(str(path))


def _write_exported_program(served: ServedClassifier, images: torch.Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    # A clone, because saving stores the whole storage behind an example that is a view.
    example = images[:2].clone()
    # A worker takes the network out of the program, for explanations and for other precisions.
    network = ("network",)
    program = torch.export.export(
        served, (example,), dynamic_shapes=({0: batch},), preserve_module_call_signature=network
    )
    torch.export.save(program, path)


def _largest_difference(reference: Predict, candidate: Predict, images: torch.Tensor) -> float:
    """Over batches of one, three and all images."""
    with torch.no_grad():
        return max(float((candidate(x) - reference(x)).abs().max()) for x in (images[:1], images[:3], images))


_FORMATS: dict[str, tuple[Callable[[ServedClassifier, torch.Tensor, Path], None], Callable[[Path], Predict]]] = {
    RunFolder.model: (write_torchscript, load_torchscript),
    RunFolder.exported_program: (_write_exported_program, load_exported_program),
}
