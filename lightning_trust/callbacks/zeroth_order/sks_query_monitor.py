"""How often the black boxes of a run are asked, and when it is enough."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_trust.callbacks.zeroth_order.knowledge_loss import KnowledgeLoss
from lightning_trust.core.distributed import sum_over_ranks_
from lightning_trust.core.step import HostCallback
from lightning_trust.nn import BlackBoxLayer, Simulator, SimulatorCounts

_COUNTED = tuple(SimulatorCounts().__dict__)
_TOTALS = (*_COUNTED, "evaluation_queries", "one_sided")


class SKSQueryMonitor(HostCallback):
    """Counts and logs what the black boxes of a run are asked, and stops the run when a budget is spent.

    Every :class:`~lightning_trust.nn.BlackBoxLayer` of the host counts, and that of every
    :class:`~lightning_trust.callbacks.KnowledgeLoss` of the run. Questions outside of training steps, those of
    validation and of Lightning's sanity check, count as well, and are shown by themselves too. Where it is known how
    many coordinates a box has, what an epoch will cost is told before the first step, else after it.

    Logs, each summed over the ranks and over the whole run, the part before a resume included:
    ``trust/sks_queries``, rows that were asked; ``trust/sks_evaluation_queries``, those of them that were asked outside
    of training steps; ``trust/sks_cache_hits``, rows answered from memory;
    ``trust/sks_failures``, rows left without an answer; ``trust/sks_retries``; ``trust/sks_seconds``, spent waiting;
    ``trust/sks_one_sided``, differences that became one-sided at the bounds or for a missing answer;
    ``trust/sks_failure_rate``, failures over queries; and ``trust/sks_snr``, signal to noise of the last estimate from
    random directions, where there is one. A test logs the queries and the failure rate of its own.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Args:
        budget: Queries that a run may spend, resumed parts included. It stops after the last step that leaves enough
            for another one like it; at least one step is taken. None for no limit.
        name: Tells two callbacks of this class apart.

    Attributes:
        totals: The counts so far, over all ranks, by name.

    Raises:
        ValueError: If ``budget`` is not positive.
        MisconfigurationException: If there is no black box in the run.

    Example:
        >>> SKSQueryMonitor(budget=200_000).totals["queries"]
        0.0

    """

    def __init__(self, budget: int | None = None, name: str | None = None) -> None:
        super().__init__(name=name)
        if budget is not None and budget < 1:
            raise ValueError(f"Expected argument `budget` to be at least 1, but got {budget}.")
        self.budget = budget
        self.totals: dict[str, float] = dict.fromkeys(_TOTALS, 0.0)
        self._layers: list[BlackBoxLayer] = []
        self._start: list[tuple[Simulator, SimulatorCounts]] = []
        self._earlier = dict.fromkeys(_TOTALS, 0.0)
        self._at_batch_start = 0
        self._in_steps = 0
        self._one_sided = 0
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": [], "_start": []}

    # -- what is counted -----------------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start to count."""
        super().setup(trainer, pl_module, stage)
        self._find(trainer, pl_module)
        if stage == "fit":
            self._earlier = dict.fromkeys(_TOTALS, 0.0)
            self.totals = dict(self._earlier)
            self._in_steps = 0
            self._told = False

    def _find(self, trainer: Any, host: nn.Module) -> None:
        sources = [callback.sks for callback in trainer.callbacks if isinstance(callback, KnowledgeLoss)]
        found = [module for root in (host, *sources) for module in root.modules() if isinstance(module, BlackBoxLayer)]
        self._layers = [layer for layer in found if layer.simulator is not None]
        simulators = {id(layer.simulator): layer.simulator for layer in self._layers if layer.simulator is not None}
        self._start = [(each, SimulatorCounts(**asdict(each.counts))) for each in simulators.values()]
        self._one_sided = sum(layer.statistics.one_sided for layer in self._layers)

    def _here(self) -> SimulatorCounts:
        """The counts of this rank, in this run."""
        sums = SimulatorCounts()
        for simulator, start in self._start:
            since = simulator.counts - start
            for name in _COUNTED:
                setattr(sums, name, getattr(sums, name) + getattr(since, name))
        return sums

    def begin(self, trainer: Any, host: Any) -> None:
        """A host may have built its layers since."""
        if not self._layers:
            self._find(trainer, host)
        if not self._layers:
            raise MisconfigurationException(
                f"SKSQueryMonitor counts the questions of BlackBoxLayers, but {type(host).__name__} has none, nor has"
                " a KnowledgeLoss of the run. Remove it from `callbacks`."
            )

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the counts of the part before."""
        self.begin(trainer, host)
        self._earlier = dict(state["totals"])
        self.totals = dict(self._earlier)

    def state(self) -> dict[str, Any]:
        """The counts as they were after the last step."""
        return {"totals": dict(self.totals)}

    # -- hooks ---------------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell what an epoch will cost, where that is known."""
        self._tell(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note where the step starts."""
        self._at_batch_start = self._here().queries

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, and stop where the budget leaves no room for another step."""
        here = self._here()
        step = here.queries - self._at_batch_start
        self._in_steps += step
        one_sided = sum(layer.statistics.one_sided for layer in self._layers) - self._one_sided
        counted = [float(getattr(here, name)) for name in _COUNTED]
        numbers = [*counted, here.queries - self._in_steps, one_sided, step]
        # one collective a step, whatever has failed on which rank
        sums = torch.tensor(numbers, dtype=torch.float64, device=pl_module.device)
        sum_over_ranks_([sums])
        *counts, cost = sums.tolist()
        self.totals = {name: self._earlier[name] + value for name, value in zip(_TOTALS, counts, strict=True)}
        for key, value in self._logged(self.totals).items():
            pl_module.log(key, value, on_step=True, on_epoch=False, batch_size=1)
        ratios = [layer.statistics.snr for layer in self._layers if layer.statistics.snr == layer.statistics.snr]
        if ratios:
            pl_module.log("trust/sks_snr", sum(ratios) / len(ratios), on_step=True, on_epoch=False, batch_size=1)
        self._tell(trainer)
        if self.budget is not None and self.totals["queries"] + cost > self.budget:
            if not trainer.should_stop:
                rank_zero_info(
                    f"SKSQueryMonitor: the run stops after {self.totals['queries']:,.0f} of {self.budget:,} queries;"
                    f" a step asks {cost:,.0f}."
                )
            trainer.should_stop = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the queries of the test."""
        sums = torch.tensor([float(getattr(self._here(), name)) for name in _COUNTED], device=pl_module.device)
        sum_over_ranks_([sums])
        logged = self._logged(dict(zip(_COUNTED, sums.tolist(), strict=True)))
        for key in ("trust/sks_queries", "trust/sks_failure_rate"):
            pl_module.log(key, logged[key], batch_size=1)

    @staticmethod
    def _logged(totals: dict[str, float]) -> dict[str, float]:
        keys = {name: f"trust/sks_{'cache_hits' if name == 'hits' else name}" for name in totals}
        rate = totals["failures"] / max(1.0, totals["queries"])
        return {**{keys[name]: value for name, value in totals.items()}, "trust/sks_failure_rate": rate}

    def _tell(self, trainer: Any) -> None:
        costs = [layer.queries_per_sample() for layer in self._layers]
        if self._told or not costs or None in costs:
            return
        self._told = True
        sample = sum(cost for cost in costs if cost is not None)
        loader = trainer.train_dataloader
        rows = getattr(getattr(loader, "dataset", None), "__len__", lambda: None)()
        epoch = "" if rows is None else f", {sample * rows:,} for an epoch of {rows:,} samples"
        rank_zero_info(f"SKSQueryMonitor: the black boxes are asked {sample} times for a sample in training{epoch}.")
