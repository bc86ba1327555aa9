"""A source data set with only the rows that a pruner kept, and a data module around the user's that serves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_trust.core.batch import BatchSpec
from lightning_trust.datamodules.prompting.prune_result import PruneResult, class_labels
from lightning_trust.datamodules.rows import dataset_targets
from lightning_trust.datamodules.wrapped import WrappedDataModule, loader_settings


def remap_labels(labels: Tensor, kept_classes: Tensor) -> Tensor:
    """Labels of kept classes, counted anew: ``0, 1, ...`` in the order of the classes.

    ``kept_classes[remapped]`` gives the old ones back.

    Args:
        labels: Labels, int64, any shape.
        kept_classes: The classes, ascending.

    Returns:
        New labels of the same shape.

    Raises:
        ValueError: If a label is of a class that was not kept.

    Example:
        >>> remap_labels(torch.tensor([7, 2, 7]), torch.tensor([2, 5, 7]))
        tensor([2, 0, 2])

    """
    places = torch.searchsorted(kept_classes, labels).clamp(max=len(kept_classes) - 1)
    strange = labels[kept_classes[places] != labels]
    if len(strange):
        raise ValueError(
            f"Expected argument `labels` to be of the {len(kept_classes)} classes that are kept, but got"
            f" {int(strange[0])}."
        )
    return places


class PrunedDataset(Dataset[Any]):
    """Some rows of a map-style data set, with labels counted anew where a map is given.

    Args:
        dataset: The data set.
        indices: Numbers of the rows, in the order in which they shall stand.
        label_map: New label of each old one.
        batch_spec: Where the label sits in a sample.

    Raises:
        ValueError: If a row number is out of range or given twice.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> whole = TensorDataset(torch.arange(4.0), torch.tensor([5, 8, 5, 8]))
        >>> pruned = PrunedDataset(whole, [1, 3], label_map={8: 0})
        >>> pruned[1], pruned.targets
        ((tensor(3.), tensor(0)), tensor([0, 0]))

    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Sequence[int] | Tensor,
        label_map: Mapping[int, int] | None = None,
        batch_spec: BatchSpec | None = None,
    ) -> None:
        count = len(dataset)  # type: ignore[arg-type]
        rows = torch.as_tensor(indices, dtype=torch.int64)
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= count or len(rows.unique()) < len(rows)):
            raise ValueError(f"Expected argument `indices` to be numbers in [0, {count}), each once.")
        self.dataset = dataset
        self.indices = rows
        self.label_map = None if label_map is None else dict(label_map)
        self.batch_spec = batch_spec or BatchSpec()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self._relabelled(self.dataset[int(self.indices[index])])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The rows at ``indices``; together, where the data set fetches rows together."""
        rows = self.indices[torch.as_tensor(indices)].tolist()
        together = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[row] for row in rows] if together is None else together(rows)
        return samples if self.label_map is None else [self._relabelled(sample) for sample in samples]

    def _relabelled(self, sample: Any) -> Any:
        if self.label_map is None:
            return sample
        old = self.batch_spec.targets_of(sample)
        new: Any = self._new(int(old))
        if isinstance(old, Tensor):
            new = torch.full_like(old, new)
        return self.batch_spec.replace(sample, targets=new)

    def _new(self, old: int) -> int:
        if self.label_map is None or old not in self.label_map:
            raise ValueError(f"Expected argument `label_map` to have the label {old}, which a row has.")
        return self.label_map[old]

    @property
    def targets(self) -> Tensor:
        """Labels of the rows, counted anew where they are."""
        labels = dataset_targets(self.dataset, self.batch_spec)[self.indices]
        if self.label_map is None:
            return labels
        return torch.tensor([self._new(label) for label in labels.tolist()], dtype=torch.int64)


def pruned_loader(
    loader: Any,
    result: PruneResult,
    remap: bool,
    batch_spec: BatchSpec,
    training: bool,
    owner: str,
    known: bool = False,
) -> DataLoader[Any]:
    """A loader like a user's, over the kept rows of the source, or over the rows of kept classes of other data.

    Args:
        loader: The user's loader.
        result: What is kept.
        remap: Whether labels are counted anew.
        batch_spec: Where labels sit.
        training: Whether this is the source from which rows were chosen, rather than validation data.
        owner: Name of the class that asks, for errors.
        known: Whether training data are known to be the source; then only their number is looked at.

    Raises:
        MisconfigurationException: If the loader is none, has an order of its own, is over an IterableDataset or another
            source, or no row would be left.

    """
    dataset = plain_dataset(loader, owner)
    if training:
        if not known or len(dataset) != result.source_rows:
            result.check_source(dataset, batch_spec)
        rows = result.kept_indices
    elif result.unit == "cluster":
        # new rows belong to no cluster
        return loader
    else:
        labels = class_labels(dataset, batch_spec, owner)
        rows = torch.isin(labels, result.kept_classes).nonzero().flatten()
        if not len(rows):
            raise MisconfigurationException(f"{owner} finds no row of a kept class in the validation data.")
    pruned = PrunedDataset(dataset, rows, result.label_map if remap else None, batch_spec)
    return loader_over(pruned, loader)


def plain_dataset(loader: Any, owner: str) -> Any:
    """The data set of a loader that can be made anew over other rows.

    Raises:
        MisconfigurationException: If it cannot.

    """
    if type(loader) is not DataLoader:
        raise MisconfigurationException(f"{owner} makes plain DataLoaders anew, but got a {type(loader).__name__}.")
    if isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            f"{owner} chooses rows by number, but got a DataLoader over an IterableDataset, whose rows have none."
        )
    sampler = loader.sampler
    drawn = isinstance(sampler, RandomSampler) and (sampler.replacement or sampler._num_samples is not None)
    if type(sampler) not in (SequentialSampler, RandomSampler, DistributedSampler) or drawn:
        raise MisconfigurationException(
            f"{owner} knows how to shuffle fewer rows, in order or on several ranks, but got a {type(sampler).__name__}"
            " of your own. Use `shuffle=True` or `shuffle=False`."
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise MisconfigurationException(
            f"{owner} cuts batches of `batch_size` rows anew, but got a loader with batch_size={loader.batch_size} and"
            f" a {type(loader.batch_sampler).__name__}."
        )
    return loader.dataset


def loader_over(dataset: Dataset[Any], loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader over other rows, with the settings and the kind of order of a user's."""
    sampler = loader.sampler
    order: dict[str, Any] = {}
    if isinstance(sampler, DistributedSampler):
        order["sampler"] = DistributedSampler(
            dataset, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=isinstance(sampler, RandomSampler) or None,
        drop_last=loader.drop_last,
        generator=loader.generator,
        **order,
        **loader_settings(loader),
    )


class PrunedDataModule(WrappedDataModule):
    """The user's data module with only what a pruner kept: training rows, and validation rows of kept classes.

    Order, batch size and workers are as in the user's loaders; test and prediction data, transfer hooks and attributes
    are the user's own. Validation data of a choice of clusters stay whole, for new rows belong to none.

    Args:
        datamodule: The user's data module.
        result: What is kept: a :class:`PruneResult`, or a file that one was saved to.
        remap_labels: Whether labels are counted anew, for a head with one output a kept class; test data keep theirs.
        batch_spec: Where labels sit in a sample, for data sets without ``targets``.

    Raises:
        FileNotFoundError: If there is no such file.
        MisconfigurationException: If clusters are to be labels, or, when loaders are asked for, the training data are
            not those from which rows were chosen, or have an order of their own; or a run is resumed with other rows.

    Example:
        >>> from lightning_trust.datamodules import Digits, RandomClassPruner
        >>> digits = Digits()
        >>> digits.setup("fit")
        >>> result = RandomClassPruner(0.2).fit(None, digits.train_dataset)
        >>> len(PrunedDataModule(digits, result).train_dataloader().dataset) == len(result.kept_indices)
        True

    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        result: str | PruneResult,
        remap_labels: bool = False,
        batch_spec: BatchSpec | None = None,
    ) -> None:
        super().__init__(datamodule)
        self.result = result if isinstance(result, PruneResult) else PruneResult.load(result)
        self.remap_labels = remap_labels
        self.batch_spec = batch_spec or BatchSpec()
        if remap_labels:
            _ = self.result.label_map
        if "val_dataloader" in self.__dict__:
            self.__dict__["val_dataloader"] = self._val_dataloader

    def _pruned(self, loader: Any, training: bool) -> DataLoader[Any]:
        return pruned_loader(loader, self.result, self.remap_labels, self.batch_spec, training, type(self).__name__)

    def train_dataloader(self) -> DataLoader[Any]:
        """The kept rows."""
        return self._pruned(self.datamodule.train_dataloader(), training=True)

    def _val_dataloader(self) -> Any:
        loaders = self.datamodule.val_dataloader()
        if isinstance(loaders, list | tuple):
            return [self._pruned(loader, training=False) for loader in loaders]
        return self._pruned(loaders, training=False)

    def state_dict(self) -> dict[str, Any]:
        """State of the user's data module, and which rows are kept."""
        return {**super().state_dict(), "prune_hash": self.result.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the user's data module.

        Raises:
            MisconfigurationException: If the checkpoint is of a run on other rows.

        """
        # a model may be measured beside any rows
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        if fits and state_dict["prune_hash"] != self.result.hash:
            raise MisconfigurationException(
                f"Expected the kept rows of the checkpoint ({state_dict['prune_hash']}), but got {self.result}"
                f" ({self.result.hash}). Resume with the same result and the same training set."
            )
        super().load_state_dict(state_dict)
