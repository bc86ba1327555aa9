"""Pretraining on the part of the source that a target has use for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.host import overrides
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.core.saved_weights import load_weights
from lightning_trust.core.step import Attachment, HostCallback
from lightning_trust.datamodules.prompting.prune_result import PruneResult
from lightning_trust.datamodules.prompting.pruned_data import plain_dataset, pruned_loader
from lightning_trust.datamodules.prompting.source_features import device_of
from lightning_trust.datamodules.prompting.source_pruner import SourcePruner


class SourcePruning(HostCallback):
    r"""Prune the data of a pretraining run to what a target has use for, before the run's loaders are made (DP4TL).

    Paper: Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning (NeurIPS 2023). A
    pruner asks a small surrogate, trained on the source once for all targets and larger models, which source classes
    the target is mapped to; training goes on with the rows of the most frequent ones, and validation with the rows of
    these classes. Epochs stay as many, so that steps, and learning rates that follow them, shrink with the share that
    is kept. The module is untouched; data may come from a data module, the module itself, or loaders. Test and
    prediction data, and a ``validate`` of its own, see all classes.

    Args:
        pruner: What chooses. None to read the choice from ``coreset``.
        surrogate: The network that the pruner asks, built; see the pruner for what it has to put out.
        checkpoint: File of its weights: a Lightning checkpoint, also of a module that holds it, a state dict or a
            safetensors file. None if it has its weights.
        target: The data module of the target, of which the training rows are looked at. Not used by pruners that look
            at no target.
        coreset: File of the choice: written where there is a ``pruner``, unless in a ``fast_dev_run``, else read.
        remap_labels: Whether labels are counted anew, 0 to the number of kept classes, for a smaller head.
        batch_spec: Where inputs and targets sit in a batch of the source.
        name: Tells two callbacks of this class apart.

    Attributes:
        result: The choice, once made.

    Raises:
        FileNotFoundError: In ``setup``, if a file that is to be read is not there.
        ValueError: In ``setup``, if the pruner finds the data wanting.
        MisconfigurationException: If there is neither a pruner nor a file; in ``setup``, if training data are no plain
            DataLoader over a map-style data set; on resume, if another choice was made.

    Example:
        >>> from lightning_trust.datamodules import Digits, LabelMappingPruner
        >>> from lightning_trust.nn import SmallCNN
        >>> pruning = SourcePruning(LabelMappingPruner(10, keep_ratio=0.4), SmallCNN(), target=Digits())
        >>> pruning.result is None
        True

    """

    def __init__(
        self,
        pruner: SourcePruner | None = None,
        surrogate: nn.Module | None = None,
        checkpoint: str | None = None,
        target: LightningDataModule | None = None,
        coreset: str | None = None,
        remap_labels: bool = False,
        batch_spec: BatchSpec | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if pruner is None and coreset is None:
            raise MisconfigurationException(
                "SourcePruning needs argument `pruner` to choose, or `coreset` to read a choice from, but got neither."
            )
        if checkpoint is not None and surrogate is None:
            raise MisconfigurationException(
                f"Argument `checkpoint` is for a `surrogate`, but got checkpoint='{checkpoint}' and none."
            )
        if pruner is not None:
            for argument, needed, given in (
                ("surrogate", pruner.needs_surrogate, surrogate),
                ("target", pruner.needs_target, target),
            ):
                if needed and given is None:
                    raise MisconfigurationException(
                        f"{type(pruner).__name__} needs argument `{argument}` of SourcePruning, but got None."
                    )
        self.pruner = pruner
        self.surrogate = surrogate
        self.checkpoint = checkpoint
        self.target = target
        self.coreset = coreset
        self.remap_labels = remap_labels
        self.batch_spec = batch_spec or BatchSpec()
        self.result: PruneResult | None = None

    # -- the run's data ------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Stand before the run's loaders; choose now, unless the host brings the data, which it may have to make."""
        self.result = None
        overfit = getattr(trainer, "overfit_batches", 0)
        if overfit > 0:
            raise MisconfigurationException(
                f"SourcePruning decides which rows are trained on, but Trainer(overfit_batches={overfit}) would take"
                " others. Use `limit_train_batches`."
            )
        loops = {"train": trainer.fit_loop, "val": trainer.fit_loop.epoch_loop.val_loop}
        for part, loop in loops.items():
            source, training = loop._data_source, part == "train"
            if source.instance is host:
                if overrides(host, source.name):
                    attachment.wrap(host, source.name, self._wrapper(trainer, training))
            elif source.is_module():
                if source.is_defined():
                    self._replace(trainer, attachment, source.instance, source.name, training)
            elif source.instance is not None:
                given = source.instance
                attachment.undo.callback(setattr, source, "instance", given)
                source.instance = self._pruned(trainer, given, training)

    def _wrapper(self, trainer: Any, training: bool) -> Callable[..., Any]:
        def loaders(_host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._pruned(trainer, call(*args, **kwargs), training)

        return loaders

    def _replace(self, trainer: Any, attachment: Attachment, data: Any, name: str, training: bool) -> None:
        """Stand before a method of the run's data module until the run ends."""
        original, before = getattr(data, name), dict(data.__dict__)

        def loaders(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            # of a run that ended without its callbacks' knowing
            return self._pruned(trainer, found, training) if attachment.live else found

        def restore() -> None:
            if name in before:
                setattr(data, name, before[name])
            else:
                data.__dict__.pop(name, None)

        setattr(data, name, loaders)
        attachment.undo.callback(restore)
        if training:
            self._choose(trainer, original)

    def _pruned(self, trainer: Any, loaders: Any, training: bool) -> Any:
        """Loaders like a user's over what is kept."""
        # validation data are asked for first where there is a sanity check
        result = self._choose(trainer, lambda: loaders) if training else self._chosen(trainer)
        if isinstance(loaders, list | tuple) and not training:
            return [self._pruned(trainer, loader, training) for loader in loaders]
        owner = type(self).__name__
        return pruned_loader(loaders, result, self.remap_labels, self.batch_spec, training, owner, known=True)

    def _chosen(self, trainer: Any) -> PruneResult:
        if self.result is None:
            # the host's own, behind which stands the wrapper that chooses
            with untouched_random_state():
                trainer.fit_loop._data_source.dataloader()
        if self.result is None:
            raise RuntimeError("Expected the run to have training data to choose from, but none were asked for.")
        return self.result

    # -- the choice ----------------------------------------------------------------------------------------------------
    def _choose(self, trainer: Any, train_loader: Callable[[], Any]) -> PruneResult:
        """The choice, made once a run."""
        if self.result is not None:
            return self.result
        with untouched_random_state():
            loader = train_loader()
            dataset = plain_dataset(loader, type(self).__name__)
            if self.pruner is None:
                result = PruneResult.load(str(self.coreset))
                result.check_source(dataset, self.batch_spec)
            else:
                with self._surrogate(trainer) as surrogate:
                    result = self.pruner.fit(surrogate, loader, self._target(trainer))
        if self.remap_labels:
            _ = result.label_map
        if self.pruner is not None and self.coreset and trainer.is_global_zero and not trainer.fast_dev_run:
            result.save(self.coreset)
        self.result = result
        return result

    @contextmanager
    def _surrogate(self, trainer: Any) -> Iterator[nn.Module | None]:
        """The surrogate with its weights, where the run computes; it goes back to where it was."""
        if self.surrogate is None or self.pruner is None or not self.pruner.needs_surrogate:
            yield None
            return
        if self.checkpoint is not None:
            if not Path(self.checkpoint).is_file():
                raise FileNotFoundError(
                    f"Expected argument `checkpoint` of SourcePruning to be a file, but got '{self.checkpoint}', which"
                    " does not exist."
                )
            load_weights(self.surrogate, self.checkpoint, inside=True)
        before = device_of(self.surrogate)
        try:
            yield self.surrogate.to(trainer.strategy.root_device)
        finally:
            self.surrogate.to(before)

    def _target(self, trainer: Any) -> Any:
        """The training loader of the target."""
        if self.target is None or self.pruner is None or not self.pruner.needs_target:
            return None
        if trainer.local_rank == 0:
            self.target.prepare_data()
        trainer.strategy.barrier("target of SourcePruning")
        self.target.setup("fit")
        loader = self.target.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                "SourcePruning looks at one DataLoader of the target, but"
                f" `{type(self.target).__name__}.train_dataloader` gave {type(loader).__name__}."
            )
        return loader

    # -- state ---------------------------------------------------------------------------------------------------------
    def begin(self, trainer: Any, host: Any) -> None:
        """Choose before training starts, where the host brings the data."""
        self._chosen(trainer)

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the rows that the checkpoint was trained on.

        Raises:
            MisconfigurationException: If other rows, or rows of another source, are kept now.

        """
        result = self._chosen(trainer)
        if (result.hash, self.remap_labels) != (state["hash"], state["remap_labels"]):
            raise MisconfigurationException(
                f"Expected the choice of the checkpoint ({state['hash']}, {len(state['kept_indices'])} rows,"
                f" remap_labels={state['remap_labels']}), but got {result} ({result.hash},"
                f" remap_labels={self.remap_labels}). Resume with the same source and pruner, or with the file of that"
                " choice: SourcePruning(coreset=...)."
            )

    def state(self) -> dict[str, Any]:
        """The kept rows and what names their source."""
        if self.result is None:
            return {}
        kept: dict[str, Tensor] = {
            "kept_indices": self.result.kept_indices,
            "kept_classes": self.result.kept_classes,
            "class_scores": self.result.class_scores,
        }
        return {
            **kept,
            "hash": self.result.hash,
            "source_hash": self.result.source_hash,
            "remap_labels": self.remap_labels,
        }
