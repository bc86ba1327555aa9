"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_trust.core.distributed import sum_over_ranks_, world_size
from lightning_trust.core.host import close_names, named_parameters
from lightning_trust.core.modes import untouched_batchnorm
from lightning_trust.core.step import Claim, StepContext, StepTransform
from lightning_trust.core.weights import WeightSwap


class AWP(StepTransform):
    r"""Take every gradient at the weights that are worst in a small neighbourhood.

    .. math:: \min_w \max_{v \in V} \mathcal{L}(w + v), \qquad
        v_l = \gamma \, \frac{\lVert w_l \rVert_2}{\lVert \eta g_l \rVert_2} \, \eta g_l, \qquad
        g_l = \nabla_{w_l} \mathcal{L}(w)

    for every weight tensor :math:`l` of more than one dimension: the step that one SGD update of rate :math:`\eta`
    against the loss would take, scaled to :math:`\gamma` times the layer's own norm. :math:`\mathcal{L}` is the whole
    loss of the step, that of :class:`~lightning_trust.callbacks.AdversarialTraining` included, wherever both stand in
    the list. The weights are given back, bit for bit, after the backward pass.

    Paper: Adversarial Weight Perturbation Helps Robust Generalization (NeurIPS 2020).

    Args:
        gamma: Size of the perturbation relative to the weights; the paper has 0.01 for standard adversarial training
            and 0.005 for TRADES.
        proxy_lr: Rate :math:`\eta` of the proxy's step; it cancels but for layers with almost no gradient.
        warmup_epochs: Number of first epochs without perturbation.
        parameters: Globs of the names of the parameters to perturb, of those with more than one dimension.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If a number is out of its range (at once), or no parameter fits the globs (before training).
        MisconfigurationException: If another callback is the source of the gradient.

    Example:
        >>> AWP(gamma=0.01).gamma
        0.01

    """

    claims: ClassVar[tuple[Claim, ...]] = ("loss", "gradient_source")
    moves_weights: ClassVar[bool] = True

    def __init__(
        self,
        gamma: float = 0.005,
        proxy_lr: float = 0.01,
        warmup_epochs: int = 0,
        parameters: Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if not gamma >= 0.0:
            raise ValueError(f"Expected argument `gamma` to be at least 0, but got {gamma}.")
        if not proxy_lr > 0.0:
            raise ValueError(f"Expected argument `proxy_lr` to be positive, but got {proxy_lr}.")
        if warmup_epochs < 0:
            raise ValueError(f"Expected argument `warmup_epochs` to be at least 0, but got {warmup_epochs}.")
        self.gamma = gamma
        self.proxy_lr = proxy_lr
        self.warmup_epochs = warmup_epochs
        self.parameters = parameters
        self._swap: WeightSwap | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the weights to be perturbed."""
        if self.attachment is not None:
            self._swap = WeightSwap(self._chosen(pl_module))
        super().on_fit_start(trainer, pl_module)

    def _chosen(self, host: nn.Module) -> dict[str, nn.Parameter]:
        known = named_parameters(host)
        chosen = {
            name: parameter
            for name, parameter in known.items()
            if parameter.ndim > 1 and parameter.requires_grad and any(fnmatch(name, glob) for glob in self.parameters)
        }
        if not chosen:
            raise ValueError(
                f"Expected argument `parameters` to fit trained weights of more than one dimension, but got"
                f" {list(self.parameters)}. Close names: {close_names(str(self.parameters[:1]), known)}."
            )
        return chosen

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """The loss at the perturbed weights."""
        swap = self._swap
        if swap is None or self.gamma == 0.0 or ctx.trainer.current_epoch < self.warmup_epochs:
            return step(batch)
        with untouched_batchnorm(host):
            here = step(batch)
        gradients = self._gradients(here, swap.parameters)
        # the graph of the loss here is gone: its weights may move
        del here
        self._perturb(swap, gradients)
        return step(batch)

    def _gradients(self, loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        zeroed = [
            torch.zeros_like(parameter) if gradient is None else gradient.detach()
            for parameter, gradient in zip(parameters.values(), found, strict=True)
        ]
        if world_size() > 1:
            # the neighbourhood is that of the global batch; the ranks' weights stay equal
            whole = torch.cat([gradient.flatten() for gradient in zeroed])
            sum_over_ranks_([whole])
            sizes = [gradient.numel() for gradient in zeroed]
            zeroed = [
                part.view_as(gradient) / world_size() for part, gradient in zip(whole.split(sizes), zeroed, strict=True)
            ]
        return dict(zip(parameters, zeroed, strict=True))

    @torch.no_grad()
    def _perturb(self, swap: WeightSwap, gradients: dict[str, Tensor]) -> None:
        moves = {}
        for name, gradient in gradients.items():
            step = self.proxy_lr * gradient
            moves[name] = step * (self.gamma * swap.parameters[name].norm() / (step.norm() + 1e-20))
        swap.add(moves)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Give the weights back."""
        self._restore()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of what was kept of the batch."""
        self._restore()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the weights back, and leave the host as it was."""
        self._restore()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the host as it was."""
        self._restore()
        self._swap = None
        super().teardown(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_swap": None}

    def _restore(self) -> None:
        if self._swap is not None and self._swap.moved:
            self._swap.restore()
