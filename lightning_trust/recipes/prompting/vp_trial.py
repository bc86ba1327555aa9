"""A trial of AutoVP: a short run of one configuration, and what came of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_trust.nn import Backbone
from lightning_trust.recipes.prompting.vp_config import VPConfig

#: told the epochs that are done and the metric, says whether the trial is to end
Report = Callable[[int, float], bool]
#: choices of a configuration and where to report -> the metric at the end
Objective = Callable[[Mapping[str, Any], Report], float]
State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class TrialOutcome:
    """What came of one trial.

    Args:
        number: Its place among the trials.
        choices: What was chosen.
        state: ``"complete"``, ``"pruned"`` or ``"failed"``.
        value: The last metric; None where there was none.
        epochs: Epochs that it was trained.
        seconds: How long it took.
        error: What was raised, where it failed.

    """

    number: int
    choices: Mapping[str, Any]
    state: State
    value: float | None
    epochs: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class SearchPlan:
    """What a backend needs to know.

    Args:
        values: Name of a choice -> its values.
        sampler: ``"grid"``, ``"tpe"`` or ``"random"``.
        pruner: ``"asha"``, or None.
        mode: ``"max"`` or ``"min"``.
        min_epochs: Epochs before a trial may end early.
        max_epochs: Epochs of a trial.
        n_trials: Number of trials.
        storage: Where trials are kept; None keeps them in memory.
        seed: Seed of the sampler.
        fingerprint: Tells one search from another.
        resources: What a trial needs of a cluster.

    """

    values: Mapping[str, list[Any]]
    sampler: Literal["grid", "tpe", "random"]
    pruner: Literal["asha"] | None
    mode: Literal["max", "min"]
    min_epochs: int
    max_epochs: int
    n_trials: int
    storage: str | None
    seed: int
    fingerprint: str
    resources: Mapping[str, float] | None = None


def fit_trial(
    config: VPConfig,
    network: Backbone,
    datamodule: pl.LightningDataModule,
    report: Report,
    metric: str,
    max_epochs: int,
    seed: int,
    trainer_args: Mapping[str, Any],
) -> float:
    """Train a configuration for a few epochs.

    Args:
        config: The configuration.
        network: Its backbone; no weight of it changes.
        datamodule: The task.
        report: Told the metric after every epoch.
        metric: Key in the log; ``val_acc`` stands for ``val/acc``, and ``train/acc`` is measured here.
        max_epochs: Epochs. The learning rate is the initial one in all of them.
        seed: Seed of the run; random states are put back.
        trainer_args: Further arguments of the Trainer.

    Returns:
        The metric after the last epoch.

    Raises:
        MisconfigurationException: If the metric is not logged.

    """
    watch = _Watch(metric, report, max_epochs)
    with isolate_rng(), _seeded(seed), _without_hints():
        host = config.build(network, schedule="constant")
        trainer = pl.Trainer(
            **{
                "accelerator": "auto",
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **trainer_args,
                "max_epochs": max_epochs,
                "num_sanity_val_steps": 0,
                "callbacks": [*config.callbacks(), *trainer_args.get("callbacks", ()), watch],
            }
        )
        trainer.fit(host, datamodule=datamodule)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if watch.value is None:
        raise MisconfigurationException(watch.missing(trainer))
    return watch.value


class _Watch(pl.Callback):
    """Reports the metric after each epoch and ends the run where that is wanted."""

    def __init__(self, metric: str, report: Report, max_epochs: int) -> None:
        self.metric, self.report, self.max_epochs = metric, report, max_epochs
        self.measures = metric in ("train/acc", "train_acc")
        self.value: float | None = None
        self._logits: torch.Tensor | None = None
        self._hits, self._rows = torch.tensor(0), 0
        self._handle: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.measures:
            self._handle = pl_module.network.register_forward_hook(self._keep)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _keep(self, module: Any, inputs: Any, outputs: torch.Tensor) -> None:
        self._logits = outputs.detach()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._hits, self._rows = torch.zeros((), dtype=torch.int64, device=pl_module.device), 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.measures:
            assert self._logits is not None  # noqa: S101  (a step calls the network)
            self._hits += (self._logits.argmax(dim=1) == batch[1]).sum()
            self._rows += len(batch[1])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # validation is over by now
        if self.measures:
            found = float(self._hits) / max(1, self._rows)
        else:
            keys = (self.metric, self.metric.replace("_", "/", 1))
            key = next((key for key in keys if key in trainer.callback_metrics), None)
            if key is None:
                raise MisconfigurationException(self.missing(trainer))
            found = float(trainer.callback_metrics[key])
        self.value = found
        epochs = trainer.current_epoch + 1
        if self.report(epochs, found) and epochs < self.max_epochs:
            trainer.should_stop = True

    def missing(self, trainer: Any) -> str:
        return (
            f"Expected argument `metric` to be logged in every epoch, but got {self.metric!r} and there are:"
            f" {', '.join(sorted(trainer.callback_metrics)) or 'none'}. A datamodule without validation data has no"
            " `val/acc`."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # not `seed_everything`, which leaves its mark in the environment; augmentation of a user's may draw from any
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    yield


@contextmanager
def _without_hints() -> Iterator[None]:
    """Lightning's lines about devices and tips, the same in every trial, are left out."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
