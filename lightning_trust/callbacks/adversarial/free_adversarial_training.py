"""Free adversarial training: the backward pass of the weights also moves the perturbation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.attacks.attack import UNIT_BOX
from lightning_trust.attacks.preparation import check_radius
from lightning_trust.callbacks.adversarial.adversarial_training import data_space
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import gather_rows, rank, world_size
from lightning_trust.core.space import InputSpace
from lightning_trust.core.step import Claim, StepContext, StepTransform
from lightning_trust.functional.adversarial.projections import project_linf


class FreeAdversarialTraining(StepTransform):
    r"""Adversarial training at the price of plain training: one backward pass gives both gradients.

    .. math:: \delta \leftarrow \mathrm{clamp}(\delta + \alpha \, \mathrm{sign}(\nabla_x \ell(f(x + \delta), y)),
        -\epsilon, \epsilon)

    after every backward pass; the perturbation of row :math:`i` of a batch is where row :math:`i` of the next one
    starts. Every batch is to be seen several times in a row, with an optimizer step each: wrap the data in
    :class:`~lightning_trust.datamodules.RepeatBatches` and divide the epochs by as much.

    Paper: Adversarial Training for Free! (NeurIPS 2019): batches repeated eight times on CIFAR-10.

    Args:
        eps: Radius in raw units.
        step_size: Size :math:`\alpha` of a step; ``eps`` if None, as in the paper.
        space: Box and normalisation of the inputs; that of the data module if None.
        batch_spec: Where inputs and targets sit in a batch.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If a number is out of its range (at once), or the radius cannot be meant in the units of the data
            (before training).
        MisconfigurationException: If a run is resumed from a checkpoint that was saved while an exception was handled
            on several ranks.

    Example:
        >>> FreeAdversarialTraining(eps=0.1).step_size
        0.1

    """

    claims: ClassVar[tuple[Claim, ...]] = ("inputs",)

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        space: InputSpace | None = None,
        batch_spec: BatchSpec | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(batch_spec=batch_spec, name=name)
        if not eps >= 0.0:
            raise ValueError(f"Expected argument `eps` to be at least 0, but got {eps}.")
        if step_size is not None and not step_size > 0.0:
            raise ValueError(f"Expected argument `step_size` to be positive, but got {step_size}.")
        self.eps = eps
        self.step_size = eps if step_size is None else step_size
        self.space = space
        self._space = UNIT_BOX
        self._checked = False
        self._failing = False
        self._delta: Tensor | None = None
        self._place: Tensor | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the radius against the data, and join the host's chain."""
        if stage == "fit":
            self._space = self.space or data_space(trainer)
            check_radius(self.eps, self._space)
            self._checked = self._failing = False
        super().setup(trainer, pl_module, stage)

    def begin(self, trainer: Any, host: Any) -> None:
        """Start without a perturbation."""
        self._delta = None

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the perturbation of the global batch."""
        if state["partial"]:
            raise MisconfigurationException(
                "FreeAdversarialTraining resumes from a checkpoint that holds the perturbations of all ranks, but got"
                " one that was saved while an exception was handled. Use an earlier checkpoint."
            )
        whole = state["delta"]
        self._delta = None if whole is None else whole[rank() :: world_size()].to(host.device)

    def state(self) -> dict[str, Any]:
        """The perturbation of the global batch, its rows interleaved over the ranks."""
        # other ranks may never come to a collective while an exception is handled
        partial = self._failing and world_size() > 1
        delta = self._delta
        if delta is not None and not partial:
            delta = gather_rows(delta)
        return {"delta": delta, "partial": partial}

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Add the perturbation to the inputs."""
        inputs = self.batch_spec.inputs_of(batch)
        if not self._checked:
            self._space.check(inputs)
            self._checked = True
        raw = self._space.to_raw(inputs.detach().float())
        if self._delta is None or self._delta.shape[1:] != raw.shape[1:] or len(self._delta) < len(raw):
            self._delta = torch.zeros_like(raw)
        moved = (raw + self._delta[: len(raw)]).clamp(self._space.low, self._space.high)
        self._place = self._space.from_raw(moved).to(inputs.dtype).requires_grad_()
        return self.batch_spec.replace(batch, inputs=self._place)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Move the perturbation by the gradient that the backward pass left at the inputs."""
        place, self._place = self._place, None
        if place is None or self._delta is None:
            return
        if place.grad is None:
            raise MisconfigurationException(
                f"FreeAdversarialTraining needs the gradient at the inputs, but {type(pl_module).__name__} detaches or"
                " copies them before its network. Use AdversarialTraining."
            )
        rows = self._delta[: len(place)]
        rows.copy_(project_linf(rows + self.step_size * place.grad.sign(), self.eps))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A checkpoint that is saved now holds the perturbation of this rank alone."""
        self._failing = True
        super().on_exception(trainer, pl_module, exception)
