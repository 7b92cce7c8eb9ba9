"""A network as FX quantisation can take it: traced, of plain layers, without what only training needs."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from train.errors import NotQuantisable, reason

BOUND = "bound"
"""A ReLU with this attribute stands for the ReLU6 that the attribute holds."""
TOLERANCE = 1e-4


def traceable(network: nn.Module, inputs: torch.Tensor) -> fx.GraphModule:
    """A traced copy of `network` that gives the same logits, except where a ReLU is marked with `BOUND`.

    Quantisation knows torch's own convolutions, batch normalisation and ReLU. Convolutions that pad by the size of
    their input get that padding as a constant, and batch normalisation that holds an activation is taken apart. FX
    fuses a ReLU with its convolution and a ReLU6 with none, so a ReLU takes its place there.

    Args:
        network: in evaluation mode, on the CPU; stays as it is.
        inputs: float32[N,C,H,W], as the network will get them; H and W become constants.

    Raises:
        NotQuantisable: the network cannot be traced, or the copy answers otherwise.
    """
    plain = copy.deepcopy(network).eval()
    with torch.inference_mode():
        expected = network(inputs)
    _use_plain_layers(plain, inputs)
    try:
        traced = fx.symbolic_trace(plain)
    except Exception as error:  # tracing runs the network's own code
        raise NotQuantisable(f"the network cannot be traced: {reason(error)}") from None
    with torch.inference_mode():
        difference = float((traced(inputs) - expected).abs().max())
    if not difference <= TOLERANCE:
        raise NotQuantisable(
            f"the traced network differs from the trained one by {difference:.1e}, allowed {TOLERANCE:.0e}: it has "
            "layers of a kind that cannot be written as plain ones"
        )
    _simplify(traced)
    return traced


def restore_bounds(model: nn.Module) -> None:
    """Put back every ReLU6 that a marked ReLU stands for."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, BOUND):
                setattr(module, name, getattr(child, BOUND))


def _use_plain_layers(network: nn.Module, inputs: torch.Tensor) -> None:
    sizes = _input_sizes(network, inputs)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d and name in sizes:
            network.set_submodule(name, _plain_convolution(module, sizes[name]))
        elif isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d:
            network.set_submodule(name, _plain_batch_norm(module))
    network.eval()


def _input_sizes(network: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Size]:
    """Height and width of what each convolution gets."""
    sizes: dict[str, torch.Size] = {}

    def remember(name: str, given: tuple[torch.Tensor, ...]) -> None:
        sizes[name] = given[0].shape[2:]

    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: remember(name, given))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.inference_mode():
        network(inputs)
    for handle in handles:
        handle.remove()
    return sizes


def _plain_convolution(convolution: nn.Conv2d, size: torch.Size) -> nn.Conv2d:
    """The same convolution with the padding that TensorFlow calls SAME, for inputs of this height and width.

    Where one more row or column is padded after than before, the kernel gets a first one of zeros and the padding is
    the larger on both sides: exactly the same sums.
    """
    kernel, padding, zeros = [], [], []
    for length, side, stride, dilation in zip(
        size, convolution.kernel_size, convolution.stride, convolution.dilation, strict=True
    ):
        total = max((-(-length // stride) - 1) * stride + (side - 1) * dilation + 1 - length, 0)
        zeros.append(total % 2 if dilation == 1 else 0)
        kernel.append(side + zeros[-1])
        padding.append(total - total // 2)
    plain = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (kernel[0], kernel[1]),
        (convolution.stride[0], convolution.stride[1]),
        (padding[0], padding[1]),
        (convolution.dilation[0], convolution.dilation[1]),
        convolution.groups,
        bias=convolution.bias is not None,
    )
    with torch.no_grad():
        plain.weight.zero_()
        plain.weight[:, :, zeros[0] :, zeros[1] :] = convolution.weight
        if convolution.bias is not None and plain.bias is not None:
            plain.bias.copy_(convolution.bias)
    return plain


def _plain_batch_norm(module: nn.BatchNorm2d) -> nn.Sequential:
    """Batch normalisation and the activation that it holds, one after the other."""
    plain = nn.BatchNorm2d(module.num_features, module.eps, affine=module.affine)
    plain.load_state_dict(module.state_dict(), strict=False)
    activation = getattr(module, "act", None)
    return nn.Sequential(plain, activation) if isinstance(activation, nn.Module) else nn.Sequential(plain)


def _simplify(traced: fx.GraphModule) -> None:
    """Take out what does nothing, and mark each ReLU6 that could be fused, as a ReLU."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Identity, nn.Dropout)):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif type(module) is nn.ReLU6 and _follows_a_layer(node.args[0], modules):
            relu = nn.ReLU().eval()
            setattr(relu, BOUND, nn.ReLU6())
            traced.set_submodule(str(node.target), relu)
    traced.delete_all_unused_submodules()
    traced.recompile()


def _follows_a_layer(producer: fx.node.Argument, modules: dict[str, nn.Module]) -> bool:
    if not isinstance(producer, fx.Node) or producer.op != "call_module" or len(producer.users) > 1:
        return False
    return isinstance(modules[str(producer.target)], (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
