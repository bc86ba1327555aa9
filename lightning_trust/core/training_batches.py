"""The training data, for passes beside the training: in validation and test as well."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_trust.core.host import overrides
from lightning_trust.core.randomness import untouched_random_state


def training_batches(trainer: Any, host: Any, owner: str, purpose: str, at_most: int | None = None) -> Iterable[Any]:
    """The training data of a run, in any of its stages, apart from the loader that a fit is working through.

    Args:
        trainer: The Trainer; ``limit_train_batches`` counts.
        host: The host.
        owner: Name of the class that asks, for messages.
        purpose: What it needs the data for, such as ``"counts predictions"``.
        at_most: At most so many batches; all if None.

    Raises:
        MisconfigurationException: If there are none, or several loaders.
        ValueError: If they have no batch.

    """
    with untouched_random_state():
        if trainer.state.fn == "fit":
            loader = trainer.fit_loop._data_source.dataloader()
        elif trainer.datamodule is not None:
            trainer.datamodule.setup("fit")
            loader = trainer.datamodule.train_dataloader()
        elif overrides(host, "train_dataloader"):
            loader = host.train_dataloader()
        else:
            raise MisconfigurationException(
                f"{owner} {purpose} on the training data, but got none. Pass `datamodule=` to"
                " the Trainer, or give the host a `train_dataloader`."
            )
        if isinstance(loader, (dict, list, tuple, CombinedLoader)):
            raise MisconfigurationException(
                f"{owner} {purpose} on one training data loader, but got a {type(loader).__name__} of several."
            )
        loader = trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=RunningStage.TRAINING)
    limit = trainer.limit_train_batches
    counts = [at_most, limit if isinstance(limit, int) else None]
    if isinstance(limit, float) and limit < 1.0:
        counts.append(int(len(loader) * limit))
    known = [count for count in counts if count is not None]
    batches = _FirstBatches(loader, min(known) if known else None)
    if not any(True for _ in batches):
        raise ValueError(f"{owner} {purpose} on the training data, but they have no batch.")
    return batches


class _FirstBatches:
    """The first batches of a loader, anew in every pass, without a trace in the loader or in random states."""

    def __init__(self, loader: Any, count: int | None) -> None:
        self.loader = copy.copy(loader)
        self.count = count
        if isinstance(loader, DataLoader):
            # persistent workers may be at work for the training
            self.loader._iterator = None

    def __iter__(self) -> Iterator[Any]:
        found = getattr(self.loader, "generator", None)
        generators = [found] if isinstance(found, torch.Generator) else []
        states = [generator.get_state() for generator in generators]
        try:
            with untouched_random_state():
                yield from itertools.islice(iter(self.loader), self.count)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
