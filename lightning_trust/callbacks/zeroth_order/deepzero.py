"""DeepZero: coordinates of a random sparse pattern whose density per layer ZO-GraSP chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_trust.callbacks.zeroth_order.zeroth_order_gradient import ZerothOrderGradient
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_first_rank
from lightning_trust.core.host import named_parameters
from lightning_trust.core.masks import check_sparsity, select_parameters
from lightning_trust.core.passes import transferred
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.core.step import Attachment, HostCallback
from lightning_trust.functional.zeroth_order import layer_pruning_ratios, zo_grasp_scores
from lightning_trust.optim.zeroth_order import RGE, LossOracle
from lightning_trust.optim.zeroth_order.oracle import check_count, check_mu


class DynamicSparseGradient(HostCallback):
    r"""Sparse gradients over dense weights: only some coordinates are asked for, others from time to time.

    In every layer :math:`l` a random mask with exactly :math:`\max(1, \mathrm{round}((1 - \mathrm{LPR}_l) n_l))` active
    entries is drawn anew every few epochs; parameters without a mask (biases, normalisation) are always asked. The
    layers' pruning ratios :math:`\mathrm{LPR}_l` come once, before the first step, from the scores of GraSP on random
    gradient estimates:

    .. math:: s = -\theta \odot \frac{\hat g(\theta + \mu \hat g(\theta)) - \hat g(\theta)}{\mu}

    with the same directions in both estimates. Weights stay dense: what is not asked has no gradient in this step, and
    momentum and weight decay move it nevertheless.

    It chooses for :class:`ZerothOrderGradient`, which must be in the run too.

    Paper: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training (ICLR 2024, arXiv:2310.02025).

    Args:
        sparsity: Share of the weights of the chosen layers that is not asked, in [0, 1).
        ratios: ``"zo_grasp"``; ``"uniform"``, the same share in every layer; or shares by name of the weight, in
            [0, 1].
        parameters: Which weights have a mask: class names of layers or globs of names.
        redraw_every_n_epochs: Epochs after which masks are drawn anew; None for one mask in the whole run.
        redraw_every_n_steps: Optimizer steps after which masks are drawn anew, in place of epochs.
        q: Number of directions of an estimate for ZO-GraSP.
        mu: Length of a difference, and of the step along the gradient, for ZO-GraSP.
        samples_per_class: Training samples of each class that ZO-GraSP sees on this rank.
        score: ``"abs"`` as the released code, ``"signed"`` as the paper; see
            :func:`lightning_trust.functional.zeroth_order.layer_pruning_ratios`.
        normalize: ``"per_tensor"`` for ZO-GraSP with directions of length 1 in every layer, as the released code, which
            weighs a layer of :math:`n` weights by about :math:`1 / n`; None for estimates of the gradient. See
            :class:`RGE`.
        batch_spec: Where inputs and targets sit in a batch.
        name: Tells two callbacks of this class apart.
        seed: Seed of the masks and directions; the one of ``seed_everything`` if None.

    Attributes:
        pruning_ratios: The layers' ratios by name of the weight, once they are known.

    Raises:
        ValueError: If an argument is out of its range, or names no parameter (before training).
        MisconfigurationException: If both periods are given, or ``ZerothOrderGradient`` is not in the run.

    Warns:
        If a layer would have no active weight; it keeps one.

    Example:
        >>> DynamicSparseGradient(sparsity=0.9, ratios="uniform").sparsity
        0.9

    """

    def __init__(
        self,
        sparsity: float = 0.9,
        ratios: Literal["zo_grasp", "uniform"] | dict[str, float] = "zo_grasp",
        parameters: Sequence[str] = ("*",),
        redraw_every_n_epochs: int | None = 5,
        redraw_every_n_steps: int | None = None,
        q: int = 192,
        mu: float = 5e-3,
        samples_per_class: int = 25,
        score: Literal["abs", "signed"] = "abs",
        normalize: Literal["per_tensor"] | None = None,
        batch_spec: BatchSpec | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_sparsity(sparsity)
        check_count("q", q)
        check_mu(mu)
        check_count("samples_per_class", samples_per_class)
        if score not in ("abs", "signed"):
            raise ValueError(f"Expected argument `score` to be 'abs' or 'signed', but got {score!r}.")
        if normalize not in (None, "per_tensor"):
            raise ValueError(f"Expected argument `normalize` to be 'per_tensor' or None, but got {normalize!r}.")
        if isinstance(ratios, str) and ratios not in ("zo_grasp", "uniform"):
            raise ValueError(
                f"Expected argument `ratios` to be 'zo_grasp', 'uniform' or ratios by name, but got {ratios!r}."
            )
        if isinstance(ratios, Mapping):
            for key, ratio in ratios.items():
                if not 0.0 <= ratio <= 1.0:
                    raise ValueError(f"Expected the ratio of '{key}' to lie in [0, 1], but got {ratio}.")
        for argument, period in (
            ("redraw_every_n_epochs", redraw_every_n_epochs),
            ("redraw_every_n_steps", redraw_every_n_steps),
        ):
            if period is not None:
                check_count(argument, period)
        self.sparsity = sparsity
        self.ratios = ratios
        self.parameters = parameters
        self.redraw_every_n_epochs = redraw_every_n_epochs
        self.redraw_every_n_steps = redraw_every_n_steps
        self.q = q
        self.mu = mu
        self.samples_per_class = samples_per_class
        self.score = score
        self.normalize = normalize
        self.batch_spec = batch_spec or BatchSpec()
        self.pruning_ratios: dict[str, float] | None = None
        self._masks: dict[str, Tensor] = {}
        self._drawn: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": {}, "_drawn": None}

    # -- the run -------------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Tell the gradient source what to ask."""
        self._source(trainer).mask_source = self._masks_of_step

    @staticmethod
    def _source(trainer: Any) -> ZerothOrderGradient:
        for callback in trainer.callbacks:
            if isinstance(callback, ZerothOrderGradient):
                return callback
        raise MisconfigurationException(
            "DynamicSparseGradient chooses the coordinates that ZerothOrderGradient asks for, but there is none in"
            " `callbacks`. Add ZerothOrderGradient(CGE())."
        )

    def begin(self, trainer: Any, host: Any) -> None:
        """Start with what needs no gradient."""
        self._drawn = None
        names = list(self._weights(host))
        if self.ratios == "uniform":
            self.pruning_ratios = dict.fromkeys(names, self.sparsity)
        elif isinstance(self.ratios, Mapping):
            unknown = [name for name in self.ratios if name not in names]
            if unknown:
                raise ValueError(
                    f"Expected argument `ratios` to name weights that have a mask, {names}, but got {unknown}."
                )
            self.pruning_ratios = dict(self.ratios)
        else:
            self.pruning_ratios = None
        self._warn_of_dead_layers()

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the ratios that were found."""
        self._drawn = None
        self.pruning_ratios = state["ratios"]

    def state(self) -> dict[str, Any]:
        """The ratios; masks are drawn again from their seed."""
        return {"ratios": self.pruning_ratios}

    def _leave(self) -> None:
        if self.attachment is not None and self.attachment.trainer is not None:
            for callback in self.attachment.trainer.callbacks:
                if isinstance(callback, ZerothOrderGradient):
                    callback.mask_source = None
        self._masks, self._drawn = {}, None
        super()._leave()

    # -- masks ---------------------------------------------------------------------------------------------------------
    def _weights(self, host: nn.Module) -> dict[str, nn.Parameter]:
        """Weights of convolutions and linear layers among the chosen ones: no biases, no normalisation."""
        chosen = select_parameters(host, self.parameters, argument="parameters")
        layers = (nn.Linear, nn.modules.conv._ConvNd)
        inside = {id(layer.weight) for layer in host.modules() if isinstance(layer, layers)}
        found = {name: value for name, value in chosen.items() if id(value) in inside and value.requires_grad}
        if not found:
            raise ValueError(
                "Expected argument `parameters` to choose weights of convolutions or linear layers that are trained,"
                f" but got {list(self.parameters)}, which chooses none of them."
            )
        return found

    def _masks_of_step(self, host: Any, replay_of: Callable[[Any], Callable[[], Any]]) -> Mapping[str, Tensor]:
        """The masks of a step; drawn where a new period begins."""
        trainer = host.trainer
        if self.pruning_ratios is None:
            self.pruning_ratios = self._zo_grasp(trainer, host, replay_of)
            self._warn_of_dead_layers()
        if self.redraw_every_n_steps is not None:
            period = trainer.global_step // self.redraw_every_n_steps
        elif self.redraw_every_n_epochs is not None:
            period = trainer.current_epoch // self.redraw_every_n_epochs
        else:
            period = 0
        if period != self._drawn:
            self._masks = self._draw(host, period)
            self._drawn = period
        return self._masks

    def _draw(self, host: nn.Module, period: int) -> dict[str, Tensor]:
        assert self.pruning_ratios is not None  # noqa: S101  (made before)
        known = named_parameters(host)
        masks = {}
        for name, ratio in self.pruning_ratios.items():
            parameter = known[name]
            count = max(1, round((1.0 - ratio) * parameter.numel()))
            generator = self.random.shared("mask", period, name)
            chosen = torch.randperm(parameter.numel(), generator=generator)[:count]
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            mask[chosen] = True
            masks[name] = mask.view(parameter.shape).to(parameter.device)
        return masks

    def _warn_of_dead_layers(self) -> None:
        dead = [name for name, ratio in (self.pruning_ratios or {}).items() if ratio == 1.0]
        if dead:
            rank_zero_warn(
                f"DynamicSparseGradient: the pruning ratio of {dead} is 1, so that nothing of it would be trained. One"
                " weight of each stays active."
            )

    # -- ZO-GraSP ------------------------------------------------------------------------------------------------------
    def _zo_grasp(self, trainer: Any, host: Any, replay_of: Callable[[Any], Callable[[], Any]]) -> dict[str, float]:
        weights = self._weights(host)
        source = self._source(trainer)
        seed = self.random.sample_seed("zo_grasp")
        loss = replay_of(self._balanced_batch(trainer, host))
        estimator = RGE(self.q, self.mu, central=False, normalize=self.normalize)
        kept = {name: parameter.grad for name, parameter in weights.items()}
        values = {name: parameter.detach().clone() for name, parameter in weights.items()}

        def gradients() -> dict[str, Tensor]:
            for parameter in weights.values():
                parameter.grad = None
            oracle = LossOracle(
                loss, weights, module=host, seed=seed, parallel=source.parallel, restores_random_state=True
            )
            source.note(estimator.add(oracle))
            return {name: parameter.grad.clone() for name, parameter in weights.items() if parameter.grad is not None}

        try:
            here = gradients()
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.add_(here[name], alpha=self.mu)
            moved = gradients()
        finally:
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(values[name])
                    parameter.grad = kept[name]
        scores = zo_grasp_scores(values, here, moved, self.mu)
        found = layer_pruning_ratios(scores, self.sparsity, self.score)
        return from_first_rank(found)

    def _balanced_batch(self, trainer: Any, host: Any) -> Any:
        """A batch with as many samples of each class as asked for, or as there are."""
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        counts: dict[int, int] = {}
        template: Any = None
        with untouched_random_state():
            for batch in transferred(trainer, host, trainer.train_dataloader):
                template = batch
                labels = self.batch_spec.targets_of(batch)
                if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
                    # no classes: the first batch will do
                    return batch
                rows = []
                for row, label in enumerate(labels.tolist()):
                    counts[label] = counts.get(label, 0) + 1
                    if counts[label] <= self.samples_per_class:
                        rows.append(row)
                if rows:
                    inputs.append(self.batch_spec.inputs_of(batch)[rows])
                    targets.append(labels[rows])
                # a class that has not come in so many rows is taken to be absent
                if min(counts.values()) >= self.samples_per_class:
                    break
        return self.batch_spec.replace(template, inputs=torch.cat(inputs), targets=torch.cat(targets))
