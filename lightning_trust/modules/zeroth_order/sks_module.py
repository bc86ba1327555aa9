"""Training of a network with a black box in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric
from torchmetrics.regression import R2Score

from lightning_trust.core.distributed import sum_over_ranks_, world_size
from lightning_trust.core.hyperparameters import save_arguments
from lightning_trust.nn import BlackBoxLayer

Loss = Literal["mse", "mae", "huber"]
_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


class SKSModule(pl.LightningModule):
    r"""Regression through a scientific knowledge source (SKS): a simulator or rule base within the network.

    .. math:: \hat y = g(h_\theta(x)), \qquad \hat y = k_w(x, g(h_\theta(x))) \qquad\text{or}\qquad
        \hat y = g(h_\theta(x)) + k_w(x, g(h_\theta(x)))

    without a decoder :math:`k`, with one, and with one that corrects (``residual``). The encoder :math:`h` learns what
    to ask the source :math:`g` for; its gradient is exact but for the product with the Jacobian of :math:`g`, which
    :class:`~lightning_trust.nn.BlackBoxLayer` estimates. For a run in which the gradient of the network is estimated as
    well, add ``ZerothOrderGradient`` to the callbacks; for a penalty on what the source says of a prediction,
    ``KnowledgeLoss``.

    Logs ``train/loss`` per step; ``val/loss`` and ``val/rmse``, and in the test ``test/rmse``, ``test/mae`` and
    ``test/r2``, per epoch. Samples that the source did not answer, under ``on_failure="drop"``, count nowhere: the mean
    is over the others of all ranks.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Shape:
        - Batch: ``[inputs, targets]``, inputs ``(B, ...)``, ``(B, n)`` where columns are ``known``; targets floating
          point ``(B, m)`` or ``(B,)``; for ``predict`` the inputs alone will do.
        - ``encoder``: inputs -> ``(B, d)``, what the source takes.
        - ``decoder``: flat inputs and answers ``(B, n + m)``, one beside the other -> ``(B, ...)`` as the targets.
        - ``forward``: inputs -> predictions, of the shape of the targets, or ``(B, 1)``.

    Args:
        encoder: The network before the source.
        sks: The source. With ``mode="loss"`` its loss, given the targets, is that of the run.
        decoder: The network after the source; none if None.
        loss: ``"mse"``, ``"mae"`` or ``"huber"``.
        residual: Whether the decoder's output is added to the answers.
        head: For the first epochs, what makes predictions of the encoder's output in place of the source, so that the
            encoder learns from the data alone.
        data_only_epochs: Number of these epochs; no questions are asked in them.
        known: Columns of the inputs that the source takes as they are, beside what the encoder makes of the others;
            they have no part in its estimate, and the networks do not see them.
        optimizer: Called with the parameters, gives the optimizer. By default Adam with learning rate 1e-3.

    Raises:
        ValueError: If an argument is out of its range (at once), or predictions and targets differ in shape.
        MisconfigurationException: If arguments do not go together.

    Note:
        A checkpoint keeps no simulator: ``load_from_checkpoint`` needs ``encoder``, ``sks``, ``decoder`` and ``head``
        again. Estimates have heavy tails: clip gradients (``gradient_clip_val=1.0``).

    Example:
        >>> from torch import nn
        >>> from lightning_trust.nn import BlackBoxLayer
        >>> module = SKSModule(nn.Linear(5, 2), BlackBoxLayer("numpy.exp", out_dim=2))
        >>> module(torch.zeros(3, 5)).shape
        torch.Size([3, 2])

    """

    def __init__(
        self,
        encoder: nn.Module,
        sks: BlackBoxLayer,
        decoder: nn.Module | None = None,
        loss: Loss = "mse",
        residual: bool = False,
        head: nn.Module | None = None,
        data_only_epochs: int = 0,
        known: Sequence[int] = (),
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
    ) -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise ValueError(f"Expected argument `loss` to be one of {list(get_args(Loss))}, but got {loss!r}.")
        if data_only_epochs < 0:
            raise ValueError(f"Expected argument `data_only_epochs` to be at least 0, but got {data_only_epochs}.")
        if residual and decoder is None:
            raise MisconfigurationException("residual=True adds the decoder's output, but got decoder=None.")
        if (data_only_epochs > 0) != (head is not None):
            raise MisconfigurationException(
                "Expected argument `head` to be given with `data_only_epochs`, and only then, but got"
                f" data_only_epochs={data_only_epochs}, head={head if head is None else type(head).__name__}."
            )
        if sks.mode == "loss" and decoder is not None:
            raise MisconfigurationException(
                "A source with mode='loss' ends in the loss: no decoder comes after it. Pass decoder=None, or"
                " mode='vjp'."
            )
        if known and sks.mode == "loss":
            raise MisconfigurationException("A source with mode='loss' takes no `known` inputs. Pass mode='vjp'.")
        save_arguments(self, ["encoder", "sks", "decoder", "head", "optimizer"])
        self.encoder = encoder
        self.sks = sks
        self.decoder = decoder
        self.head = head
        self.loss_name: Loss = loss
        self.residual = residual
        self.data_only_epochs = data_only_epochs
        self.known = tuple(known)
        self._make_optimizer = optimizer
        self.val_rmse = MeanSquaredError(squared=False)
        self.test_measures = nn.ModuleDict(
            {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "r2": R2Score()}
        )

    @property
    def data_only(self) -> bool:
        """Whether the head stands in for the source, in this epoch of a fit."""
        return (
            self._trainer is not None
            and self.trainer.state.fn == "fit"
            and (self.current_epoch < self.data_only_epochs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Predictions; those that the source did not answer are NaN."""
        x, known = self._split(x)
        encoded = self.encoder(x)
        if self.head is not None and self.data_only:
            return self.head(encoded)
        if self.sks.mode == "loss":
            return self.sks.simulate(encoded)
        answers = self.sks(encoded, *known)
        if self.decoder is None:
            return answers
        answered = answers.isfinite().all(dim=1, keepdim=True)
        # a NaN would reach the gradient of every weight after it
        filled = torch.where(answered, answers, 0.0)
        decoded = self.decoder(torch.cat([x.flatten(1).to(filled), filled], dim=1))
        return torch.where(answered, filled + decoded if self.residual else decoded, torch.nan)

    def _split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the networks see, and what the source takes as it is."""
        if not self.known:
            return x, []
        if x.ndim != 2 or not max(self.known) < x.shape[1] or min(self.known) < 0:
            raise ValueError(
                f"Expected argument `known` to name columns of the inputs, but got {list(self.known)} and inputs of"
                f" shape {tuple(x.shape)}."
            )
        others = [column for column in range(x.shape[1]) if column not in self.known]
        return x[:, others], [x[:, list(self.known)]]

    # -- steps ---------------------------------------------------------------------------------------------------------
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        loss = self._mean(self._losses(inputs, targets))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss + self._nothing_of_the_unused(loss)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/rmse``."""
        inputs, targets = batch
        predictions = self(inputs)
        losses = self._each(predictions, targets)
        known = losses.isfinite()
        if known.any():
            self.val_rmse.update(*self._rows(predictions, targets, known))
        rows = int(known.sum())
        loss = losses[known].mean() if rows else losses.new_zeros(())
        self.log("val/loss", loss, batch_size=max(1, rows), sync_dist=True)
        self.log("val/rmse", self.val_rmse, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(targets))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Gather what ``test/rmse``, ``test/mae`` and ``test/r2`` are made of."""
        inputs, targets = batch
        predictions = self(inputs)
        known = predictions.isfinite().flatten(1).all(dim=1)
        if known.any():
            rows = self._rows(predictions, targets, known)
            for measure in self._measures():
                measure.update(*rows)

    def on_test_epoch_end(self) -> None:
        """Log what was measured; R2 of fewer than two samples is none."""
        for name, measure in self.test_measures.items():
            if name != "r2" or int(measure.total) * world_size() > 1:  # type: ignore[arg-type]
                self.log(f"test/{name}", measure)  # type: ignore[arg-type]

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Predictions of a batch."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def teardown(self, stage: str) -> None:
        """End the workers of the source."""
        self.sks.close()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of all parameters."""
        return self._make_optimizer(self.parameters())

    # -- parts ---------------------------------------------------------------------------------------------------------
    def _measures(self) -> list[Metric]:
        return [measure for measure in self.test_measures.values() if isinstance(measure, Metric)]

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.sks.mode == "loss" and not self.data_only:
            return self.sks(self.encoder(inputs), targets)
        return self._each(self(inputs), targets)

    def _each(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample; NaN where there is no prediction."""
        targets = targets.view(len(targets), -1).to(predictions)
        predictions = predictions.reshape(len(predictions), -1)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"Expected predictions of the shape of the targets, {tuple(targets.shape)}, but got"
                f" {tuple(predictions.shape)}."
            )
        return _LOSSES[self.loss_name](predictions, targets, reduction="none").mean(dim=1)

    def _mean(self, losses: Tensor) -> Tensor:
        """Mean over the samples, those of all ranks, that have a loss."""
        if self.sks.simulator is None or self.sks.simulator.on_failure != "drop":
            return losses.mean()
        known = losses.isfinite()
        count = known.sum().to(torch.float32)
        sum_over_ranks_([count])
        # DDP divides the sum of the ranks' gradients by their number
        return torch.where(known, losses, 0.0).sum() * world_size() / count.clamp(min=1.0)

    def _nothing_of_the_unused(self, loss: Tensor) -> Tensor:
        """Zero, as a function of the parameters that this epoch does without: DDP waits for the gradients of all."""
        unused = [self.decoder] if self.data_only else [self.head]
        parameters = [each for module in unused if module is not None for each in module.parameters()]
        nothing = loss.new_zeros(())
        if world_size() > 1:
            for parameter in parameters:
                nothing = nothing + 0.0 * parameter.sum()
        return nothing

    def _rows(self, predictions: Tensor, targets: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        targets = targets.view(len(targets), -1)[known]
        predictions = predictions.reshape(len(predictions), -1)[known]
        if targets.shape[1] == 1:
            return predictions.flatten(), targets.to(predictions).flatten()
        return predictions, targets.to(predictions)
