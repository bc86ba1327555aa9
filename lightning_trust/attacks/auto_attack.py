"""AutoAttack: the worst case over attacks that need no tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_trust.attacks.apgd import APGD, APGDTargeted
from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.fab import FAB
from lightning_trust.attacks.gradient_masking import GradientMaskingWarning, outputs_differ
from lightning_trust.attacks.preparation import Model, check_counts, prepared
from lightning_trust.attacks.search import SearchAttack
from lightning_trust.attacks.square import Square
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm, norm_of

Version = Literal["standard", "plus", "rand", "custom"]
_VERSIONS = ("standard", "plus", "rand", "custom")


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack found.

    Attributes:
        inputs: Adversarial inputs, as the attack's call returns them.
        clean_correct: Which samples the network gets right unperturbed, boolean, shape ``(N,)``.
        robust: Which of them no attack has broken.
        broken_by: For each attack, in their order, the samples that it broke; it met only what was left.

    """

    inputs: Tensor
    clean_correct: Tensor
    robust: Tensor
    broken_by: dict[str, Tensor]

    @property
    def clean_accuracy(self) -> float:
        """Share of the samples that are right unperturbed."""
        return self.clean_correct.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that are right unperturbed and under every attack."""
        return self.robust.double().mean().item()


class AutoAttack(Attack):
    r"""Ensemble of attacks without parameters, each run on what the others before it have left.

    * ``"standard"``: APGD on the cross-entropy, targeted APGD on the difference of logits ratio, targeted FAB, Square;
    * ``"plus"``: APGD on the cross-entropy and on the difference of logits ratio, with five restarts, FAB with five,
      Square, targeted APGD, targeted FAB;
    * ``"rand"``, for networks that answer at random: APGD on both losses, each step averaged over ``eot_iter`` passes,
      all steps taken, since a point that has just won on average is answered right nearly half of the time;
    * ``"custom"``: the attacks given.

    For l1, APGD begins in balls of three and two times the radius, the first with five restarts and the targeted one
    with five classes.

    A sample is out as soon as one attack has broken it, in the midst of its steps, and what the network gets wrong
    already is not attacked: neither changes a verdict. What is returned as adversarial has been put through the network
    once more, in the precision of the run. Random numbers are tied to the samples, so that a verdict does not depend on
    what else is in the batch.

    Where attacks average over ``eot_iter`` passes, so do the verdicts, over the probabilities of as many fresh ones.

    Paper: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (ICML 2020);
    l1: Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers (ICML 2021).

    Args:
        eps: Radius in raw units, positive.
        norm: Norm of the ball.
        version: Which attacks.
        attacks: For ``version="custom"``, attacks of the same norm and radius (or without one), untargeted, in order.
        steps: Steps of APGD and FAB.
        n_queries: Queries of Square.
        eot_iter: Passes a step, and a verdict, in ``version="rand"``.
        seed: Seed of the random numbers; they come from the ``draws`` of the call if None.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or the network has too few classes for a loss: three for
            ``"rand"``, four for ``"standard"`` and ``"plus"``.

    Warns:
        GradientMaskingWarning: If the network answers at random and no attack averages over that. Verdicts are then
            those of single passes.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
        >>> inputs = torch.rand(8, 1, 4, 4)
        >>> result = AutoAttack(eps=0.05, steps=10, n_queries=50, seed=0).evaluate(
        ...     network, inputs, network(inputs).argmax(dim=1)
        ... )
        >>> result.clean_accuracy, result.robust_accuracy
        (1.0, 0.625)
        >>> list(result.broken_by)
        ['apgd-ce', 'apgd-t', 'fab-t', 'square']

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: Norm = "linf",
        version: Version = "standard",
        attacks: Sequence[Attack] | None = None,
        steps: int = 100,
        n_queries: int = 5000,
        eot_iter: int = 20,
        seed: int | None = None,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, norm, False, "ce", "eval", space, batch_size)
        if version not in _VERSIONS:
            raise ValueError(f"Expected argument `version` to be one of {list(_VERSIONS)}, but got {version!r}.")
        check_counts(steps=steps, n_queries=n_queries, eot_iter=eot_iter)
        if (version == "custom") != bool(attacks):
            raise ValueError(
                f"Expected argument `attacks` with version='custom', and only then, but got version={version!r} and"
                f" {len(attacks or ())} attacks."
            )
        for attack in attacks or ():
            self._check_member(attack, eps, norm)
        self.eps: float = eps
        self.version = version
        self.attacks = None if attacks is None else list(attacks)
        self.steps = steps
        self.n_queries = n_queries
        self.eot_iter = eot_iter
        self.seed = seed
        self._parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] | None = None

    @staticmethod
    def _check_member(attack: Attack, eps: float, norm: Norm) -> None:
        expected = {"targeted": False, "batch_norm": "eval", "space": None, "batch_size": None}
        if attack.eps is not None:
            expected |= {"eps": eps, "norm": norm}
        for name, value in expected.items():
            if getattr(attack, name) != value:
                raise ValueError(
                    f"Expected every attack in argument `attacks` to have {name}={value!r}, as the AutoAttack that"
                    f" holds it, but got {attack!r}."
                )

    def members(self) -> dict[str, Attack]:
        """The attacks by name, in their order."""
        eps, norm, steps = self.eps, self.norm, self.steps
        if self.attacks is not None:
            named: dict[str, Attack] = {}
            for attack in self.attacks:
                name, number = type(attack).__name__, 2
                while name in named:
                    name, number = f"{type(attack).__name__}-{number}", number + 1
                # a copy of this object may have got another radius
                named[name] = attack if attack.eps is None else attack.replaced(eps=eps)
            return named
        l1 = norm == "l1"
        if self.version == "rand":
            return {
                f"apgd-{loss}": APGD(eps, norm, loss, steps, eot_iter=self.eot_iter, larger_eps=l1, early_stop=False)
                for loss in ("ce", "dlr")
            }
        restarts = 5 if l1 or self.version == "plus" else 1
        targets = 5 if l1 and self.version == "standard" else 9
        # the schedule of the windows is that of the paper for any number of queries, as in the authors' code
        members: dict[str, Attack] = {
            "apgd-ce": APGD(eps, norm, "ce", steps, restarts, larger_eps=l1),
            "apgd-dlr": APGD(eps, norm, "dlr", steps, restarts, larger_eps=l1),
            "fab": FAB(eps, norm, steps, restarts=5),
            "apgd-t": APGDTargeted(eps, norm, targets, steps=steps, larger_eps=l1),
            "fab-t": FAB(eps, norm, steps, n_target_classes=9),
            "square": Square(eps, norm, self.n_queries, resc_schedule=False),
        }
        order = {
            "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
            "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
        }
        return {name: members[name] for name in order[self.version]}

    def evaluate(
        self,
        model: Model,
        inputs: Tensor,
        targets: Tensor,
        *,
        space: InputSpace | None = None,
        draws: SampleDraws | None = None,
        check: bool = True,
    ) -> AutoAttackResult:
        """Attack a batch and tell which attack broke which sample.

        Args:
            model: As in the call, like the other arguments.
            inputs: Inputs as the model takes them.
            targets: True classes.
            space: Box and normalisation of the inputs.
            draws: Random numbers of the samples.
            check: Whether inputs, targets and gradients are looked at.

        Returns:
            Adversarial inputs and verdicts.

        """
        twin = copy.copy(self)
        parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        twin._parts = parts
        adversarial = twin(model, inputs, targets, space=space, draws=draws, check=check)
        if not parts:
            # a radius of zero: there is nothing to attack
            with torch.no_grad(), prepared(model):
                right = _averaged(model, inputs, self._passes()).argmax(dim=1) == targets
            parts.append((right, right, {name: torch.zeros_like(right) for name in self.members()}))
        right, robust = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        broken = {name: torch.cat([part[2][name] for part in parts]) for name in parts[0][2]}
        return AutoAttackResult(adversarial, right, robust, broken)

    def _perturb(self, problem: Problem) -> Tensor:
        if self.seed is not None:
            problem = replace(problem, draws=SampleDraws(problem.draws.keys, self.seed))
        passes = self._passes()
        outputs = _averaged(problem.outputs, problem.inputs, passes)
        self._check_classes(outputs.shape[1])
        right = ~problem.fooled(outputs)
        result, robust = problem.inputs.clone(), right.clone()
        by: dict[str, Tensor] = {}
        for name, attack in self.members().items():
            by[name] = torch.zeros_like(right)
            left = robust.nonzero().squeeze(1)
            if not len(left):
                continue
            some = replace(problem.rows(left), draws=problem.draws.stream(name).rows(left))
            known = isinstance(attack, SearchAttack) and isinstance(attack.loss, str) and attack.loss != "kl"
            found = attack.search(some, outputs[left]) if known else attack.perturb(some)  # type: ignore[attr-defined]
            broken = some.fooled(_averaged(some.outputs, found, passes)) & self._inside(found - some.inputs)
            by[name][left[broken]] = True
            robust[left[broken]] = False
            result[left[broken]] = found[broken]
        attacked = (right & ~robust).nonzero().squeeze(1)
        if len(attacked) and passes == 1:
            held = attacked[self._tipped(problem.rows(attacked), result[attacked])]
            robust[held] = True
            result[held] = problem.inputs[held]
            for broken in by.values():
                broken[held] = False
        if self._parts is not None:
            self._parts.append((right, robust, by))
        return result

    def _passes(self) -> int:
        """How many forward passes a verdict takes: as many as a step of the attacks that average most."""
        return max(getattr(attack, "eot_iter", 1) for attack in self.members().values())

    @staticmethod
    def _tipped(problem: Problem, points: Tensor) -> Tensor:
        """Which points, found in other company, roundoff tips back over the boundary on which they lie."""
        outputs = problem.outputs(points)
        tipped = ~problem.fooled(outputs)
        if bool(tipped.any()) and outputs_differ(outputs, problem.outputs(points)):
            # not roundoff: a second throw of the dice would only give back what the first one took
            rank_zero_warn(
                "Two forward passes on the same inputs differ: the network answers at random. Use"
                " AutoAttack(version='rand'), which averages over that.",
                category=GradientMaskingWarning,
            )
            return torch.zeros_like(tipped)
        return tipped

    def _inside(self, delta: Tensor) -> Tensor:
        return norm_of(delta, self.norm) <= self.eps * (1.0 + 1e-5) + 1e-7

    def _check_classes(self, classes: int) -> None:
        least = {"standard": 4, "plus": 4, "rand": 3, "custom": 2}[self.version]
        if classes < least:
            raise ValueError(
                f"Expected at least {least} classes for AutoAttack(version={self.version!r}), whose losses are ratios"
                f" of that many logits, but the network has {classes}. With version='custom' choose attacks on"
                " loss='ce', such as APGD(loss='ce') and APGDTargeted(loss='ce'), FAB and Square."
            )


def _averaged(model: Model, points: Tensor, passes: int) -> Tensor:
    """Outputs of one forward pass, or logarithms of the mean probabilities of several."""
    if passes == 1:
        return model(points)
    logarithms = torch.stack([model(points).log_softmax(dim=1) for _ in range(passes)])
    return logarithms.logsumexp(dim=0) - math.log(passes)
