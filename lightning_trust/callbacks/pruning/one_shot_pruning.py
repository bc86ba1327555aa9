"""Pruning in one shot at the start of a run, with a mask that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_trust.core.host import named_parameters, plain_name
from lightning_trust.core.masks import ParameterMask, Scope, WeightZeroing, check_sparsity, select_parameters
from lightning_trust.core.step import Attachment, Claim, ConstraintPhase, GradientPhase, HostCallback

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class OneShotPruning(HostCallback):
    r"""Zero a share of the weights when the fit starts, and keep them zero.

    Magnitude pruning keeps the weights of largest :math:`|w|`, random pruning a draw that is equal on all ranks. The
    pruned weights and their gradients are zero after every optimizer step, whatever weight decay and momentum do.
    Parameters keep their names, so the checkpoint is the host's own; the mask is state of the callback and comes back
    bit for bit when a run is resumed.

    Papers: Learning both Weights and Connections for Efficient Neural Networks (NeurIPS 2015); densities by layer:
    Rigging the Lottery (ICML 2020); in front of unlearning: Model Sparsity Can Simplify Machine Unlearning
    (NeurIPS 2023), which prunes the convolutions (``include=["Conv2d"]``).

    Logs ``trust/sparsity``, the share of zeros among the prunable weights, once a change.

    Args:
        sparsity: Share of zeros, in [0, 1).
        method: What decides which weights go.
        scope: Over what the share is taken: all weights together, every layer by itself, or by
            Erdős-Rényi-Kernel densities.
        include: Name globs of parameters (``"net.*.weight"``) or layer class names (``"Conv2d"``, its ``weight``);
            the weights of all linear and convolution layers if None.
        exclude: The same, for what is left out after all.
        verbose: Whether to print the table of layers when the mask is made.
        name: Tells two callbacks of this class apart.
        seed: Seed of the random draw; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If ``sparsity`` is outside [0, 1), ``method`` or ``scope`` is another word (at once), or a pattern
            matches no parameter (when the fit starts).

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> pruning = OneShotPruning(0.5)
        >>> quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(fast_dev_run=1, callbacks=[pruning], **quiet)
        >>> trainer.fit(model := BoringModel())
        >>> int((model.layer.weight == 0).sum()), model.layer.weight.numel()
        (32, 64)

    """

    claims: ClassVar[tuple[Claim, ...]] = ("weights", "gradient_edit")

    def __init__(
        self,
        sparsity: float,
        method: Literal["magnitude", "random"] = "magnitude",
        scope: Scope = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        verbose: bool = False,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_sparsity(sparsity)
        if method not in ("magnitude", "random"):
            raise ValueError(f"Expected argument `method` to be 'magnitude' or 'random', but got {method!r}.")
        if scope not in ("global", "layer", "erk"):
            raise ValueError(f"Expected argument `scope` to be 'global', 'layer' or 'erk', but got {scope!r}.")
        self.sparsity = sparsity
        self.method = method
        self.scope = scope
        self.include = include
        self.exclude = exclude
        self.verbose = verbose
        self.mask: ParameterMask | None = None
        self._zeroing: WeightZeroing | None = None
        self._logged = False

    # -- the mask ------------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Register the mask with the order of a step."""
        attachment.edit_gradients(self, GradientPhase.PROJECT, self._zero_gradients)
        attachment.constrain(self, ConstraintPhase.ZERO, self._zero_weights)

    def begin(self, trainer: Any, host: Any) -> None:
        """Score the weights, make the mask, and zero what goes."""
        self._use(ParameterMask.with_sparsity(self.scores(host), self.sparsity, self.scope), host)
        if self.verbose:
            self._print()

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Take the mask from the checkpoint."""
        mask = ParameterMask.from_state_dict(state["mask"])
        mask.check(host, "mask of the checkpoint")
        self._use(mask, host)
        self._logged = state["logged"]

    def scores(self, host: nn.Module) -> dict[str, Tensor]:
        """Score of every prunable weight; the lowest go.

        Args:
            host: The host.

        """
        parameters = select_parameters(host, self._patterns(host), self.exclude)
        if self.method == "magnitude":
            return {name: parameter.detach().abs() for name, parameter in parameters.items()}
        # drawn on the CPU from the shared stream: equal on all ranks and all devices
        generator = self.random.shared("scores")
        return {
            name: torch.rand(parameter.shape, generator=generator).to(parameter.device)
            for name, parameter in parameters.items()
        }

    def _patterns(self, host: nn.Module) -> Sequence[str]:
        if self.include is not None:
            return self.include
        known = {id(parameter): name for name, parameter in named_parameters(host).items()}
        layers = [module for module in host.modules() if isinstance(module, _LAYERS)]
        found = [known[id(layer.weight)] for layer in layers if id(layer.weight) in known]
        if not found:
            raise ValueError(
                f"Expected {type(host).__name__} to have linear or convolution layers, but got none."
                " Pass `include=[...]` with name globs of parameters."
            )
        return list(dict.fromkeys(found))

    def _use(self, mask: ParameterMask, host: nn.Module) -> None:
        self.mask = mask
        self._zeroing = WeightZeroing(mask, host)
        self._zeroing.weights()
        self._logged = False

    def _zero_weights(self, optimizer: Any) -> None:
        if self._zeroing is not None:
            self._zeroing.weights()

    def _zero_gradients(self, optimizer: Any) -> None:
        if self._zeroing is not None:
            self._zeroing.gradients()

    def make_permanent(self, module: nn.Module) -> None:
        """Zero the pruned weights of a module that has the host's names, and let go of the mask.

        Weights of a pruned run are zero in every checkpoint, so this is for weights that come from elsewhere, such as
        an average of several runs. What is trained afterwards without this callback may revive pruned weights.

        Args:
            module: The host or a copy of it.

        Raises:
            RuntimeError: If no run has made a mask yet.
            ValueError: If names or shapes differ.

        """
        if self.mask is None:
            raise RuntimeError("Expected a run to have made a mask before it is made permanent, but none has.")
        self.mask.check(module)
        WeightZeroing(self.mask, module).weights()
        self.mask = self._zeroing = None

    def table(self) -> list[tuple[str, tuple[int, ...], int, int, float]]:
        """Name, shape, kept weights, weights and sparsity of every pruned layer."""
        masks: Mapping[str, Tensor] = self.mask or {}
        rows = []
        for name, mask in masks.items():
            kept = int(mask.sum())
            rows.append((plain_name(name), tuple(mask.shape), kept, mask.numel(), 1.0 - kept / max(mask.numel(), 1)))
        return rows

    @rank_zero_only
    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        mask = self.mask or ParameterMask({})
        table = Table(title=f"{self.state_key}: {self.method}, {self.scope}, sparsity {mask.sparsity:.4f}")
        table.add_column("weight")
        for column in ("shape", "kept", "of", "sparsity"):
            table.add_column(column, justify="right")
        for name, shape, kept, size, sparsity in self.table():
            table.add_row(name, "x".join(map(str, shape)), f"{kept:,}", f"{size:,}", f"{sparsity:.4f}")
        Console().print(table)

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the host's chain."""
        if stage == "fit":
            self.mask = self._zeroing = None
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the sparsity where it has changed."""
        # not at the start, which a run that is resumed within an epoch does not come to
        if self.mask is not None and not self._logged:
            pl_module.log("trust/sparsity", self.mask.sparsity, on_step=False, on_epoch=True, rank_zero_only=True)
            self._logged = True

    def state(self) -> dict[str, Any]:
        """The mask, and whether its sparsity has been logged."""
        return {} if self.mask is None else {"mask": self.mask.state_dict(), "logged": self._logged}
