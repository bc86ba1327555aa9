"""Search for the best visual prompting of a frozen backbone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from lightning_trust.recipes.prompting.optuna_search import search_with_optuna
from lightning_trust.recipes.prompting.ray_search import search_with_ray
from lightning_trust.recipes.prompting.vp_config import VPConfig
from lightning_trust.recipes.prompting.vp_search_space import VPGrid, VPSearchSpace
from lightning_trust.recipes.prompting.vp_trial import Report, SearchPlan, TrialOutcome, fit_trial

_BACKENDS = {"optuna": search_with_optuna, "ray": search_with_ray}


class AutoVPTuner:
    r"""Search a space of visual-prompting configurations by short trials; the best one is trained afterwards.

    "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024). Each trial trains a configuration for a
    few epochs at its initial learning rate. Asynchronous successive halving (``pruner="asha"``, reduction factor 2)
    ends a trial after :math:`r_k = r_{\min} 2^k` epochs unless its metric is among the better half of those that came
    so far. A trial that fails is recorded and the search goes on. The backbones' weights never change.

    The paper ranks trials by training accuracy (``metric="train_acc"``); here the validation accuracy decides unless
    that is asked for.

    Args:
        space: What to search over.
        sampler: ``"grid"`` tries everything once; ``"tpe"`` and ``"random"`` draw.
        pruner: ``"asha"``, or None to run every trial to its end.
        metric: Key in the log of the trials, ``val_acc`` or ``val/acc``, or ``train_acc``.
        min_epochs: Epochs before a trial may be ended early.
        max_epochs: Epochs of a trial.
        n_trials: Number of trials; as many as there are configurations if None.
        backend: ``"optuna"`` runs trials one after the other in this process; ``"ray"`` side by side, on a cluster.
        storage: File in which trials are kept (``.journal`` or ``.log``; ``.db`` or ``.sqlite``), for ``"ray"`` a
            folder. A search that was killed goes on at the next trial. None keeps them in memory (for ``"ray"``, in a
            folder of its own).
        seed: Seed of the sampler and of every trial.
        mode: ``"max"``, or ``"min"`` for a loss.
        trainer_args: Further arguments of the trials' Trainer.
        resources: What a trial takes of a cluster, for ``"ray"``: ``{"cpu": 2, "gpu": 1}``; two CPUs if None.
        console: Where the table is printed; the terminal if None.

    Attributes:
        results: After :meth:`search`, a dict a trial, best first: ``rank``, ``trial``, ``state``, ``value``,
            ``epochs``, ``seconds``, ``error``, the choices, and ``config``. What was pruned stands after what was not,
            what failed at the end.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: In ``search``, if the backend's package is not installed.

    Example:
        >>> small = {"name": "SmallCNN", "num_classes": 40, "in_channels": 1, "image_size": 28}
        >>> space = VPSearchSpace({"small": small}, num_map=(1,), image_size=16)
        >>> tuner = AutoVPTuner(space, max_epochs=2, min_epochs=1)
        >>> len(space.grid(num_target=10))
        18
        >>> AutoVPTuner(space, min_epochs=6)
        Traceback (most recent call last):
        ...
        ValueError: Expected arguments `min_epochs` and `max_epochs` to be in ascending order and at least 1, but got 6
        and 5.

    """

    def __init__(
        self,
        space: VPSearchSpace,
        sampler: Literal["grid", "tpe", "random"] = "grid",
        pruner: Literal["asha"] | None = "asha",
        metric: str = "val_acc",
        min_epochs: int = 3,
        max_epochs: int = 5,
        n_trials: int | None = None,
        backend: Literal["optuna", "ray"] = "optuna",
        storage: str | None = None,
        seed: int = 0,
        mode: Literal["max", "min"] = "max",
        trainer_args: Mapping[str, Any] | None = None,
        resources: Mapping[str, float] | None = None,
        console: Console | None = None,
    ) -> None:
        for argument, value, words in (
            ("sampler", sampler, ("grid", "tpe", "random")),
            ("pruner", pruner, ("asha", None)),
            ("backend", backend, tuple(_BACKENDS)),
            ("mode", mode, ("max", "min")),
        ):
            if value not in words:
                raise ValueError(f"Expected argument `{argument}` to be one of {list(words)}, but got {value!r}.")
        if not 1 <= min_epochs <= max_epochs:
            raise ValueError(
                "Expected arguments `min_epochs` and `max_epochs` to be in ascending order and at least 1, but got"
                f" {min_epochs} and {max_epochs}."
            )
        if n_trials is not None and n_trials < 1:
            raise ValueError(f"Expected argument `n_trials` to be at least 1, but got {n_trials}.")
        self.space = space
        self.sampler: Literal["grid", "tpe", "random"] = sampler
        self.pruner: Literal["asha"] | None = pruner
        self.metric = metric
        self.min_epochs = min_epochs
        self.max_epochs = max_epochs
        self.n_trials = n_trials
        self.backend = backend
        self.storage = storage
        self.seed = seed
        self.mode: Literal["max", "min"] = mode
        self.trainer_args = dict(trainer_args or {})
        self.resources = resources
        self.console = console
        self.results: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What goes to other processes: a terminal does not."""
        return {**self.__dict__, "console": None}

    def search(self, datamodule: pl.LightningDataModule) -> VPConfig:
        """Run the trials, print a ranked table, and give the best configuration.

        Args:
            datamodule: The task: raw images in [0, 1] and labels, with validation data. ``class_names`` tell its
                classes.

        Raises:
            ImportError: If the package of the backend is not installed.
            MisconfigurationException: If the metric is not logged, or the storage holds another search.
            RuntimeError: If every trial failed, or in one of several processes of a launcher.
            ValueError: If the space is empty for this task.

        """
        if "LOCAL_RANK" in os.environ:
            raise RuntimeError(
                "AutoVPTuner is run by one process, but this is one of several, which would each run every trial. Use"
                " backend='ray' to run trials side by side."
            )
        grid = self.space.grid(target_names=getattr(datamodule, "class_names", None))
        plan = self._plan(grid)

        def objective(choices: Mapping[str, Any], report: Report) -> float:
            config = grid.config(choices)
            return self.evaluate(config, grid.network(config), datamodule, report)

        outcomes = _BACKENDS[self.backend](objective, plan)
        self.results = self._ranked(outcomes, grid)
        if self.results[0]["state"] != "complete":
            raise RuntimeError(f"Every one of {len(outcomes)} trials failed. The first: {self.results[0]['error']}")
        (self.console or Console()).print(self.table())
        best: VPConfig = self.results[0]["config"]
        return best

    def evaluate(self, config: VPConfig, network: Any, datamodule: pl.LightningDataModule, report: Report) -> float:
        """Run a trial; a subclass may score configurations otherwise.

        Args:
            config: The configuration.
            network: Its backbone, built.
            datamodule: The task.
            report: To be told the epochs that are done and the metric after each; says whether to stop.

        Returns:
            The metric at the end.

        """
        return fit_trial(
            config, network, datamodule, report, self.metric, self.max_epochs, self.seed, self.trainer_args
        )

    def table(self) -> Table:
        """The trials as a table, best first."""
        table = Table(title=f"AutoVP: {len(self.results)} trials by {self.metric}")
        configs: list[VPConfig] = [row["config"] for row in self.results]
        columns: dict[str, list[str]] = {
            "#": [str(row["rank"]) for row in self.results],
            "Backbone and mapping": [row["family"] for row in self.results],
            "Scale": [f"{config.scale:g}{', learned' if config.learn_scale else ''}" for config in configs],
            "lr": [f"{config.lr:g}" for config in configs],
            "Decay": [f"{config.weight_decay:g}" for config in configs],
            self.metric: ["-" if row["value"] is None else f"{row['value']:.4f}" for row in self.results],
            "Epochs": [str(row["epochs"]) for row in self.results],
            "Seconds": [f"{row['seconds']:.1f}" for row in self.results],
            "State": [row["state"] for row in self.results],
        }
        for name in ("lr", "Decay"):
            # what was not searched over takes no place
            if len(set(columns[name])) == 1:
                columns.pop(name)
        for name in columns:
            table.add_column(name, justify="right" if name in ("#", self.metric, "Epochs", "Seconds") else "left")
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        return table

    def _plan(self, grid: VPGrid) -> SearchPlan:
        count = self.n_trials or len(grid)
        if self.sampler == "grid":
            count = min(count, len(grid))
        plan = SearchPlan(
            values={name: list(values) for name, values in grid.values.items()},
            sampler=self.sampler,
            pruner=self.pruner,
            mode=self.mode,
            min_epochs=self.min_epochs,
            max_epochs=self.max_epochs,
            n_trials=count,
            storage=self.storage,
            seed=self.seed,
            fingerprint="",
            resources=self.resources,
        )
        # more trials of the same search are welcome
        same = (self.metric, self.mode, self.sampler, self.pruner, self.min_epochs, self.max_epochs, self.seed)
        return replace(plan, fingerprint=repr((same, grid.fingerprint())))

    def _ranked(self, outcomes: list[TrialOutcome], grid: VPGrid) -> list[dict[str, Any]]:
        states = ("complete", "pruned", "failed")
        sign = -1.0 if self.mode == "max" else 1.0

        def place(outcome: TrialOutcome) -> tuple[int, float, int]:
            value = 0.0 if outcome.value is None else sign * outcome.value
            return states.index(outcome.state), value, outcome.number

        return [
            {
                "rank": rank,
                "trial": outcome.number,
                "state": outcome.state,
                "value": outcome.value,
                "epochs": outcome.epochs,
                "seconds": outcome.seconds,
                "error": outcome.error,
                **outcome.choices,
                "config": grid.config(outcome.choices),
            }
            for rank, outcome in enumerate(sorted(outcomes, key=place), start=1)
        ]
