"""MeZO: a step along random directions, in the memory of inference."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.core.randomness import derived_seed
from lightning_trust.optim.layers import check_range
from lightning_trust.optim.zeroth_order.directions import SeededDirections
from lightning_trust.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle, check_count, check_finite, check_mu
from lightning_trust.optim.zeroth_order.rge import RGE, slopes_snr


class MeZO(ZerothOrderOptimizer):
    r"""Memory-efficient zeroth-order optimizer: SGD on a random gradient estimate that is never stored.

    .. math:: c = \frac{l(\theta + \mu z) - l(\theta - \mu z)}{2 \mu}, \qquad
        \theta \leftarrow (1 - \eta \lambda) \theta - \eta c z, \qquad z \sim \mathcal{N}(0, I)

    The direction is drawn three times from its seed: to move the weights forward, to move them back, and to restore and
    update them in one go. What a step needs beside the forward pass is the memory of the largest parameter; there is no
    ``.grad``. With ``q`` directions the update is the mean over them. In a Trainer it runs under the callback
    ``ZerothOrderGradient()``.

    Paper: Fine-Tuning Language Models with Just Forward Passes (NeurIPS 2023, arXiv:2305.17333).

    Args:
        params: Parameters, named parameters, or parameter groups; with names, ``undecayed`` takes effect.
        lr: Learning rate :math:`\eta`, at least 0; about the gradient's rate over the number of trained weights.
        mu: Length :math:`\mu` of a difference.
        q: Number of directions a step.
        weight_decay: Weight decay :math:`\lambda`, at least 0.
        undecayed: Parts of names of parameters that are not decayed.
        seed: Seed of the directions; the one of ``seed_everything`` if None.
        module: Not used; here for all zeroth-order optimizers to be made alike.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = MeZO([weight], lr=0.05)
        >>> losses = [float(optimizer.step(lambda: weight.square().sum())) for _ in range(200)]
        >>> losses[0] > 1.0, losses[-1] < 1e-2, weight.grad is None
        (True, True, True)

    """

    published_steps: ClassVar[int | None] = 20_000

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        mu: float = 1e-3,
        q: int = 1,
        weight_decay: float = 0.0,
        undecayed: tuple[str, ...] = ("bias", "layernorm", "layer_norm"),
        seed: int | None = None,
        module: nn.Module | None = None,
    ) -> None:
        check_range("lr", lr)
        check_range("weight_decay", weight_decay)
        check_mu(mu)
        check_count("q", q)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, module, seed)
        self.mu = mu
        self.q = q
        self.undecayed = undecayed

    def move(self, oracle: LossOracle) -> Estimate:
        """Take one step."""
        if self.q > 1 or oracle.splits:
            return self._move_by_several(oracle)
        directions = SeededDirections(oracle.parameters, "normal", oracle.masks)
        seed = derived_seed(oracle.seed, 0)
        offset = 0.0
        try:
            directions.move(seed, self.mu)
            offset = self.mu
            above = oracle()
            directions.move(seed, -2.0 * self.mu)
            offset = -self.mu
            below = oracle()
            slope = oracle.combined(((above - below) / (2.0 * self.mu)).reshape(1))
            check_finite(slope, lambda _: f"along the direction of the step (mu={self.mu:g})")
        except BaseException:
            # the weights are the user's
            if offset:
                directions.move(seed, -offset)
            raise
        rates, shrink = self._settings(oracle)
        value = float(slope)
        # one pass over the weights for the way back and the update
        by = {name: self.mu * shrink[name] - rate * value for name, rate in rates.items()}
        directions.move(seed, by, shrink)
        return oracle.estimate((above + below) / 2.0, slopes_snr(slope, oracle.dimensions, self.mu, above))

    def _move_by_several(self, oracle: LossOracle) -> Estimate:
        slopes = RGE(self.q, self.mu).slopes(oracle)
        rates, shrink = self._settings(oracle)
        for place, (seed, factor) in enumerate(zip(slopes.seeds, slopes.factors(), strict=True)):
            by = {name: -rate * factor for name, rate in rates.items()}
            slopes.directions.move(seed, by, shrink if place == 0 else None)
        return slopes.estimate

    def _settings(self, oracle: LossOracle) -> tuple[dict[str, float], dict[str, float]]:
        """Learning rate and factor of each parameter."""
        names = {id(parameter): name for name, parameter in oracle.parameters.items()}
        rates, shrink = {}, {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    continue
                name = names[id(parameter)]
                decayed = not any(part in name.lower() for part in self.undecayed)
                rates[name] = float(group["lr"])
                shrink[name] = 1.0 - rates[name] * float(group["weight_decay"]) if decayed else 1.0
        return rates, shrink
