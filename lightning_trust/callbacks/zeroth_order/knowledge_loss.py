"""A penalty on what a simulator says of the network's predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import sum_over_ranks_, world_size
from lightning_trust.core.modes import untouched_batchnorm
from lightning_trust.core.step import Claim, StepContext, StepTransform
from lightning_trust.nn import BlackBoxLayer


class KnowledgeLoss(StepTransform):
    r"""Adds to the loss how far a scientific knowledge source is from what it should say of the network's output.

    .. math:: \mathcal{L} + \lambda \, \frac1B \sum_{i=1}^B \lVert g(h_\theta(x_i)) - t_i \rVert_2^2

    where the source :math:`g` is only asked: a simulator, a compiled program, a rule base. :math:`h_\theta(x)` is what
    the host's ``knowledge_inputs(batch)`` returns, shape ``(B, d)`` with a graph; of a host without such a method, the
    output of its network. The source is asked with a second forward pass of the network, which leaves BatchNorm's
    statistics alone.

    Logs ``trust/knowledge_loss``, the mean before the weight. The source's counters are those of
    :class:`~lightning_trust.callbacks.SKSQueryMonitor`; its running scale is in the checkpoint.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Args:
        sks: The source.
        target: What it should say: a number; a function, or its import path, of the batch that returns
            ``(B, m)``; or ``"batch"`` for the targets of the batch.
        weight: The weight :math:`\lambda`.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If ``weight`` or ``target`` is out of its range (at once), or target and answers differ in shape (in
            the first step).
        MisconfigurationException: If the source gives losses in place of answers.
        SimulatorError: If the source fails on a row, under ``on_failure="raise"``; under ``"drop"`` the row is left out
            of the mean.

    Example:
        >>> KnowledgeLoss(BlackBoxLayer("numpy.tanh", out_dim=3), target=0.0, weight=0.1).weight
        0.1

    """

    claims: ClassVar[tuple[Claim, ...]] = ("loss",)

    def __init__(
        self,
        sks: BlackBoxLayer,
        target: Literal["batch"] | float | Callable[[Any], Tensor] = 0.0,
        weight: float = 1.0,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(batch_spec=batch_spec, network=network, name=name)
        if not weight >= 0.0:
            raise ValueError(f"Expected argument `weight` to be at least 0, but got {weight}.")
        if sks.mode == "loss":
            raise MisconfigurationException(
                "KnowledgeLoss compares the answers of a source with its target, but got one with mode='loss', which"
                " gives losses. Pass a BlackBoxLayer with mode='vjp'."
            )
        if isinstance(target, str) and target != "batch":
            raise ValueError(
                f"Expected argument `target` to be 'batch', a number or a function of the batch, but got {target!r}."
            )
        self.sks = sks
        self.target = target
        self.weight = weight

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """The loss with the penalty."""
        loss = step(batch)
        if self.weight == 0.0:
            return loss
        with untouched_batchnorm(host):
            if callable(getattr(host, "knowledge_inputs", None)):
                asked = host.knowledge_inputs(batch)
            else:
                asked = self.network_of(host)(self.batch_spec.inputs_of(batch))
        answers = self.sks(asked.flatten(1))
        penalty = self._mean((answers - self._wanted(batch, answers)).square().sum(dim=1))
        host.log("trust/knowledge_loss", penalty.detach(), batch_size=len(answers))
        return loss + self.weight * penalty

    def _wanted(self, batch: Any, answers: Tensor) -> Tensor:
        if isinstance(self.target, (int, float)):
            return torch.full_like(answers, self.target)
        wanted = self.target(batch) if callable(self.target) else self.batch_spec.targets_of(batch)
        wanted = wanted.to(answers)
        if wanted.ndim == 1:
            wanted = wanted.unsqueeze(1)
        if wanted.shape != answers.shape:
            raise ValueError(
                f"Expected argument `target` to give the shape of the answers, {tuple(answers.shape)}, but got"
                f" {tuple(wanted.shape)}."
            )
        return wanted

    def _mean(self, losses: Tensor) -> Tensor:
        if self.sks.simulator is None or self.sks.simulator.on_failure != "drop":
            return losses.mean()
        known = losses.isfinite()
        count = known.sum().to(torch.float32)
        # every rank, however many of its rows have failed
        sum_over_ranks_([count])
        return torch.where(known, losses, 0.0).sum() * world_size() / count.clamp(min=1.0)

    def state(self) -> dict[str, Any]:
        """The layer's: its running scale, and where in the run its random directions are."""
        return {"sks": {name: value.clone() for name, value in self.sks.state_dict().items()}}

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the layer's state."""
        self.sks.load_state_dict(state["sks"])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the host as it was, and end the workers of the source."""
        self.sks.close()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the host as it was, and end the workers of the source."""
        self.sks.close()
        super().on_exception(trainer, pl_module, exception)
