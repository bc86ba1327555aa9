"""What map-style datasets say of their rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_trust.core.batch import BatchSpec


def dataset_targets(dataset: Any, spec: BatchSpec) -> Tensor:
    """Labels of a map-style dataset, shape ``(N,)``; read sample by sample where the dataset does not list them."""
    if isinstance(dataset, Subset):
        return dataset_targets(dataset.dataset, spec)[torch.as_tensor(list(dataset.indices))]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([dataset_targets(part, spec) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset) and isinstance(spec.targets, int):
        return dataset.tensors[spec.targets]
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            return torch.as_tensor(found)
    return torch.stack([torch.as_tensor(spec.targets_of(dataset[row])) for row in range(len(dataset))])


def with_transform(dataset: Any, transform: Callable[[Any], Any] | None) -> Any:
    """A dataset, or what it is a subset of, with another ``transform``; the one that came in is left as it was."""
    if transform is None:
        return dataset
    changed = copy.copy(dataset)
    if isinstance(dataset, Subset):
        changed.dataset = with_transform(dataset.dataset, transform)
    elif isinstance(dataset, ConcatDataset):
        changed.datasets = [with_transform(part, transform) for part in dataset.datasets]
    elif hasattr(dataset, "transform"):
        changed.transform = transform
    else:
        raise MisconfigurationException(
            "Expected the training set to have an attribute `transform` that `eval_transform` can take the place of,"
            f" but {type(dataset).__name__} has none."
        )
    return changed
