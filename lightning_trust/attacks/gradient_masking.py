"""Signs that a robust accuracy is due to gradients that cannot be followed, not to robustness."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import Tensor

from lightning_trust.attacks.apgd import APGD
from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.preparation import Model, check_positive
from lightning_trust.attacks.square import Square
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm

# differences of outputs, scaled to length one, beyond rounding: as in the authors' checks
_RANDOM, _PROBABILITY, _BETTER = 1e-4, 1e-5, 0.002


class GradientMaskingWarning(UserWarning):
    """An attack's verdict may be too good for the network."""


def check_gradient_masking(
    model: Model,
    inputs: Tensor,
    targets: Tensor,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    *,
    steps: int = 20,
    n_queries: int = 500,
    space: InputSpace | None = None,
    draws: SampleDraws | None = None,
) -> list[str]:
    """Look for signs of masked gradients, and warn of each.

    It says so where two forward passes differ, outputs look like probabilities, there are too few classes for the
    difference of logits ratio, gradients of the cross-entropy are exactly 0, or Square, which asks for scores only,
    breaks samples that APGD on the cross-entropy and on the margin cannot. A network without any of these may be masked
    all the same.

    Paper: Obfuscated Gradients Give a False Sense of Security (ICML 2018); the checks of Reliable Evaluation of
    Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (ICML 2020).

    Args:
        model: Maps inputs to logits ``(N, K)``.
        inputs: As the model takes them.
        targets: True classes, int64, shape ``(N,)``.
        eps: Radius in raw units, positive.
        norm: Norm of the ball.
        steps: Steps of APGD.
        n_queries: Queries of Square; 0 leaves the comparison out, as do inputs that are no images ``(N, C, H, W)``.
        space: Box and normalisation of the inputs.
        draws: Random numbers of the samples.

    Returns:
        What was found, one sentence each; empty if nothing was.

    Warns:
        GradientMaskingWarning: For each.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5), torch.nn.Softmax(dim=1))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     found = check_gradient_masking(network, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=0.1)
        >>> found[0]
        'The outputs look like probabilities. Attacks need logits: leave the softmax out.'

    """
    check_positive(eps=eps)
    probe = _Probe(eps, norm, steps, n_queries, space)
    probe(model, inputs, targets, space=space, draws=draws)
    for sentence in probe.found:
        warnings.warn(sentence, GradientMaskingWarning, stacklevel=2)
    return probe.found


def outputs_differ(first: Tensor, second: Tensor) -> bool:
    """Whether the outputs of two forward passes on the same inputs differ by more than rounding."""
    scale = first.norm(dim=1).clamp_min(1e-10)
    return bool(((first - second).norm(dim=1) / scale > _RANDOM).any())


class _Probe(Attack):
    """The checks, run where the attacks are: in raw units, in eval mode, outside of inference mode."""

    def __init__(self, eps: float, norm: Norm, steps: int, n_queries: int, space: InputSpace | None) -> None:
        super().__init__(eps, norm, space=space)
        losses: tuple[Literal["ce", "margin"], ...] = ("ce", "margin")
        self.ascents = [APGD(eps, norm, loss, steps) for loss in losses]
        self.square = Square(eps, norm, n_queries) if n_queries else None
        self.found: list[str] = []

    def _perturb(self, problem: Problem) -> Tensor:
        x = problem.inputs
        outputs = problem.outputs(x)
        self.found = []
        if random := outputs_differ(outputs, problem.outputs(x)):
            self.found.append(
                "Two forward passes on the same inputs differ: the network answers at random. Use"
                " AutoAttack(version='rand'), or an attack with eot_iter > 1."
            )
        if (
            outputs.min() >= -_PROBABILITY
            and outputs.max() <= 1.0 + _PROBABILITY
            and bool(((outputs.sum(dim=1) - 1.0).abs() < _PROBABILITY).all())
        ):
            self.found.append("The outputs look like probabilities. Attacks need logits: leave the softmax out.")
        if outputs.shape[1] < 4:
            self.found.append(
                f"With {outputs.shape[1]} classes there is no targeted difference of logits ratio (it needs 4, the"
                " untargeted one 3). Use loss='ce' or 'margin'."
            )
        gradient, _, _ = self.gradient(problem, x)
        flat = int((gradient.flatten(1) == 0).all(dim=1).sum())
        if flat:
            self.found.append(
                f"The gradient of the cross-entropy is exactly 0 in {flat} of {len(x)} samples: attacks that follow it"
                " go nowhere there. Use loss='dlr' or 'margin', a higher precision, or attacks on scores."
            )
        if self.square is not None and not random and x.ndim == 4:
            self._compare(problem, outputs)
        return x

    def _compare(self, problem: Problem, outputs: Tensor) -> None:
        """Run Square on what APGD has left."""
        left = (~problem.fooled(outputs)).nonzero().squeeze(1)
        for attack in self.ascents:
            if len(left):
                some = problem.rows(left)
                moved = attack.search(some, outputs[left])
                left = left[~some.fooled(problem.outputs(moved))]
        if self.square is None or not len(left):
            return
        some = problem.rows(left)
        moved = self.square.search(some, outputs[left])
        broken = int(some.fooled(problem.outputs(moved)).sum())
        if broken > _BETTER * len(problem):
            self.found.append(
                f"Square, which sees no gradients, broke {broken} of the {len(left)} samples that APGD could not. Do"
                " not trust gradients here: use more queries, more restarts, or an attack made for this network."
            )
