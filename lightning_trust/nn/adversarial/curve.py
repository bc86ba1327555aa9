"""A curve of networks between two trained ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lightning_trust.core.saved_weights import fitting_weights, read_weights
from lightning_trust.functional.adversarial.curve import (
    Curve,
    check_bends,
    check_curve,
    check_position,
    curve_coefficients,
)

End = Literal["start", "end"]


class CurveNetwork(nn.Module):
    r"""All networks on a curve between two trained ones of one architecture; it is the one at its position ``t``.

    .. math:: \theta(t) = \sum_{j=0}^{B-1} c_j(t) \, \theta_j, \qquad t \in [0, 1]

    with the coefficients of a Bezier curve or of a chain of segments. :math:`\theta_0` and :math:`\theta_{B-1}` are the
    two networks, the others are trained: an optimizer over ``parameters()`` moves them alone. Any architecture will do;
    its layers are called with the interpolated weights, all of them, those of normalisations included.

    Buffers, such as BatchNorm's running statistics, exist once. They belong to no point: re-estimate them before a
    point is evaluated, as :class:`~lightning_trust.callbacks.CurveEvaluation` does.

    Papers: Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs (NeurIPS 2018); Bridging Models to Defend: A
    Population-Based Strategy for Robust Adversarial Defense (arXiv 2303.10225).

    Shape:
        - Input and output: those of the network.

    Args:
        network: The architecture; it becomes part of the curve, as its first bend.
        num_bends: Number :math:`B` of bends, both ends included.
        curve: ``"bezier"`` or ``"polychain"``.
        start: Weights of the first network: a Lightning checkpoint, a file with a state dict, or a safetensors file;
            those that ``network`` has if None.
        end: Weights of the last network; those that ``network`` has if None.
        fix_start: Whether the first network stays as it is.
        fix_end: Whether the last network stays as it is.
        t: Position of the curve.

    Attributes:
        network: The architecture; its own parameters are the first bend.
        bends: The further bends, the last of which is the other end.
        t: The position, a buffer; :meth:`move_to` sets it.

    Raises:
        FileNotFoundError: If there is no checkpoint of that name.
        ValueError: If an argument is out of its range, a checkpoint is of another architecture, or the network has no
            parameters, or parametrisations, through which no straight line goes.

    Example:
        >>> curve = CurveNetwork(nn.Linear(1, 1, bias=False), num_bends=3)
        >>> curve.load_endpoint({"weight": torch.tensor([[1.0]])}, "start")
        >>> curve.load_endpoint({"weight": torch.tensor([[5.0]])}, "end")
        >>> curve.init_linear()
        >>> curve(torch.ones(1, 1), t=0.25)
        tensor([[2.]], grad_fn=<...>)
        >>> [name for name, bend in curve.named_parameters() if bend.requires_grad]
        ['bends.0.weight']

    """

    t: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_bends: int = 3,
        curve: Curve = "bezier",
        start: str | None = None,
        end: str | None = None,
        fix_start: bool = True,
        fix_end: bool = True,
        t: float = 0.5,
    ) -> None:
        super().__init__()
        check_bends(num_bends)
        check_curve(curve)
        check_position(t)
        _check_network(network)
        self.network = network
        self.num_bends = num_bends
        self.curve: Curve = curve
        self.bends = nn.ModuleList(_Bend(network) for _ in range(num_bends - 1))
        for bend, fixed in ((network, fix_start), (self.bends[-1], fix_end)):
            for parameter in bend.parameters():
                if fixed:
                    parameter.requires_grad_(False)
        self.register_buffer("t", torch.tensor(t))
        if end is not None:
            self.load_endpoint(end, "end")
        # last: its buffers stay
        if start is not None:
            self.load_endpoint(start, "start")
        self.init_linear()

    def extra_repr(self) -> str:
        """Shape of the curve, for ``print``."""
        return f"num_bends={self.num_bends}, curve={self.curve!r}"

    def forward(self, x: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Outputs of the network at position ``t``; at that of the curve if None."""
        return functional_call(self.network, self.weights_at(t), (x,))

    def move_to(self, t: float) -> None:
        """Set the position.

        Raises:
            ValueError: If it is not in [0, 1].

        """
        check_position(t)
        self.t.fill_(t)

    def weights_at(self, t: Tensor | float | None = None) -> dict[str, Tensor]:
        """The weights at a position, by the names of the plain network; gradients flow to the bends that take some.

        Args:
            t: Position in [0, 1]; that of the curve if None. A tensor is taken as it is.

        Raises:
            ValueError: If it is a number out of [0, 1].

        """
        coefficients = curve_coefficients(self._position(t), self.num_bends, self.curve)
        return {
            name: sum(
                (part * own for part, own in zip(coefficients[1:], bends[1:], strict=True)), coefficients[0] * bends[0]
            )
            for name, bends in self._bends()
        }

    def load_endpoint(self, weights: str | Mapping[str, Tensor], which: End) -> None:
        """Put the weights of a trained network at one end, and its buffers into the curve.

        The bends in between stay where they are; :meth:`init_linear` puts them on the straight segment.

        Args:
            weights: A file as for ``start``, or a state dict; either that of the network or of a module that holds it.
            which: ``"start"`` or ``"end"``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the weights are those of another architecture; the first differences are listed.

        """
        if which not in ("start", "end"):
            raise ValueError(f"Expected argument `which` to be 'start' or 'end', but got {which!r}.")
        source = weights if isinstance(weights, str) else f"argument `weights` ({which})"
        given = read_weights(weights) if isinstance(weights, str) else weights
        found = fitting_weights(given, self.network, source, inside=True)
        targets: dict[str, Tensor] = dict(self.network.named_buffers())
        # of a tied parameter, which bends hold once, the other names say the same
        targets.update((self.network if which == "start" else self.bends[-1]).named_parameters())
        with torch.no_grad():
            for name in found.keys() & targets.keys():
                targets[name].copy_(found[name])

    @torch.no_grad()
    def init_linear(self) -> None:
        r"""Put the bends in between on the straight segment, evenly: :math:`(1 - a) \theta_0 + a \theta_{B-1}`."""
        for _, bends in self._bends():
            for j, bend in enumerate(bends[1:-1], start=1):
                bend.copy_(torch.lerp(bends[0], bends[-1], j / (self.num_bends - 1)))

    def ends_differ(self) -> bool:
        """Whether the two ends have different weights."""
        return any(not torch.equal(bends[0], bends[-1]) for _, bends in self._bends())

    def export(self, t: Tensor | float | None = None) -> nn.Module:
        """The network at a position as an ordinary module, with the names of the plain network.

        It has copies of the weights, which take gradients, and of the curve's buffers; re-estimate its BatchNorm
        statistics, e.g. with ``torch.optim.swa_utils.update_bn``.

        Args:
            t: Position in [0, 1]; that of the curve if None.

        Raises:
            ValueError: If it is a number out of [0, 1].

        """
        point = copy.deepcopy(self.network)
        with torch.no_grad():
            weights = self.weights_at(t)
            for name, parameter in point.named_parameters():
                parameter.copy_(weights[name])
                parameter.requires_grad_(True)
                parameter.grad = None
        return point

    def _position(self, t: Tensor | float | None) -> Tensor:
        if t is not None and not isinstance(t, Tensor):
            check_position(t)
        place = self.t if t is None else torch.as_tensor(t, dtype=self.t.dtype, device=self.t.device)
        # in half precision the coefficients would not sum to 1
        return place.to(torch.promote_types(place.dtype, torch.float32))

    def _bends(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Name in the plain network and the parameter of each bend."""
        further = [dict(bend.named_parameters()) for bend in self.bends]
        for name, parameter in self.network.named_parameters():
            yield name, [parameter, *(bend[name] for bend in further)]


class _Bend(nn.Module):
    """Copies of a network's parameters under its own names, and nothing else of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for path, parameter in network.named_parameters():
            *parents, name = path.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.register_parameter(name, nn.Parameter(parameter.detach().clone()))


def _check_network(network: nn.Module) -> None:
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise ValueError(f"Expected argument `network` to have parameters, but {type(network).__name__} has none.")
    made = [
        name or type(module).__name__ for name, module in network.named_modules() if parametrize.is_parametrized(module)
    ]
    if made:
        raise ValueError(
            f"Expected argument `network` to have plain parameters, but got parametrisations of {', '.join(made[:4])}."
            " Take them away with `torch.nn.utils.parametrize.remove_parametrizations` first."
        )
