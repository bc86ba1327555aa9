"""Training of a curve between two robust networks, every point of which resists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_trust.core.distributed import world_size
from lightning_trust.core.host import find_network
from lightning_trust.core.step import Claim, StepContext, StepTransform
from lightning_trust.nn.adversarial.curve import CurveNetwork


class RobustModeConnectivity(StepTransform):
    r"""Train the bends of a curve between two networks so that all of it resists: every step at a point of its own.

    .. math:: \min_{\theta_1, \dots, \theta_{B-2}} \; \mathbb{E}_{t \sim U(0, 1)} \, \mathbb{E}_{(x, y)}
        \max_{\delta \in S} \ell(f(x + \delta; \theta(t)), y) + \frac{\lambda}{2} \lVert \theta(t) \rVert_2^2

    The host's network is a :class:`~lightning_trust.nn.CurveNetwork`, whose ends stay as they are. This callback draws
    :math:`t` and adds the penalty; the inner maximum is that of
    :class:`~lightning_trust.callbacks.AdversarialTraining`, which comes after it in the list, with one attack
    (``PGD``) or one against several norms (``MSD``); without it, the curve is that of clean mode connectivity. Between
    steps the curve is at the position that it had.

    Papers: Bridging Models to Defend: A Population-Based Strategy for Robust Adversarial Defense (arXiv 2303.10225);
    Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs (NeurIPS 2018).

    Args:
        weight_decay: What the penalty :math:`\lambda` on the weights at :math:`t` is; give the optimizer none.
        same_t_on_ranks: Whether all ranks train the same point in a step; else each its own, and the gradient is the
            mean over them.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the positions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If ``weight_decay`` is negative.
        MisconfigurationException: Before training, if the network is no curve, its ends are equal (nothing was loaded),
            a callback that attacks comes first in the list, or ranks are to train different points under SyncBatchNorm.

    Warns:
        UserWarning: If the optimizer decays the bends as well.

    Example:
        >>> from lightning_trust.attacks import MSD
        >>> from lightning_trust.callbacks import AdversarialTraining
        >>> callbacks = [RobustModeConnectivity(), AdversarialTraining(MSD(steps=10, batch_norm="batch"))]
        >>> callbacks[0].weight_decay
        0.0003

    """

    def __init__(
        self,
        weight_decay: float = 3e-4,
        same_t_on_ranks: bool = True,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(network=network, name=name, seed=seed)
        if not weight_decay >= 0.0:
            raise ValueError(f"Expected argument `weight_decay` to be at least 0, but got {weight_decay}.")
        self.weight_decay = weight_decay
        self.same_t_on_ranks = same_t_on_ranks
        self._curve: CurveNetwork | None = None
        self._found = 0.5

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_curve": None}

    @property
    def changes_loss(self) -> bool:
        """Whether there is a penalty."""
        return self.weight_decay > 0.0

    @property
    def all_claims(self) -> tuple[Claim, ...]:
        """What this callback claims."""
        return (*super().all_claims, "loss") if self.changes_loss else super().all_claims

    def attach(self, trainer: Any, host: Any, attachment: Any) -> None:
        """Refuse a list in which the position is drawn after the attack."""
        for callback in trainer.callbacks:
            if callback is self:
                break
            if isinstance(callback, RobustModeConnectivity):
                raise MisconfigurationException("A run can train one curve, but got two RobustModeConnectivity.")
            if "inputs" in getattr(callback, "all_claims", ()):
                raise MisconfigurationException(
                    f"{type(callback).__name__} attacks before RobustModeConnectivity has drawn the point of the curve."
                    " Put RobustModeConnectivity before it in `callbacks`."
                )

    def begin(self, trainer: Any, host: Any) -> None:
        """Look at the curve."""
        curve = curve_of(host, self.network, type(self).__name__)
        if not curve.ends_differ():
            raise MisconfigurationException(
                "RobustModeConnectivity connects two networks, but both ends of the curve have the same weights. Load"
                " them: `CurveNetwork(..., start=..., end=...)` or `load_endpoint`."
            )
        mixed = not self.same_t_on_ranks and world_size() > 1
        if mixed and any(isinstance(layer, nn.SyncBatchNorm) for layer in curve.modules()):
            raise MisconfigurationException(
                "RobustModeConnectivity(same_t_on_ranks=False) trains another point on every rank, but SyncBatchNorm"
                " shares statistics between them. Set `same_t_on_ranks=True` or `sync_batchnorm=False`."
            )
        if any(group.get("weight_decay") for optimizer in trainer.optimizers for group in optimizer.param_groups):
            rank_zero_warn(
                "The optimizer decays the bends of the curve, while the paper's penalty is on the weights at the point"
                " of the step (RobustModeConnectivity.weight_decay). Set the optimizer's weight_decay to 0."
            )
        self._curve, self._found = curve, float(curve.t)

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Move the curve to the point of this step."""
        if self._curve is not None:
            stream = self.random.shared if self.same_t_on_ranks else self.random.rank
            self._curve.move_to(float(torch.rand((), generator=stream("t", ctx.total_batch_idx))))
        return batch

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """The loss with the penalty on the weights at the point."""
        value = step(batch)
        if self._curve is None:
            return value
        squares = [weight.square().sum() for weight in self._curve.weights_at().values()]
        return value + 0.5 * self.weight_decay * torch.stack(squares).sum()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give the curve its position back."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._move_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the curve its position back, and leave the host as it was."""
        self._move_back()
        self._curve = None
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the host as it was."""
        self._curve = None
        super().teardown(trainer, pl_module, stage)

    def _move_back(self) -> None:
        if self._curve is not None:
            self._curve.move_to(self._found)


def curve_of(host: nn.Module, network: str | None, owner: str) -> CurveNetwork:
    """The curve that a host's network is.

    Raises:
        MisconfigurationException: If it is another network.

    """
    found = find_network(host, network)
    # what torch.compile puts around it shares its weights
    found = getattr(found, "_orig_mod", found)
    if not isinstance(found, CurveNetwork):
        raise MisconfigurationException(
            f"{owner} needs a host whose network is a CurveNetwork, but got {type(found).__name__}. Wrap it where it is"
            " built: `CurveNetwork(network, start=..., end=...)`; or name it: `network='<name>'`."
        )
    return found
