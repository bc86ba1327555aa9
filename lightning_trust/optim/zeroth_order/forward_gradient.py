"""Forward gradients: one pass of forward-mode differentiation a direction."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor

from lightning_trust.core.modes import unused_running_statistics
from lightning_trust.core.randomness import derived_seed
from lightning_trust.core.weights import substituted
from lightning_trust.functional.zeroth_order import draw_direction_, signal_to_noise
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator, gradient_of
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle, check_count, check_finite


class ForwardGradient(GradientEstimator):
    r"""Forward gradient: exact derivatives of the loss along random directions, without a backward pass.

    .. math:: \hat g = \frac1q \sum_{j=1}^q (\nabla l(\theta) \cdot u_j) \, u_j, \qquad u_j \sim \mathcal{N}(0, I)

    The derivative along a direction comes with the loss from one pass of forward-mode differentiation, which keeps no
    activations. There is no :math:`\mu` and no rounding by differences; the mean squared error is
    :math:`(d + 1) / q` times the squared length of the gradient. The loss must be made of differentiable operations
    that have a forward derivative.

    Paper: Gradients without Backpropagation (arXiv:2202.08587).

    Args:
        q: Number of directions :math:`q`, each a query that costs about two forward passes.

    Raises:
        ValueError: If ``q`` is below 1.
        MisconfigurationException: If it is not told which module holds the parameters, or an operation has no forward
            derivative.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False).double()
        >>> loss = lambda: layer(torch.ones(1, 2).double()).sum()
        >>> found = ForwardGradient(q=4000).estimate(loss, [layer.weight], torch.Generator().manual_seed(1), layer)
        >>> (layer.weight.grad - 1.0).abs().max() < 0.1
        tensor(True)

    """

    def __init__(self, q: int = 1) -> None:
        check_count("q", q)
        self.q = q
        self._checked = False

    def add(self, oracle: LossOracle, scale: float = 1.0) -> Estimate:
        """Add ``scale`` times the estimate to the ``.grad`` of the oracle's parameters."""
        if oracle.module is None:
            raise MisconfigurationException(
                "ForwardGradient computes with derivatives in the place of parameters, so it must be told which module"
                " holds them: pass `module=` to `estimate` or to the optimizer."
            )
        if not self._checked and not oracle.reads_through(oracle.module):
            raise MisconfigurationException(
                f"ForwardGradient puts derivatives in the place of the parameters of {type(oracle.module).__name__},"
                " but the loss takes its parameters from elsewhere. Let it read them from the module at every call."
            )
        self._checked = True
        found: list[Tensor] = []
        loss = torch.zeros((), device=oracle.device)
        for place in range(self.q)[oracle.share(self.q)]:
            loss, slope = self._derivative(oracle, self._direction(oracle, place))
            found.append(slope)
        slopes = torch.stack(found) if found else torch.zeros(0, device=oracle.device)
        slopes = oracle.combined(slopes, self.q)
        check_finite(slopes, lambda place: f"along direction {place + 1} of {self.q}")
        for place, slope in enumerate(slopes.tolist()):
            for name, direction in self._direction(oracle, place).items():
                gradient_of(oracle.parameters[name]).add_(direction, alpha=scale * slope / self.q)
        square = float(slopes.square().mean())
        snr = signal_to_noise(square, 0.0, (oracle.dimensions + 1) / self.q, 0.0)
        return oracle.estimate(loss, snr, 2.0 * oracle.queries)

    @staticmethod
    def _direction(oracle: LossOracle, place: int) -> dict[str, Tensor]:
        generator = Generator(oracle.device).manual_seed(derived_seed(oracle.seed, place))
        drawn = {}
        for name, parameter in oracle.parameters.items():
            drawn[name] = draw_direction_(torch.empty_like(parameter), "normal", generator)
            if name in oracle.masks:
                drawn[name].mul_(oracle.masks[name])
        return drawn

    @staticmethod
    def _derivative(oracle: LossOracle, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        module = oracle.module
        assert module is not None  # noqa: S101  (checked before)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        oracle.queries += 1
        with torch.no_grad(), forward_ad.dual_level():
            duals = {
                names[id(parameter)]: forward_ad.make_dual(parameter.detach(), direction[name])
                for name, parameter in oracle.parameters.items()
            }
            try:
                with substituted(module, duals), unused_running_statistics(module):
                    primal, tangent = forward_ad.unpack_dual(oracle.value())
            except NotImplementedError as error:
                raise MisconfigurationException(
                    f"ForwardGradient needs operations that have a forward derivative, but one has none: {error}."
                    " Take RGE, which asks for values only."
                ) from error
        loss = oracle.scalar(primal)
        return loss, torch.zeros_like(loss) if tangent is None else oracle.scalar(tangent)
