"""Prompts that make a frozen classifier more robust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_trust.attacks.attack import Attack
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.learning_rates import LearningRates
from lightning_trust.core.step import StepContext, StepTransform
from lightning_trust.core.wrapping import SurroundingCallback
from lightning_trust.functional.prompting import class_wise_cross_entropy, class_wise_interrelation
from lightning_trust.nn.prompting.class_wise_prompt import ClassWisePrompt


class AdversarialPrompting(StepTransform, SurroundingCallback):
    r"""Train one prompt for each class of a frozen classifier, against attacks on the network under its prompts.

    "Visual Prompting for Adversarial Robustness" (ICASSP 2023), C-AVP. With the prompted images :math:`x^{(i)}` and
    adversarial ones :math:`x^{(i)} + \delta` crafted on the network,

    .. math:: \sum_i \underset{y = i}{\mathrm{mean}} \big( \mathrm{CE}(f(x^{(i)}), i)
        + \mathrm{CE}(f(x^{(i)} + \delta), i) \big) + \beta \, \mathrm{CW}

    replaces the host's loss; CW is :func:`lightning_trust.functional.prompting.class_wise_interrelation`. The host's
    network then answers :math:`\arg\max_i q_{ii}` wherever it is called. With ``num_prompts=1`` it is the universal
    prompt, without an attack and with ``beta=0`` plain visual prompting.

    The published robust accuracy is under attacks that do not know of the prompts. Evaluate both:
    ``RobustEvaluation({"transfer": WithoutPrompt(attack), "adaptive": attack})``.

    Logs ``trust/prompt_saturated`` once an epoch, the share of prompted pixels without a gradient.

    Args:
        prompt: The prompts.
        attack: Attack on the network under the prompt of the true class; None trains on clean images alone.
        tau: Margin from which on an interrelation no longer counts.
        beta: Weight of the interrelations.
        terms: Which of the three interrelations count.
        network: Name of the host's network; found by itself if None.
        optimizer: Called with the prompts, gives the optimizer; SGD with learning rate 0.1 and momentum 0.9 by default.
        schedule: Learning rate of ``optimizer`` over the run.
        batch_spec: Where inputs and targets sit in a batch.
        name: Tells two callbacks of one class apart.
        seed: Seed of the attack's random starts; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If ``tau`` or ``beta`` is negative, labels are out of range, or images are outside [0, 1].

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> from lightning_trust.nn import ClassWisePrompt
        >>> callback = AdversarialPrompting(ClassWisePrompt(10), PGD(eps=8 / 255, step_size=2 / 255, steps=10))
        >>> callback.prompt.delta.shape
        torch.Size([10, 3, 32, 32])

    """

    replaces_loss = True

    def __init__(
        self,
        prompt: ClassWisePrompt,
        attack: Attack | None = None,
        tau: float = 0.1,
        beta: float = 3.0,
        terms: Sequence[bool] = (True, True, True),
        network: str | None = None,
        optimizer: OptimizerCallable | None = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        schedule: LearningRates = "cosine",
        batch_spec: BatchSpec | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        SurroundingCallback.__init__(self, prompt, network, optimizer, schedule, name, seed)
        self.batch_spec = batch_spec or BatchSpec()
        for argument, value in (("tau", tau), ("beta", beta)):
            if not value >= 0.0:
                raise ValueError(f"Expected argument `{argument}` to be at least 0, but got {value}.")
        if len(terms) != 3:
            raise ValueError(f"Expected argument `terms` to hold three booleans, but got {list(terms)}.")
        self.attack = attack
        self.tau = tau
        self.beta = beta
        self.terms = tuple(terms)

    @property
    def prompt(self) -> ClassWisePrompt:
        """The prompts."""
        return self.part  # type: ignore[return-value]

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """The loss of the prompts; the host's own is not evaluated."""
        inputs, targets = self.batch_spec.inputs_of(batch), self.batch_spec.targets_of(batch)
        prompt, network = self.prompt, self._network
        assert network is not None  # noqa: S101  (the run has built it)
        if ctx.total_batch_idx == 0:
            self._check(inputs, targets)
        prompt.calls += 1
        images = prompt.images(inputs)
        rows = torch.arange(len(inputs), device=inputs.device)
        with prompt.removed():
            logits = prompt.grouped(network(images.flatten(0, 1)))
            loss = class_wise_cross_entropy(logits, targets)
            if self.beta > 0.0:
                loss = loss + self.beta * class_wise_interrelation(logits, targets, self.tau, self.terms)
            if self.attack is not None:
                own = images[rows, targets if prompt.num_prompts > 1 else 0]
                draws = self.random.samples(len(inputs), ctx.total_batch_idx, device=inputs.device)
                found = self.attack(network, own.detach(), targets, draws=draws, check=ctx.total_batch_idx == 0)
                moved = own + (found - own).detach()
                attacked = logits.new_zeros(logits.shape).index_put(
                    (rows, targets if prompt.num_prompts > 1 else torch.zeros_like(targets)), network(moved)
                )
                loss = loss + class_wise_cross_entropy(attacked, targets)
        host.log("trust/prompt_loss", loss.detach(), batch_size=len(inputs))
        saturated = prompt.saturated(inputs)
        host.log("trust/prompt_saturated", saturated, on_step=False, on_epoch=True, batch_size=len(inputs))
        return loss

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        count = self.prompt.num_prompts
        if targets.ndim != 1 or targets.is_floating_point():
            raise ValueError(
                f"Expected one class a sample as targets, int64 of shape (B,), but got {tuple(targets.shape)}."
            )
        if count > 1 and not (int(targets.min()) >= 0 and int(targets.max()) < count):
            raise ValueError(
                f"Expected targets in [0, num_prompts={count}), but got {int(targets.min())} to {int(targets.max())}."
            )
        if self.prompt.clip and not (float(inputs.min()) >= 0.0 and float(inputs.max()) <= 1.0):
            raise ValueError(
                f"Expected images in [0, 1], where prompts are clipped, but got {float(inputs.min()):g} to"
                f" {float(inputs.max()):g}. Let the network normalise, or pass `clip=False` to the prompt."
            )
