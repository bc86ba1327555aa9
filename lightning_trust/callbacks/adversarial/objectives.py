"""How clean and adversarial inputs make one loss: the objectives of adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.attacks import FGSM, PGD, Attack, FastFGSM
from lightning_trust.attacks.preparation import attack_mode, prepared
from lightning_trust.core.modes import untouched_batchnorm
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.core.taps import captured_outputs
from lightning_trust.functional.adversarial.grad_align import gradient_misalignment
from lightning_trust.functional.adversarial.mart import mart_loss
from lightning_trust.functional.adversarial.projections import project_linf
from lightning_trust.functional.adversarial.trades import trades_kl

BatchNormUpdate = Literal["both", "adv", "clean"]
ObjectiveName = Literal["standard", "clean_and_adversarial", "fast", "trades", "mart", "fast_bat", "grad_align"]


@dataclass
class AdversarialStep:
    """One training step with clean and adversarial inputs: what an objective makes its loss of.

    Attributes:
        host: The host.
        network: Its network, whose outputs are logits.
        attack: The attack.
        space: Box and normalisation of the inputs.
        clean: Clean inputs, as the network gets them.
        adversarial: Adversarial inputs.
        targets: Targets of the batch.
        evaluate: The host's own loss with other inputs in the batch.
        draws: Random numbers of the samples.
        bn_update: Which forward passes move BatchNorm's running statistics.

    """

    host: nn.Module
    network: nn.Module
    attack: Attack
    space: InputSpace
    clean: Tensor
    adversarial: Tensor
    targets: Tensor
    evaluate: Callable[[Tensor], Tensor]
    draws: SampleDraws
    bn_update: BatchNormUpdate

    def loss(self, which: Literal["clean", "adv"]) -> Tensor:
        """The host's own loss on clean or adversarial inputs."""
        with self._statistics(which):
            return self.evaluate(self.clean if which == "clean" else self.adversarial)

    def loss_and_logits(self, which: Literal["clean", "adv"], inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The host's own loss and the logits that its network put out meanwhile: one forward pass gives both.

        Raises:
            MisconfigurationException: If the host's step does not call its network once, or on the whole batch.

        """
        inputs = inputs if inputs is not None else self.clean if which == "clean" else self.adversarial
        with self._statistics(which), captured_outputs(self.network) as outputs:
            loss = self.evaluate(inputs)
        if len(outputs) != 1:
            raise MisconfigurationException(
                f"Expected `{type(self.host).__name__}.training_step` to call its network"
                f" ({type(self.network).__name__}) once, because the objective uses its logits, but it was called"
                f" {len(outputs)} times. Name the part that gives logits with `network`, or take"
                " objective='clean_and_adversarial'."
            )
        return loss, self.checked(outputs[0])

    def logits(self, which: Literal["clean", "adv"]) -> Tensor:
        """Logits on clean or adversarial inputs, from a forward pass of their own."""
        return self.network_logits(self.clean if which == "clean" else self.adversarial, which)

    def network_logits(self, inputs: Tensor, which: Literal["clean", "adv", "masked"]) -> Tensor:
        """Logits on other inputs, from a forward pass of their own."""
        with self._statistics(which):
            return self.checked(self.network(inputs))

    def checked(self, outputs: Any) -> Tensor:
        """The outputs, where they are a batch of logits."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(self.clean):
            found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise MisconfigurationException(
                f"Expected {type(self.network).__name__} to put out logits of shape ({len(self.clean)}, K), because the"
                f" objective uses them, but got {found}. Name the part that gives logits with `network`."
            )
        return outputs

    def _statistics(self, which: Literal["clean", "adv", "masked"]) -> Any:
        counts = self.bn_update in ("both", which)
        return untouched_batchnorm(self.network if not counts else nn.Identity())


@dataclass
class Crafting:
    """What the adversarial inputs of a batch are made from.

    Attributes:
        attack: The attack, with the radius of this step.
        network: The host's network.
        inputs: Clean inputs.
        targets: Their targets.
        space: Box and normalisation of the inputs.
        draws: Random numbers of the samples.
        check: Whether inputs and gradients are looked at, which on a GPU waits for it.
        watch: Where it is kept whether gradients were finite.

    """

    attack: Attack
    network: nn.Module
    inputs: Tensor
    targets: Tensor
    space: InputSpace
    draws: SampleDraws
    check: bool = False
    watch: list[Tensor] = field(default_factory=list)

    def found_by(self, attack: Attack, network: nn.Module | None = None, targets: Tensor | None = None) -> Tensor:
        """What an attack finds for the batch, if need be on another network or for other targets."""
        return attack(
            network or self.network,
            self.inputs,
            self.targets if targets is None else targets,
            space=self.space,
            draws=self.draws,
            check=self.check,
            watch=self.watch,
        )

    def finite(self, found: Tensor) -> Tensor:
        """Whether all that was computed is finite, as a boolean scalar on the device."""
        return torch.stack([*self.watch, torch.isfinite(found.sum())]).all()


class Objective:
    """Base of objectives: plain objects that craft adversarial inputs and make the loss of a step."""

    #: whether it brings a loss; else the host's step runs on the adversarial inputs and that is all
    changes_loss: ClassVar[bool] = True
    #: whether the host's own loss does not count
    replaces_loss: ClassVar[bool] = False
    #: what the attack must be for this objective, whatever the user gave
    attack_arguments: ClassVar[dict[str, Any]] = {}

    def default_attack(self) -> Attack:
        """The attack of the paper."""
        return PGD(eps=8 / 255, step_size=2 / 255, steps=10)

    def craft(self, crafting: Crafting) -> Tensor:
        """Adversarial inputs of a batch."""
        return crafting.found_by(crafting.attack)

    def loss(self, step: AdversarialStep) -> Tensor:
        """The loss of a step, a scalar."""
        return step.loss("adv")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


class StandardAT(Objective):
    r"""The host's own loss on adversarial inputs: :math:`\ell(f(x'), y)`.

    Paper: Towards Deep Learning Models Resistant to Adversarial Attacks (ICLR 2018).
    """

    changes_loss = False


class FastAT(StandardAT):
    """The same with one FGSM step from a random start.

    Fast training may overfit to its one step all at once: robust accuracy against PGD falls to zero. Watch it with
    :class:`~lightning_trust.callbacks.RobustEvaluation` and stop with Lightning's ``EarlyStopping``.

    Paper: Fast is better than free: Revisiting adversarial training (ICLR 2020).
    """

    def default_attack(self) -> Attack:
        """FGSM of size 1.25 eps from a uniform start."""
        return FastFGSM(eps=8 / 255)


class CleanAndAdversarial(Objective):
    r"""The host's own loss on adversarial inputs, and on clean ones.

    .. math:: \ell(f(x'), y) + \lambda \, \ell(f(x), y)

    Papers: Explaining and Harnessing Adversarial Examples (ICLR 2015); as in Distributed Adversarial Training to
    Robustify Deep Neural Networks at Scale (UAI 2022).

    Args:
        clean_weight: Weight :math:`\lambda` of the clean loss, at least 0.

    Raises:
        ValueError: If the weight is negative.

    """

    def __init__(self, clean_weight: float = 1.0) -> None:
        self.clean_weight = at_least_zero("clean_weight", clean_weight)

    def loss(self, step: AdversarialStep) -> Tensor:
        """Both losses."""
        adversarial = step.loss("adv")
        return adversarial + self.clean_weight * step.loss("clean")


class TRADES(Objective):
    r"""The host's own loss on clean inputs, and how far predictions move within the ball.

    .. math:: \ell(f(x), y) + \beta \, D_{KL}(p(x) \,\Vert\, p(x')), \qquad
        x' = \arg\max_{\lVert \delta \rVert \le \epsilon} D_{KL}(p(x) \,\Vert\, p(x + \delta))

    The attack maximises the divergence, from :math:`x + 0.001 \, \mathcal{N}(0, I)`, whatever its own loss and start.

    Paper: Theoretically Principled Trade-off between Robustness and Accuracy (ICML 2019).

    Args:
        beta: Weight of the divergence, at least 0.

    Raises:
        ValueError: If the weight is negative.

    """

    attack_arguments: ClassVar[dict[str, Any]] = {"loss": "kl", "random_start": "gaussian"}

    def __init__(self, beta: float = 6.0) -> None:
        self.beta = at_least_zero("beta", beta)

    def default_attack(self) -> Attack:
        """Ten steps of 0.007 in a ball of 0.031, as in the paper."""
        return PGD(eps=0.031, step_size=0.007, steps=10)

    def loss(self, step: AdversarialStep) -> Tensor:
        """Own loss on clean inputs plus the divergence."""
        natural, clean = step.loss_and_logits("clean")
        return natural + self.beta * trades_kl(clean, step.logits("adv"))


class MART(Objective):
    """Boosted cross-entropy, and a divergence weighted by how badly the clean input is missed.

    The formula is :func:`~lightning_trust.functional.adversarial.mart_loss`. It takes the place of the host's loss; the
    host's step still runs on the adversarial inputs, so that it logs what it logs.

    Paper: Improving Adversarial Robustness Requires Revisiting Misclassified Examples (ICLR 2020).

    Args:
        beta: Weight of the divergence, at least 0.

    Raises:
        ValueError: If the weight is negative.

    """

    replaces_loss = True

    def __init__(self, beta: float = 5.0) -> None:
        self.beta = at_least_zero("beta", beta)

    def loss(self, step: AdversarialStep) -> Tensor:
        """MART's loss."""
        _, adversarial = step.loss_and_logits("adv")
        return mart_loss(step.logits("clean"), adversarial, step.targets, self.beta)


class GradAlign(Objective):
    r"""FGSM training, and the misalignment of input gradients between the clean input and a random point of the ball.

    .. math:: \ell(f(x'), y) + c \, (1 - \cos(\nabla_x \ell(f(x), y), \nabla_x \ell(f(x + \eta), y))), \qquad
        \eta \sim U(-\epsilon, \epsilon)

    Needs second derivatives of the network. The coefficient grows with the radius: 0.036, 0.063, 0.112, 0.2, 0.356,
    0.632, 1.124 and 2 for eps = 2, 4, ..., 16 / 255.

    Paper: Understanding and Improving Fast Adversarial Training (NeurIPS 2020).

    Args:
        coef: Coefficient :math:`c`, at least 0.

    Raises:
        ValueError: If the coefficient is negative.

    """

    def __init__(self, coef: float = 0.2) -> None:
        self.coef = at_least_zero("coef", coef)

    def default_attack(self) -> Attack:
        """FGSM."""
        return FGSM(eps=8 / 255)

    def loss(self, step: AdversarialStep) -> Tensor:
        """Own loss on adversarial inputs plus the misalignment."""
        adversarial = step.loss("adv")
        raw = step.space.to_raw(step.clean.detach().float())
        eta = (2.0 * step.draws.stream("eta").uniform(*raw.shape[1:]) - 1.0) * (step.attack.eps or 0.0)
        with attack_mode(step.network, step.attack.batch_norm):
            gradients = [input_gradient(step, place) for place in (raw, raw + eta)]
        return adversarial + self.coef * gradient_misalignment(*gradients)


class FastBAT(Objective):
    r"""Fast bi-level adversarial training: one linearised inner step, and its gradient with respect to the weights.

    .. math::
        z &= P(z_0 + a \, \nabla_\delta L(z_0)), \qquad h(\theta) = \nabla_\delta L(z; \theta), \qquad
        \delta^* = P(z + a \, h) \\
        \text{gradient} &= \nabla_\theta \ell(\delta^*) +
        \frac{1}{\lambda N} \nabla_\theta \langle h(\theta), H \odot \nabla_\delta L(\delta^*) \rangle

    with :math:`L` the summed cross-entropy, :math:`z_0` uniform in the ball, :math:`P` the projection on ball and box,
    and :math:`H` one where :math:`\delta^*` lies strictly inside. With :math:`\lambda \to \infty` it is fast
    adversarial training with steps that are not signed. Needs second derivatives of the network.

    Paper: Revisiting and Advancing Fast Adversarial Training Through The Lens of Bi-Level Optimization (ICML 2022).

    Args:
        lmbda: Regularisation :math:`\lambda` of the inner problem, positive.
        step_size: Size :math:`a` of the inner steps in raw units; if None, 5000/255 for eps up to 8/255, else 2000/255.

    Raises:
        ValueError: If a number is not positive.

    """

    def __init__(self, lmbda: float = 10.0, step_size: float | None = None) -> None:
        for name, value in (("lmbda", lmbda), ("step_size", step_size)):
            if value is not None and not value > 0.0:
                raise ValueError(f"Expected argument `{name}` to be positive, but got {value}.")
        self.lmbda = lmbda
        self.step_size = step_size
        self._point: Tensor | None = None

    def __repr__(self) -> str:
        return f"FastBAT(lmbda={self.lmbda}, step_size={self.step_size})"

    def default_attack(self) -> Attack:
        """Only the radius and the box of the attack are used."""
        return FastFGSM(eps=8 / 255)

    def craft(self, crafting: Crafting) -> Tensor:
        """The point of the two linearised steps."""
        attack, network, space, inputs = crafting.attack, crafting.network, crafting.space, crafting.inputs
        attack.check_budget(space)
        if crafting.check:
            space.check(inputs)
        eps = attack.eps or 0.0
        size = self._size(eps)
        raw = space.to_raw(inputs.detach().float())

        def ascended(place: Tensor) -> Tensor:
            place = place.detach().requires_grad_()
            outputs = network(space.from_raw(place).to(inputs.dtype))
            loss = F.cross_entropy(outputs.float(), crafting.targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, place)
            crafting.watch.append(torch.isfinite(gradient.sum()))
            return projected(place.detach() + size * gradient)

        def projected(place: Tensor) -> Tensor:
            return (raw + project_linf(place - raw, eps)).clamp(space.low, space.high)

        with torch.enable_grad(), prepared(network, attack.batch_norm):
            start = projected(raw + (2.0 * crafting.draws.uniform(*raw.shape[1:]) - 1.0) * eps)
            self._point = ascended(start)
            return space.from_raw(ascended(self._point)).to(inputs.dtype)

    def loss(self, step: AdversarialStep) -> Tensor:
        """Own loss at the point, plus what the point owes to the weights."""
        point = self._point
        if point is None:
            raise RuntimeError("FastBAT's loss needs the adversarial inputs that it crafted itself.")
        eps = step.attack.eps or 0.0
        adversarial = step.adversarial.detach().requires_grad_()
        loss, logits = step.loss_and_logits("adv", adversarial)
        summed = F.cross_entropy(logits.float(), step.targets, reduction="sum")
        (outer,) = torch.autograd.grad(summed, adversarial, retain_graph=True)
        # gradients with respect to the raw inputs
        outer = outer.float() * step.space.scale(outer)
        raw, clean = (step.space.to_raw(each.detach().float()) for each in (adversarial, step.clean))
        inside = ((raw - clean).abs() < eps - 1e-7) & (raw > step.space.low + 1e-7) & (raw < step.space.high - 1e-7)
        with attack_mode(step.network, step.attack.batch_norm):
            inner = input_gradient(step, point)
        return loss + (inner * (outer * inside).detach()).sum() / (self.lmbda * len(raw))

    def _size(self, eps: float) -> float:
        if self.step_size is not None:
            return self.step_size
        return 5000 / 255 if eps <= 8 / 255 + 1e-9 else 2000 / 255


def input_gradient(step: AdversarialStep, raw: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy with respect to raw inputs, itself differentiable."""
    place = raw.detach().requires_grad_()
    logits = step.checked(step.network(step.space.from_raw(place).to(step.clean.dtype)))
    loss = F.cross_entropy(logits.float(), step.targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, place, create_graph=True)
    return gradient


def at_least_zero(name: str, value: float) -> float:
    """The value, where it is a number that is not negative."""
    if not value >= 0.0:
        raise ValueError(f"Expected argument `{name}` to be at least 0, but got {value}.")
    return value


_OBJECTIVES: dict[str, type[Objective]] = {
    "standard": StandardAT,
    "clean_and_adversarial": CleanAndAdversarial,
    "fast": FastAT,
    "trades": TRADES,
    "mart": MART,
    "fast_bat": FastBAT,
    "grad_align": GradAlign,
}


def create_objective(objective: Objective | str) -> Objective:
    """An objective by its name, with the arguments of its paper, or the object itself.

    Raises:
        ValueError: If there is no such objective.

    """
    if isinstance(objective, Objective):
        return objective
    if objective not in _OBJECTIVES:
        raise ValueError(
            f"Expected argument `objective` to be one of {list(get_args(ObjectiveName))} or an Objective, but got"
            f" {objective!r}."
        )
    return _OBJECTIVES[objective]()
