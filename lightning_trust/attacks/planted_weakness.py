"""A copy of a network in which an adversarial example is known to exist: whoever cannot find it proves nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_trust.attacks.attack import Attack
from lightning_trust.attacks.pgd import random_in_ball
from lightning_trust.attacks.preparation import check_counts
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm, norm_of, per_sample

# points of the surface of which one is chosen
_OUTER = 32


class PlantedWeakness(nn.Module):
    r"""A two-way readout of a network's outputs that one known point of the ball crosses.

    .. math:: s(x) = \frac{\langle v, f(x) \rangle - m}{h}, \qquad v = f(b) - \overline{f(x_i)}

    with random inner points :math:`x_i` of the ball and, of a few random points on its surface, the one :math:`b` that
    is best told from them; :math:`m` and :math:`h` put the clean input and all inner points at :math:`s \le -1` and
    :math:`b` at 1. The true class has logit 0, another one :math:`s(x)`, the rest a constant far below.

    Paper: Increasing Confidence in Adversarial Robustness Evaluations (NeurIPS 2022), whose test it simplifies: the
    readout stands on the logits.

    Args:
        network: The network, of which a copy is made.
        sample: One raw input, shape ``(1, ...)``.
        target: Its class, shape ``(1,)``.
        eps: Radius of the ball.
        norm: Norm of the ball.
        space: Box and normalisation of the inputs.
        draws: Random numbers of the sample.
        inner: Number of inner points, at least 1.

    Raises:
        ValueError: If ``inner`` is less than 1.

    Attributes:
        known: The point that crosses, raw, shape ``(1, ...)``.
        testable: Whether the outputs tell the known point from the inner ones.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> sample, draws = torch.full((1, 1, 4, 4), 0.5), SampleDraws(torch.arange(1), seed=0)
        >>> planted = PlantedWeakness(network, sample, torch.tensor([2]), 0.1, "linf", InputSpace(), draws)
        >>> planted(sample).argmax().item(), planted(planted.known).argmax().item()
        (2, 0)
        >>> round((planted.known - sample).abs().max().item(), 4)
        0.1

    """

    direction: Tensor
    middle: Tensor
    half_width: Tensor

    def __init__(
        self,
        network: nn.Module,
        sample: Tensor,
        target: Tensor,
        eps: float,
        norm: Norm,
        space: InputSpace,
        draws: SampleDraws,
        inner: int = 64,
    ) -> None:
        super().__init__()
        check_counts(inner=inner)
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        shape, count = sample.shape[1:], inner + _OUTER
        points = SampleDraws(torch.arange(count, device=sample.device), draws.seed)
        offsets = random_in_ball(points, sample.expand(count, *shape), eps, norm)
        last = offsets[inner:]
        # the last ones are pushed out to the surface
        offsets[inner:] = (
            last.sign() * eps if norm == "linf" else last * per_sample(eps / norm_of(last, norm).clamp_min(1e-12), last)
        )
        places = torch.cat([sample, (sample + offsets).clamp(space.low, space.high)])
        kind = next((parameter.dtype for parameter in self.network.parameters()), sample.dtype)
        with torch.no_grad():
            outputs = self.network(space.from_raw(places).to(kind)).float()
        near, far = outputs[: inner + 1], outputs[inner + 1 :]
        self.classes = outputs.shape[1]
        self.target = int(target)
        self.other = (self.target + 1) % self.classes
        directions = far - near.mean(dim=0)
        projected = near @ directions.T
        reached, highest = (far * directions).sum(dim=1), projected.amax(dim=0)
        ahead = (reached - highest) / directions.square().sum(dim=1)
        best = int(ahead.nan_to_num(-torch.inf).argmax())
        self.known = places[inner + 1 + best : inner + 2 + best]
        self.register_buffer("direction", directions[best])
        self.register_buffer("middle", (reached + highest)[best] / 2)
        self.register_buffer("half_width", (reached - highest)[best] / 2)
        self.testable = bool(reached[best] > highest[best] + 1e-4 * projected[:, best].abs().max())

    def forward(self, x: Tensor) -> Tensor:
        """Inputs as the network takes them -> logits of the planted classifier."""
        score = (self.network(x).float() @ self.direction - self.middle) / self.half_width
        logits = torch.full((len(x), self.classes), -10.0, device=x.device)
        logits[:, self.target] = 0.0
        logits[:, self.other] = score
        return logits


@dataclass(frozen=True)
class SelfTest:
    """What an attack found in networks with a planted weakness.

    Attributes:
        found: In how many samples the attack found an adversarial input.
        testable: In how many there was one to be found.

    """

    found: int
    testable: int


def find_planted_weakness(
    attack: Attack, network: nn.Module, inputs: Tensor, targets: Tensor, space: InputSpace, seed: int = 0
) -> SelfTest:
    """Let an attack look for weaknesses that are known to be there, one sample at a time.

    Args:
        attack: The attack, with a radius.
        network: The network, in whose copies the weakness is planted.
        inputs: As the network takes them.
        targets: Their classes.
        space: Box and normalisation of the inputs.
        seed: Seed of the random points.

    Returns:
        How many were found, and in how many samples there was something to be found.

    Raises:
        ValueError: If the attack has no radius.

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> find_planted_weakness(PGD(eps=0.1), network, torch.rand(4, 1, 4, 4), torch.arange(4) % 3, InputSpace())
        SelfTest(found=4, testable=4)

    """
    if attack.eps is None:
        raise ValueError(f"Expected an attack with a radius `eps`, but {type(attack).__name__} has none.")
    found = testable = 0
    for row in range(len(inputs)):
        sample, target = inputs[row : row + 1], targets[row : row + 1]
        raw = space.to_raw(sample.float())
        draws = SampleDraws(torch.tensor([row], device=inputs.device), seed + row)
        with torch.inference_mode(False), torch.no_grad():
            planted = PlantedWeakness(network, raw.clone(), target.clone(), attack.eps, attack.norm, space, draws)
        if not planted.testable:
            continue
        testable += 1
        adversarial = attack(planted, sample, target, space=space, draws=draws.stream("attack"))
        with torch.no_grad():
            found += int(planted(adversarial).argmax(dim=1).ne(target).item())
    return SelfTest(found, testable)
