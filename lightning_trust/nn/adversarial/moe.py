"""A convolutional network of experts: every image goes through one thin pathway of a wide network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Dispatch = Literal["group", "mask"]
_Pair = int | tuple[int, int]


def straight_through_top1(scores: Tensor) -> Tensor:
    r"""One-hot of the largest score, whose derivative with respect to the scores is the identity.

    .. math:: h = \mathrm{onehot}(\arg\max_e s_e), \qquad \partial h / \partial s := I

    Of equal scores the first wins. The values are exactly 0 and 1.

    Args:
        scores: Finite, shape ``(N, E)``.

    Returns:
        Shape ``(N, E)``.

    Example:
        >>> straight_through_top1(torch.tensor([[0.2, 0.7], [0.5, 0.5]]))
        tensor([[0., 1.],
                [1., 0.]])

    """
    hard = F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(scores.dtype)
    return hard + (scores - scores.detach())


@dataclass(frozen=True)
class Routing:
    """Which expert each image of a batch goes to.

    Attributes:
        hot: One-hot rows, shape ``(N, E)``, with the gradient to the router where there is one.
        counts: How many images go to each expert, where the batch is sorted by expert; None where every expert has to
            compute and the rows of ``hot`` select.

    """

    hot: Tensor
    counts: tuple[int, ...] | None


class RoutingContext:
    """Where the layers of one network find the routing of the forward pass under way.

    Set for the length of a forward pass and put back afterwards, also after an exception and where forward passes nest.
    It is no module and holds nothing between passes. Activation checkpointing computes layers again when the pass is
    over and so finds none; ``torch.compile`` breaks its graph at every routed layer.
    """

    def __init__(self) -> None:
        self._current: Routing | None = None

    @property
    def current(self) -> Routing:
        """The routing under way.

        Raises:
            RuntimeError: If no forward pass of the network is under way.

        """
        if self._current is None:
            raise RuntimeError(
                "Expected a routed convolution to be called within the forward pass of its MoENetwork, or with"
                " `routing`, but no routing is set. Activation checkpointing of routed layers is not supported."
            )
        return self._current

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """Set the routing of the forward passes inside."""
        before, self._current = self._current, routing
        try:
            yield
        finally:
            self._current = before


class MoEConv2d(nn.Module):
    r"""A convolution with one set of kernels an expert, of which an image meets one.

    .. math:: y_i = \sum_e h_{ie} \, (W_e * x_i + b_e)

    With a routing that is sorted by expert only the kernels of the chosen experts are applied, each to its own images
    (and :math:`y_i` is multiplied by :math:`h_{ie}` where that takes a gradient: the part of it that belongs to the
    chosen expert). Else all experts compute and the sum is taken as it stands, which gives the router its whole
    gradient.

    Paper: Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023).

    Shape:
        - Input: :math:`(N, C_{in}, H, W)`.
        - Output: :math:`(N, C_{out}, H', W')`.
        - ``weight``: :math:`(E \cdot C_{out}, C_{in}, k, k)`, expert after expert: the gradient of an expert that no
          image met is zero, and no parameter is ever unused.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels that one expert puts out.
        kernel_size: Size of the kernels.
        stride: Stride.
        padding: Zero padding, a number, a pair, ``"same"`` or ``"valid"``.
        dilation: Dilation.
        bias: Whether each expert has a bias.
        num_experts: Number of experts :math:`E`.
        context: Where the routing is found; None if it is always given in the call.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> layer = MoEConv2d(1, 4, 3, padding=1, num_experts=2)
        >>> layer.weight.shape
        torch.Size([8, 1, 3, 3])
        >>> layer(torch.zeros(3, 1, 5, 5), Routing(torch.eye(2)[[0, 0, 1]], counts=(2, 1))).shape
        torch.Size([3, 4, 5, 5])

    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        bias: bool = True,
        num_experts: int = 2,
        context: RoutingContext | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.num_experts = num_experts
        self.context = context
        self.weight = nn.Parameter(torch.empty(num_experts * out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(num_experts * out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels anew, each expert's by itself (He et al., fan-out); biases become zero."""
        for kernels in self.weight.data.chunk(self.num_experts):
            nn.init.kaiming_normal_(kernels, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, num_experts={self.num_experts}"
        )

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Images ``(N, C_in, H, W)`` -> ``(N, C_out, H', W')``."""
        if routing is None:
            routing = (self.context or RoutingContext()).current
        if routing.counts is None:
            every = self._convolved(x, self.weight, self.bias).unflatten(1, (self.num_experts, self.out_channels))
            return (every * routing.hot.to(every.dtype)[:, :, None, None, None]).sum(dim=1)
        parts, start = [], 0
        for expert, count in enumerate(routing.counts):
            # a batch without images still needs an output of the right shape
            if not count and (len(x) or expert):
                continue
            rows = slice(start, start + count)
            own = slice(expert * self.out_channels, (expert + 1) * self.out_channels)
            part = self._convolved(x[rows], self.weight[own], None if self.bias is None else self.bias[own])
            if routing.hot.requires_grad:
                part = part * routing.hot[rows, expert].to(part.dtype)[:, None, None, None]
            parts.append(part)
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)


class MoENetwork(nn.Module):
    """A network with routed convolutions, and the router that sends each image through one pathway of it.

    The router looks once at the image, outside autocast, and its decision holds for every routed layer. With
    ``dispatch="group"`` the batch is sorted by expert, and only what was chosen is computed: where BatchNorm normalises
    by its running statistics, each part of the batch runs through the whole network by itself; where it needs the
    statistics of the batch, the parts meet in every layer, so that the statistics are of all images, as with
    ``dispatch="mask"``, in which all experts compute. Outputs and gradients of the pathways are the same in both; the
    router gets its whole straight-through gradient with ``"mask"`` only, and in eval mode none with ``"group"``: there
    the gradient at the images is that of the pathway they take, as an attack needs it. Layers inside see the images
    sorted by expert. Sorting waits once a forward pass for the device.

    Paper: Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023).

    Shape:
        - Input: images ``(N, C, H, W)``.
        - Output: logits ``(N, K)``.

    Args:
        network: Network whose layers of :class:`MoEConv2d` share ``context``.
        router: Maps images to scores ``(N, E)``.
        num_experts: Number of experts ``E``.
        context: Where the layers look for the routing.
        dispatch: ``"group"`` or ``"mask"``.

    Raises:
        ValueError: If an argument is out of its range, a routed layer has another number of experts, or looks for its
            routing elsewhere; in the first call, if the router puts out anything but ``(N, E)``.

    Example:
        >>> from lightning_trust.nn import SmallCNN, convert_to_moe
        >>> network = convert_to_moe(SmallCNN(widths=(8, 8)), num_experts=2, ratio=0.5)
        >>> network(torch.zeros(4, 1, 8, 8)).shape, network.route(torch.zeros(4, 1, 8, 8)).shape
        (torch.Size([4, 10]), torch.Size([4, 2]))

    """

    def __init__(
        self,
        network: nn.Module,
        router: nn.Module,
        num_experts: int,
        context: RoutingContext,
        dispatch: Dispatch = "group",
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"Expected argument `num_experts` to be a positive integer, but got {num_experts}.")
        check_dispatch(dispatch)
        routed = {name: layer for name, layer in network.named_modules() if isinstance(layer, MoEConv2d)}
        if not routed:
            raise ValueError(f"Expected argument `network` to have layers of MoEConv2d, but {type(network)} has none.")
        for name, layer in routed.items():
            if layer.num_experts != num_experts or layer.context is not context:
                raise ValueError(
                    f"Expected layer '{name}' to have num_experts={num_experts} and the context of the network, but got"
                    f" num_experts={layer.num_experts} and {'this' if layer.context is context else 'another'} context."
                )
        self.network = network
        self.router = router
        self.num_experts = num_experts
        self.context = context
        self.dispatch: Dispatch = dispatch

    @contextmanager
    def dispatching(self, dispatch: Dispatch) -> Iterator[None]:
        """Let forward passes inside compute all experts (``"mask"``) or the chosen ones (``"group"``)."""
        check_dispatch(dispatch)
        before, self.dispatch = self.dispatch, dispatch
        try:
            yield
        finally:
            self.dispatch = before

    def route(self, x: Tensor) -> Tensor:
        """Scores of the experts, in the precision of the router's weights: images ``(N, C, H, W)`` -> ``(N, E)``.

        Raises:
            ValueError: If the router puts out another shape.

        """
        held = next(self.router.parameters(), None)
        # half precision rounds close scores to ties
        with torch.autocast(x.device.type, enabled=False):
            scores = self.router(x.float() if held is None else x.to(held.dtype))
        if scores.shape != (len(x), self.num_experts):
            raise ValueError(
                f"Expected the router to put out scores of shape ({len(x)}, {self.num_experts}), one an expert, but got"
                f" {tuple(scores.shape)}."
            )
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> logits ``(N, K)``."""
        return self.forward_with_scores(x)[0]

    def forward_with_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K)`` and the router's scores ``(N, E)`` of one forward pass."""
        scores = self.route(x)
        return self._through(x, straight_through_top1(scores)), scores

    def through(self, x: Tensor, expert: int) -> Tensor:
        """Logits ``(N, K)`` of images that all go through one expert, whatever the router says.

        Raises:
            ValueError: If there is no such expert.

        """
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"Expected argument `expert` to be in [0, {self.num_experts}), but got {expert}.")
        hot = torch.zeros(len(x), self.num_experts, device=x.device)
        hot[:, expert] = 1.0
        return self._through(x, hot)

    def _through(self, x: Tensor, hot: Tensor) -> Tensor:
        if not self.training:
            # the pseudo-gradient of the decision would lead attacks astray: a constant decision leaves the gradient of
            # the pathway, which is the true one wherever the decision does not change
            hot = hot.detach()
        if self.dispatch == "mask":
            with self.context.routed(Routing(hot, None)):
                return self.network(x)
        chosen = hot.detach().argmax(dim=1)
        counts: tuple[int, ...] = tuple(torch.bincount(chosen, minlength=self.num_experts).tolist())
        if max(counts) == len(x):
            with self.context.routed(Routing(hot, counts)):
                return self.network(x)
        order = chosen.argsort(stable=True)
        x, hot = x[order], hot[order]
        if self._needs_whole_batch():
            with self.context.routed(Routing(hot, counts)):
                logits = self.network(x)
        else:
            parts, start = [], 0
            for expert, count in enumerate(counts):
                if count:
                    rows = slice(start, start + count)
                    alone = tuple(count if other == expert else 0 for other in range(self.num_experts))
                    with self.context.routed(Routing(hot[rows], alone)):
                        parts.append(self.network(x[rows]))
                    start += count
            logits = torch.cat(parts)
        return logits[order.argsort()]

    def _needs_whole_batch(self) -> bool:
        """Whether a layer computes with statistics of the batch."""
        return any(
            layer.training or layer.running_mean is None
            for layer in self.network.modules()
            if isinstance(layer, _BatchNorm)
        )


def check_dispatch(dispatch: str) -> None:
    """Raise ValueError where there is no such dispatch."""
    if dispatch not in ("group", "mask"):
        raise ValueError(f"Expected argument `dispatch` to be 'group' or 'mask', but got {dispatch!r}.")


class JointOutputs(nn.Module):
    """Logits and scores of the experts of a :class:`MoENetwork` side by side: one tensor, as attacks want it.

    Shape:
        - Input: images :math:`(N, C, H, W)`.
        - Output: :math:`(N, K + E)`, float32 at least.

    Args:
        network: The network.

    """

    def __init__(self, network: MoENetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits, then scores."""
        logits, scores = self.network.forward_with_scores(x)
        wide = torch.promote_types(torch.promote_types(logits.dtype, scores.dtype), torch.float32)
        return torch.cat([logits.to(wide), scores.to(wide)], dim=1)
