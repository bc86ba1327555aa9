"""From a dense convolutional network to one of experts, and what a network costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from lightning_trust.core.modes import eval_mode
from lightning_trust.nn.adversarial.moe import Dispatch, MoEConv2d, MoENetwork, RoutingContext
from lightning_trust.nn.adversarial.router import Router
from lightning_trust.nn.resnet import _ZeroFill, resnet18_small
from lightning_trust.nn.small_cnn import SmallCNN

#: names of layers that all experts share: the stem and the shortcuts
SHARED = ("conv1", "stem*", "features.0", "*downsample*", "*shortcut*")


def convert_to_moe(
    model: nn.Module,
    num_experts: int = 2,
    ratio: float = 0.5,
    skip: Sequence[str] = SHARED,
    router: nn.Module | None = None,
    dispatch: Dispatch = "group",
) -> MoENetwork:
    r"""A network of experts out of a dense one: ``num_experts`` pathways of ``ratio`` times its width.

    Every layer becomes thinner by ``ratio``, so that one pathway costs about ``ratio`` squared. Convolutions become
    :class:`MoEConv2d`, but for those that ``skip`` names; these, the normalisations and the classifier are shared by
    all experts. At ``ratio=1`` each expert starts from the weights of the dense network; a thinner network cannot keep
    them and starts anew. For plain networks and residual ones of torchvision, timm and this package; the model is not
    changed.

    Paper: Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023).

    Args:
        model: A convolutional classifier of images.
        num_experts: Number of experts.
        ratio: Width of a pathway as a share of the dense network's, in (0, 1].
        skip: Patterns (``*`` for anything) of names of convolutions that are shared.
        router: Maps images to scores ``(N, num_experts)``; a :class:`Router` if None.
        dispatch: See :class:`MoENetwork`.

    Returns:
        The network; parameters of the dense one have their names after ``network.``.

    Raises:
        ValueError: If a number is out of its range, no convolution is left to be routed, ``ratio`` times a width is no
            integer, or a layer cannot be converted (grouped convolutions, unknown layers with weights), naming it.

    Example:
        >>> from lightning_trust.nn import SmallCNN
        >>> dense = SmallCNN(in_channels=1, widths=(16, 32))
        >>> convert_to_moe(dense, num_experts=4, ratio=0.25).network.features[4]
        MoEConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), num_experts=4)

    """
    if num_experts < 1:
        raise ValueError(f"Expected argument `num_experts` to be a positive integer, but got {num_experts}.")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"Expected argument `ratio` to be in (0, 1], but got {ratio}.")
    network = copy.deepcopy(model)
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"Expected argument `model` to have convolutions, but {type(model).__name__} has none.")
    channels = first.in_channels
    context = RoutingContext()
    linear_seen = routed = False
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            inputs = channels if module is first else _thin(module.in_channels, ratio, name)
            outputs = _thin(module.out_channels, ratio, name)
            if any(fnmatchcase(name, pattern) for pattern in skip):
                _check_convolution(name, module)
                if ratio < 1.0:
                    _replace(network, name, _thin_convolution(module, inputs, outputs))
                continue
            _replace(network, name, _routed(name, module, inputs, outputs, num_experts, context, ratio))
            routed = True
        elif ratio == 1.0:
            continue
        elif isinstance(module, nn.Linear):
            # those after the first have inputs that are no channels
            if not linear_seen:
                _thin_linear(module, _thin(module.in_features, ratio, name))
            linear_seen = True
        elif isinstance(module, (_NormBase, nn.GroupNorm)):
            _thin_norm(name, module, ratio)
        elif isinstance(module, _ZeroFill):
            module.new_channels = _thin(module.new_channels, ratio, name)
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"Cannot make layer '{name}' ({type(module).__name__}) thinner; only ratio=1 keeps it.")
    if not routed:
        raise ValueError(f"Expected argument `skip` to leave a convolution to be routed, but {tuple(skip)} names all.")
    return MoENetwork(network, router or Router(num_experts, channels), num_experts, context, dispatch)


def moe_resnet18(
    in_channels: int = 3,
    num_classes: int = 10,
    num_experts: int = 2,
    ratio: float = 0.5,
    dispatch: Dispatch = "group",
    router_widths: Sequence[int] = (16, 32, 64),
    router_blocks: Sequence[int] = (1, 1, 1),
    router_stem_stride: int = 2,
) -> MoENetwork:
    """:func:`~lightning_trust.nn.resnet18_small` as a network of experts.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        num_experts: Number of experts.
        ratio: Width of a pathway as a share of the dense network's, in (0, 1].
        dispatch: See :class:`MoENetwork`.
        router_widths: See :class:`Router`.
        router_blocks: See :class:`Router`.
        router_stem_stride: See :class:`Router`.

    Returns:
        The network: images ``(N, in_channels, H, W)`` -> logits ``(N, num_classes)``.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> network = moe_resnet18(in_channels=1)
        >>> round(count_multiply_adds(network, (1, 28, 28)) / 1e6)
        117

    """
    dense = resnet18_small(in_channels, num_classes)
    router = Router(num_experts, in_channels, router_widths, router_blocks, router_stem_stride)
    return convert_to_moe(dense, num_experts, ratio, router=router, dispatch=dispatch)


def moe_small_cnn(
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[int] = (32, 32, 32, 32),
    batch_norm: bool = True,
    num_experts: int = 2,
    ratio: float = 0.5,
    dispatch: Dispatch = "group",
    router_widths: Sequence[int] = (8, 16, 32),
    router_blocks: Sequence[int] = (1, 1, 1),
    router_stem_stride: int = 2,
) -> MoENetwork:
    """:class:`~lightning_trust.nn.SmallCNN` as a network of experts.

    With the defaults an image of 28 pixels costs 1.4 million multiply-adds, 0.6 of them the router's; the dense network
    has 2.9.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        widths: Channels of the dense network after each convolution.
        batch_norm: Whether a batch normalisation follows each convolution.
        num_experts: Number of experts.
        ratio: Width of a pathway as a share of the dense network's, in (0, 1].
        dispatch: See :class:`MoENetwork`.
        router_widths: See :class:`Router`.
        router_blocks: See :class:`Router`.
        router_stem_stride: See :class:`Router`.

    Returns:
        The network: images ``(N, in_channels, H, W)`` -> logits ``(N, num_classes)``.

    Raises:
        ValueError: If a number is out of its range, or ``ratio`` times a width is no integer.

    Example:
        >>> network = moe_small_cnn()
        >>> count_multiply_adds(network, (1, 28, 28)), count_multiply_adds(network.router, (1, 28, 28))
        (1435392, 644960)

    """
    dense = SmallCNN(in_channels, num_classes, widths, batch_norm)
    router = Router(num_experts, in_channels, router_widths, router_blocks, router_stem_stride)
    return convert_to_moe(dense, num_experts, ratio, router=router, dispatch=dispatch)


def count_multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of what a network really computes for one image, in eval mode: convolutions and matrix products.

    Args:
        model: The network.
        input_size: Shape of an input without the batch, such as ``(1, 28, 28)``.

    Returns:
        Number of multiply-adds (half the floating-point operations).

    Example:
        >>> count_multiply_adds(nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10)) == 3 * 8 * 9 * 100
        True

    """
    held = next(model.parameters(), torch.empty(0))
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, device=held.device, dtype=held.dtype))
    return int(counter.get_total_flops()) // 2


def _thin(width: int, ratio: float, name: str) -> int:
    thin = width * ratio
    if abs(thin - round(thin)) > 1e-6 or round(thin) < 1:
        raise ValueError(
            f"Expected argument `ratio` times the width of layer '{name}' to be an integer of at least 1, but got"
            f" {ratio} * {width}."
        )
    return round(thin)


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, new)


def _check_convolution(name: str, module: nn.Conv2d) -> None:
    if module.groups != 1 or module.padding_mode != "zeros" or type(module) is not nn.Conv2d:
        raise ValueError(
            f"Expected layer '{name}' to be a plain Conv2d with groups=1 and padding_mode='zeros', but got"
            f" {type(module).__name__} with groups={module.groups} and padding_mode='{module.padding_mode}'."
        )


def _like(module: nn.Conv2d, kind: type[Any], inputs: int, outputs: int, **more: Any) -> Any:
    return kind(
        inputs,
        outputs,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        bias=module.bias is not None,
        **more,
    ).to(module.weight.device, module.weight.dtype)


def _thin_convolution(module: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    thin: nn.Conv2d = _like(module, nn.Conv2d, inputs, outputs)
    nn.init.kaiming_normal_(thin.weight, mode="fan_out", nonlinearity="relu")
    if thin.bias is not None:
        nn.init.zeros_(thin.bias)
    return thin


def _routed(
    name: str, module: nn.Conv2d, inputs: int, outputs: int, experts: int, context: RoutingContext, ratio: float
) -> MoEConv2d:
    _check_convolution(name, module)
    layer: MoEConv2d = _like(module, MoEConv2d, inputs, outputs, num_experts=experts, context=context)
    if ratio == 1.0:
        with torch.no_grad():
            layer.weight.copy_(module.weight.repeat(experts, 1, 1, 1))
            if layer.bias is not None and module.bias is not None:
                layer.bias.copy_(module.bias.repeat(experts))
    return layer


def _thin_linear(module: nn.Linear, inputs: int) -> None:
    module.in_features = inputs
    module.weight = nn.Parameter(module.weight.new_empty(module.out_features, inputs))
    module.reset_parameters()


def _thin_norm(name: str, module: _NormBase | nn.GroupNorm, ratio: float) -> None:
    if isinstance(module, nn.GroupNorm):
        module.num_channels = thin = _thin(module.num_channels, ratio, name)
        if thin % module.num_groups:
            raise ValueError(f"Expected the {thin} channels of '{name}' to fall into {module.num_groups} groups.")
    else:
        module.num_features = thin = _thin(module.num_features, ratio, name)
        for key in ("running_mean", "running_var"):
            buffer = getattr(module, key)
            if buffer is not None:
                setattr(module, key, buffer.new_full((thin,), float(key == "running_var")))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.zero_()
    if module.weight is not None:
        # what a network begins with stays: zero, where the last norm of a block begins so
        value = float(bool(module.weight.any()))
        module.weight = nn.Parameter(module.weight.new_full((thin,), value))
        module.bias = nn.Parameter(module.bias.new_zeros(thin))
