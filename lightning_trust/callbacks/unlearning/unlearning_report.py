"""The evidence beside an unlearned model: accuracies, the membership attack, and what it cost."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_trust.callbacks.load_weights import LoadWeights
from lightning_trust.callbacks.unlearning.unlearner import Unlearner, check_logits, find_split
from lightning_trust.callbacks.unlearning.weight_saliency import WeightSaliency
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_first_rank, gather_rows
from lightning_trust.core.host import find_network
from lightning_trust.core.passes import evaluate
from lightning_trust.core.records import METRICS, RunRecord, hardware, versions
from lightning_trust.core.step import HostCallback
from lightning_trust.datamodules.unlearning.forget_split import ForgetSplit, Part
from lightning_trust.functional.unlearning.membership_inference import (
    Feature,
    check_feature,
    membership_feature,
    membership_inference,
)

_BINS = 25
_PARTS: tuple[Part, ...] = ("forget", "retain", "test")


class UnlearningReport(HostCallback):
    r"""Measure what a run has forgotten, before and after, and write it to ``run.json``.

    * UA, unlearning accuracy: :math:`100 - \mathrm{acc}(D_f)`;
    * RA, remaining accuracy: :math:`\mathrm{acc}(D_r)`;
    * TA, test accuracy (where a class is forgotten, without that class);
    * MIA-efficacy: share of :math:`D_f` that a membership attack takes for non-members;

    all in percent, on un-augmented rows in eval mode, each row once on any number of ranks. None of them is better
    for being bigger: the closer to Retrain, a model trained without the forget set, the better. ``lightning-trust
    report`` compares the records of several runs with their Retrain.

    Seconds count the training steps (from batch start to batch end) and the passes of callbacks before training (such
    as a saliency mask), not evaluation.

    Under ``trainer.test`` the four figures are logged as ``trust/UA``, ``trust/RA``, ``trust/TA`` and ``trust/MIA``;
    after a fit they go to the loggers under the same names.

    Paper: Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023).

    Args:
        folder: Where ``run.json`` is written; the Trainer's ``default_root_dir`` if None.
        label: Name of the run in tables; the names of the run's methods, or ``Retrain``, if None.
        feature: What the membership attacker looks at.
        max_rows: At most so many rows a side are used by the attack.
        attack_seed: Seed of the draw of these rows.
        verbose: Whether to print the figures at the end of the fit.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If ``max_rows`` is below 1 or ``feature`` is another word (at once); if the network puts out no
            logits, or outputs that are not finite.
        MisconfigurationException: If the run's data module is no ``ForgetSplit``.

    Example:
        >>> UnlearningReport(folder="runs/salun").max_rows
        2000

    """

    stages = ("fit", "test")

    def __init__(
        self,
        folder: str | None = None,
        label: str | None = None,
        feature: Feature = "confidence",
        max_rows: int = 2000,
        attack_seed: int = 0,
        verbose: bool = True,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_feature(feature)
        if max_rows < 1:
            raise ValueError(f"Expected argument `max_rows` to be at least 1, but got {max_rows}.")
        self.folder = folder
        self.label = label
        self.feature = feature
        self.max_rows = max_rows
        self.attack_seed = attack_seed
        self.verbose = verbose
        self.batch_spec = batch_spec or BatchSpec()
        self.network = network
        self.record: RunRecord | None = None
        self._before: dict[str, Any] | None = None
        self._after: dict[str, Any] | None = None
        self._clock = _StepClock()
        self._passes = 0.0

    # -- measuring -----------------------------------------------------------------------------------------------------
    def measure(self, trainer: Any, host: Any) -> dict[str, Any]:
        """UA, RA, TA and MIA of a host as it is, with the histograms of its confidence.

        Args:
            trainer: The Trainer; its data module tells the parts of the data.
            host: The host.

        Returns:
            ``metrics`` in percent, ``confidence`` counts, ``rows`` the attack used a side, ``counts`` of the parts.

        """
        split = find_split(trainer, type(self).__name__)
        network = find_network(host, self.network)
        parts = {part: self._rows(trainer, host, network, split, part) for part in _PARTS}
        accuracy = {part: 100.0 * float(correct.double().mean()) for part, (correct, _, _) in parts.items()}
        features = {part: rows for part, (_, rows, _) in parts.items()}
        for part, rows in features.items():
            # on every rank, for those that wait for the first one would wait for ever
            if not torch.isfinite(rows).all():
                raise ValueError(
                    f"Expected the outputs of the network to be finite, because {type(self).__name__} measures them,"
                    f" but got NaN or infinite values on {part} rows. Has the model diverged?"
                )
        # one rank fits the attack, so that all have the same figure
        efficacy, used = from_first_rank(
            membership_inference(**features, max_rows=self.max_rows, seed=self.attack_seed)
            if trainer.is_global_zero
            else None
        )
        edges = torch.linspace(0.0, 1.0, _BINS + 1)
        histograms = {
            part: torch.histogram(parts[part][2].float().clamp(0.0, 1.0), edges).hist.long().tolist()
            for part in ("forget", "test")
        }
        values = (100.0 - accuracy["forget"], accuracy["retain"], accuracy["test"], efficacy)
        return {
            "metrics": dict(zip(METRICS, values, strict=True)),
            "confidence": histograms,
            "rows": used,
            "counts": {part: len(rows) for part, rows in features.items()},
        }

    def _rows(
        self, trainer: Any, host: Any, network: Any, split: ForgetSplit, part: Part
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each row is classified right, its features, and its confidence, gathered from all ranks."""
        correct, features, confidence = [], [], []
        for logits, targets in evaluate(trainer, host, network, split.part(part, shard=True), self.batch_spec):
            check_logits(type(self).__name__, logits)
            # in double precision, which not every accelerator has
            probabilities, labels = logits.cpu().double().softmax(1), targets.cpu()
            correct.append(probabilities.argmax(1) == labels)
            features.append(membership_feature(probabilities, labels, self.feature))
            confidence.append(membership_feature(probabilities, labels).flatten())
        empty = torch.empty(0)
        found = [torch.cat(rows) if rows else empty for rows in (correct, features, confidence)]
        whole = [gather_rows(rows) for rows in found]
        return whole[0], whole[1], whole[2]

    # -- the run -------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the split before training starts."""
        super().setup(trainer, pl_module, stage)
        if self._takes_part(stage):
            find_split(trainer, type(self).__name__)
        if stage == "fit":
            self._before = self._after = self.record = None
            self._clock, self._passes = _StepClock(), 0.0

    def observe(self, trainer: Any, host: Any) -> None:
        """Measure the model that the run starts from."""
        if not self._is_retrain(trainer):
            self._before = self.measure(trainer, host)

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._before = state["before"]
        self._passes = state["passes"]
        self._clock = _StepClock(state["steps"], state["fit"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock of the fit."""
        self._clock.start_fit()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step."""
        self._clock.start_step(pl_module.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock of a step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._clock.stop_step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock of the fit."""
        self._clock.stop_fit()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock of the fit again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._clock.start_fit()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the model that the run ends with."""
        self._clock.stop_fit()
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure after a fit without epochs (``max_epochs=0``), in which one-shot methods act."""
        if self._after is None:
            self._finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the figures of the model under test."""
        metrics = self.measure(trainer, pl_module)["metrics"]
        pl_module.log_dict({f"trust/{name}": value for name, value in metrics.items()}, rank_zero_only=True)

    def state(self) -> dict[str, Any]:
        """What was measured before, and the clocks."""
        passes = self._passes + (self.attachment.pass_seconds if self.attachment is not None else 0.0)
        return {"before": self._before, "steps": self._clock.steps, "fit": self._clock.whole, "passes": passes}

    # -- the record ----------------------------------------------------------------------------------------------------
    def _is_retrain(self, trainer: Any) -> bool:
        # whoever trains on more than the retain set, or from weights that know the rest, is no yardstick
        others = (Unlearner, WeightSaliency, LoadWeights)
        feeds = find_split(trainer, type(self).__name__).current_feed
        return feeds == "retain" and not any(isinstance(callback, others) for callback in trainer.callbacks)

    def _finish(self, trainer: Any, host: Any) -> None:
        state = self.state()
        self._after = self.measure(trainer, host)
        split = find_split(trainer, type(self).__name__)
        methods = [type(member).__name__ for member in trainer.callbacks if getattr(member, "claims", ())]
        retrain = self._is_retrain(trainer)
        masks = [member.mask for member in trainer.callbacks if type(member).__name__ == "OneShotPruning"]
        self.record = RunRecord(
            label=self.label or " + ".join(["Retrain"] * retrain + methods) or "Training",
            role="retrain" if retrain else "method",
            scenario=str(split.forget),
            seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            forget={"hash": split.forget_hash, "spec": repr(split.forget), **self._after["counts"]},
            metrics=self._after["metrics"],
            before=self._before["metrics"] if self._before else None,
            seconds={name: round(state[name], 6) for name in ("steps", "passes", "fit")},
            confidence={
                "edges": [round(step / _BINS, 6) for step in range(_BINS + 1)],
                "before": self._before["confidence"] if self._before else None,
                "after": self._after["confidence"],
            },
            membership={
                "feature": self.feature,
                "rows": self._after["rows"],
                "note": (
                    f"RBF support vector machine on {self._after['rows']} retain and as many test rows, drawn with"
                    f" seed {self.attack_seed}"
                ),
            },
            sparsity=masks[0].sparsity if masks and masks[0] is not None else None,
            parameters=sum(parameter.numel() for parameter in host.parameters()),
            hardware=hardware(host.device),
            versions=versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"trust/{name}": value for name, value in self.record.metrics.items()}, step=trainer.global_step
            )
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.record.write(Path(self.folder or trainer.default_root_dir))
        if self.verbose:
            self._print()

    @rank_zero_only
    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        record = self.record
        if record is None:
            return
        table = Table(title=f"{record.label}: forget {record.scenario}", caption="in percent; compare with Retrain's")
        table.add_column("")
        for name in METRICS:
            table.add_column(name, justify="right")
        for row, metrics in (("before", record.before), ("after", record.metrics)):
            if metrics is not None:
                table.add_row(row, *(f"{metrics[name]:.2f}" for name in METRICS))
        Console().print(table)


class _StepClock:
    """Seconds of steps and of the fit; no synchronisation while it runs."""

    def __init__(self, steps: float = 0.0, fit: float = 0.0) -> None:
        self._steps = steps
        self.fit = fit
        self._fit_start: float | None = None
        self._step_start: Any = None
        self._events: list[tuple[Any, Any]] = []

    def start_fit(self) -> None:
        self._fit_start = time.perf_counter()

    def stop_fit(self) -> None:
        if self._fit_start is not None:
            self.fit += time.perf_counter() - self._fit_start
            self._fit_start = None

    @property
    def whole(self) -> float:
        """Seconds of the fit so far, the stretch that is under way included."""
        return self.fit + (0.0 if self._fit_start is None else time.perf_counter() - self._fit_start)

    def start_step(self, device: torch.device) -> None:
        if device.type == "cuda":
            # kernels run on after the call: events are read at the end, when nothing waits for them
            self._step_start = _recorded_event()
        else:
            self._step_start = time.perf_counter()

    def stop_step(self) -> None:
        start, self._step_start = self._step_start, None
        if isinstance(start, float):
            self._steps += time.perf_counter() - start
        elif start is not None:
            self._events.append((start, _recorded_event()))

    @property
    def steps(self) -> float:
        """Seconds of all steps so far."""
        if self._events:
            torch.cuda.synchronize()
            self._steps += sum(start.elapsed_time(end) for start, end in self._events) / 1000.0
            self._events.clear()
        return self._steps


def _recorded_event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
