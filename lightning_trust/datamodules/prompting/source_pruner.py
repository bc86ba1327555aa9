"""What all pruners of a source data set have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_first_rank, world_size
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.datamodules.prompting.prune_result import PruneResult, Unit, class_labels, dataset_hash
from lightning_trust.datamodules.prompting.source_features import (
    dataset_of,
    features_by_batch,
    is_iterable,
    shard_in_order,
)
from lightning_trust.datamodules.rows import with_transform
from lightning_trust.functional.prompting.source_scores import rank_groups

Data = DataLoader[Any] | Dataset[Any]
Transform = Callable[[Any], Any]


class SourcePruner(ABC):
    """Base of pruners: ``fit(surrogate, source, target)`` gives a :class:`PruneResult`.

    On several ranks each reads the rows r::W, counts are summed, and all get what rank 0 chose.

    Args:
        keep_ratio: Share of classes, clusters or rows to keep, in (0, 1].
        eval_transform: Takes the place of the source's ``transform`` where its rows are measured: no augmentation.
        batch_spec: Where inputs and targets sit in a batch.
        batch_size: Rows a batch in passes over the data.

    Raises:
        ValueError: If a number is out of its range.

    """

    #: whether a target is looked at
    needs_target: ClassVar[bool] = True
    #: whether a surrogate is asked
    needs_surrogate: ClassVar[bool] = True

    def __init__(
        self,
        keep_ratio: float = 0.5,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 256,
    ) -> None:
        if isinstance(keep_ratio, bool) or not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"Expected argument `keep_ratio` to lie in (0, 1], but got {keep_ratio!r}.")
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be a positive integer, but got {batch_size}.")
        self.keep_ratio = keep_ratio
        self.eval_transform = eval_transform
        self.batch_spec = batch_spec or BatchSpec()
        self.batch_size = batch_size

    def fit(
        self, surrogate: nn.Module | Sequence[nn.Module] | None, source: Data, target: Data | None = None
    ) -> PruneResult:
        """Choose what to keep.

        Args:
            surrogate: A small network trained on the source, on the device where it shall compute; several for
                GradNormPruner, None for RandomClassPruner.
            source: The source: a map-style data set, or a loader over one, whose order does not matter.
            target: The training data of the target, likewise; its labels are not used.

        Returns:
            The result, equal on all ranks.

        Raises:
            ValueError: If the target is empty, the source lacks labels where they are needed, nothing would be kept, or
                logits or features are not finite or of the wrong shape.
            MisconfigurationException: If the source is an IterableDataset, or something that is needed was not given.

        Warns:
            UserWarning: If classes are kept to which no target image was mapped: they were chosen by what decides ties.

        """
        owner = type(self).__name__
        surrogates = [] if surrogate is None else [surrogate] if isinstance(surrogate, nn.Module) else list(surrogate)
        for name, needed, given in (
            ("surrogate", self.needs_surrogate, surrogates),
            ("target", self.needs_target, target is not None),
        ):
            if needed and not given:
                raise MisconfigurationException(f"{owner} needs argument `{name}`, but got None.")
        if is_iterable(source):
            raise MisconfigurationException(
                f"{owner} chooses rows by number, but got a source over an IterableDataset, whose rows have none."
            )
        start = time.perf_counter()
        with untouched_random_state(), ExitStack() as modes:
            for network in surrogates:
                modes.enter_context(eval_mode(network))
            result = self._select(surrogates, source, target)
        # one choice for all; rounding may differ between machines
        result = replace(from_first_rank(result), seconds=time.perf_counter() - start)
        rank_zero_info(f"{result}, in {result.seconds:.2f} s")
        # where all are kept, or the last ones, none was chosen by mistake
        if result.zero_scores_kept and self.keep_ratio < 1.0 and not getattr(self, "reverse", False):
            rank_zero_warn(
                f"{owner} keeps {result.zero_scores_kept} of {len(result.kept_classes)} classes to which no target"
                f" image was mapped. A smaller `keep_ratio` than {self.keep_ratio} would leave them out."
            )
        return result

    @abstractmethod
    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        """Choose, networks being in eval mode."""

    # -- for subclasses ------------------------------------------------------------------------------------------------
    def _labels(self, source: Data) -> Tensor:
        return class_labels(dataset_of(source), self.batch_spec, type(self).__name__)

    def _one(self, surrogates: list[nn.Module]) -> nn.Module:
        if len(surrogates) != 1:
            raise ValueError(f"Expected argument `surrogate` to be one network, but got {len(surrogates)}.")
        return surrogates[0]

    def _source_batches(self, source: Data) -> DataLoader[Any]:
        dataset = with_transform(dataset_of(source), self.eval_transform)
        return shard_in_order(source, dataset, self.batch_size)

    def _target_batches(self, target: Data | None) -> Iterable[Any]:
        if target is None or not is_iterable(target):
            return () if target is None else shard_in_order(target, dataset_of(target), self.batch_size)
        if world_size() > 1:
            raise MisconfigurationException(
                "A target over an IterableDataset cannot be counted once on several ranks. Choose on one rank, save the"
                " result, and read it: SourcePruning(coreset=...)."
            )
        return target if isinstance(target, DataLoader) else DataLoader(target, batch_size=self.batch_size)

    def _result(
        self, source: Data, unit: Unit, scores: Tensor, kept_classes: Tensor, kept_rows: Tensor, groups: Tensor
    ) -> PruneResult:
        dataset: Any = dataset_of(source)
        return PruneResult(
            pruner=type(self).__name__,
            unit=unit,
            class_scores=scores.cpu(),
            kept_classes=kept_classes.cpu().sort().values,
            kept_indices=kept_rows.cpu().sort().values,
            source_rows=len(dataset),
            # clusters are no labels
            source_hash=dataset_hash(dataset, self.batch_spec, None if unit == "cluster" else groups),
        )

    def _count(self, whole: int, what: str) -> int:
        count = round(self.keep_ratio * whole)
        if not count:
            raise ValueError(
                f"Expected argument `keep_ratio` to leave {what}, but {self.keep_ratio} of {whole} are none."
            )
        return count

    def _keep_groups(
        self, source: Data, unit: Unit, groups: Tensor, scores: Tensor, ties: Tensor, reverse: bool
    ) -> PruneResult:
        """Keep the groups with the highest scores, or with the lowest."""
        order = rank_groups(scores, ties).cpu()
        count = self._count(len(order), "a class")
        kept = order[-count:] if reverse else order[:count]
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[kept] = True
        return self._result(source, unit, scores, kept, keep[groups.cpu()].nonzero().flatten(), groups)

    def _keep_rows(self, source: Data, labels: Tensor, rows: Tensor) -> PruneResult:
        """Keep rows; the scores of classes are how many rows they keep."""
        scores = torch.bincount(labels[rows], minlength=int(labels.max()) + 1)
        return self._result(source, "row", scores, scores.nonzero().flatten(), rows, labels)


def check_target(evidence: Tensor) -> None:
    """Raise ValueError where no target image was counted, on any rank."""
    if not int(evidence[0].sum()):
        raise ValueError("Expected argument `target` to hold images, but got none.")


def source_features(model: nn.Module, batches: Iterable[Any], layer: str | None, batch_spec: BatchSpec) -> Tensor:
    """Features of this rank's rows; a rank may have none."""
    parts = [features for features, _ in features_by_batch(model, batches, layer, batch_spec)]
    if not parts:
        raise ValueError("Expected the source to hold at least a row for every rank, but got fewer.")
    return torch.cat(parts)
