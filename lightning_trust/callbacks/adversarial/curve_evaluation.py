"""Robustness along a curve of networks, and the choice of its best point."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.attacks import Attack
from lightning_trust.attacks.preparation import check_logits
from lightning_trust.callbacks.adversarial.adversarial_training import input_space
from lightning_trust.callbacks.adversarial.curve_points import check_statistics, point_of, statistics_of
from lightning_trust.callbacks.adversarial.robust_mode_connectivity import curve_of
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_all_ranks, rank, world_size
from lightning_trust.core.files import write_json, write_tensors
from lightning_trust.core.host import plain_name
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.passes import reestimate_batchnorm
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.core.step import HostCallback
from lightning_trust.core.training_batches import training_batches
from lightning_trust.functional.adversarial.curve import best_positions, loss_barrier
from lightning_trust.metrics.robust_accuracy import check_names
from lightning_trust.nn.adversarial.curve import CurveNetwork

_KIND, _VERSION = "lightning_trust.curve", 1
_WEIGHTS_KIND = "lightning_trust.network"


class CurveEvaluation(HostCallback):
    r"""Attack points all along a curve of networks in validation and test, and choose the best one in validation.

    For each of ``num_points`` positions :math:`t` it re-estimates BatchNorm's statistics on the training data, attacks,
    and logs ``trust/curve/<t>/clean_acc``, ``.../robust_acc/<attack>``, ``.../robust_acc/union`` (correct under every
    attack), ``.../robust_acc/mean`` (of the attacks), ``.../loss`` (clean cross-entropy) and ``.../robust_loss`` (of
    the worst of the inputs), beside how far the losses rise above the worse end, ``trust/curve/barrier`` and
    ``trust/curve/robust_barrier``. Validation also logs ``trust/curve/best_t`` and ``trust/curve/best/...``, which
    ``ModelCheckpoint`` can monitor. The test never chooses: it logs ``trust/curve/selected/...`` for the position that
    the last validation chose, at which the curve stands, with its statistics, until the test ends: what else measures
    the host, such as a :class:`~lightning_trust.callbacks.RobustEvaluation` after it in the list, measures the chosen
    network. The curve, its statistics and the random state are what they were afterwards.

    Each evaluation writes its table to ``curve_validate.json`` or ``curve_test.json``.

    Paper: Bridging Models to Defend: A Population-Based Strategy for Robust Adversarial Defense (arXiv 2303.10225).

    Args:
        attacks: The attacks by the name under which they are logged.
        num_points: Number of positions, evenly spaced, both ends included; the paper's figures have 61.
        select_by: What the best position is best in: ``"union"`` or ``"mean"``; the other breaks ties.
        every_n_epochs: In which epochs of a fit the validation evaluates the curve, beside the last one; in the others
            the last figures are logged again.
        bn_batches: At most so many batches of the training data to re-estimate BatchNorm's statistics; all if None.
        export: File in ``folder`` for the weights of the best point of the last validation, a safetensors file with the
            names that the host has with the plain network: :class:`~lightning_trust.callbacks.LoadWeights`, the ends of
            another :class:`~lightning_trust.nn.CurveNetwork` and :class:`~lightning_trust.nn.WeightEnsemble` take it.
        top_k: How many of the best points are exported: the second beside ``best.safetensors`` as
            ``best_2.safetensors``, and so on.
        folder: Where tables and weights are written; the Trainer's ``default_root_dir`` if None.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the attacks' random starts; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range, the network has running statistics that cannot be re-estimated,
            or the training data have no batch.
        MisconfigurationException: If the network is no curve, there are several evaluation data loaders, or
            BatchNorm's statistics are to be re-estimated but there are no training data.

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> CurveEvaluation({"pgd": PGD(eps=0.1, steps=20)}, num_points=5).positions
        [0.0, 0.25, 0.5, 0.75, 1.0]

    """

    stages = ("validate", "test")

    def __init__(
        self,
        attacks: dict[str, Attack],
        num_points: int = 21,
        select_by: Literal["union", "mean"] = "union",
        every_n_epochs: int = 1,
        bn_batches: int | None = None,
        export: str | None = None,
        top_k: int = 1,
        folder: str | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_names([*attacks, "mean"] if attacks else [])
        for argument, value, least in (
            ("num_points", num_points, 2),
            ("every_n_epochs", every_n_epochs, 1),
            ("bn_batches", bn_batches, 1),
            ("top_k", top_k, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected argument `{argument}` to be at least {least}, but got {value}.")
        if top_k > num_points:
            raise ValueError(
                f"Expected argument `top_k` to be at most `num_points`, which is {num_points}, but got {top_k}."
            )
        if select_by not in ("union", "mean"):
            raise ValueError(f"Expected argument `select_by` to be 'union' or 'mean', but got {select_by!r}.")
        self.attacks = dict(attacks)
        self.num_points = num_points
        self.select_by = select_by
        self.every_n_epochs = every_n_epochs
        self.bn_batches = bn_batches
        self.export = export
        self.top_k = top_k
        self.folder = folder
        self.batch_spec = batch_spec or BatchSpec()
        self.network = network
        #: the position chosen in the last validation
        self.best_t: float | None = None
        self._last: dict[str, float] = {}
        self._space: dict[str, InputSpace] = {}
        self._chosen: AbstractContextManager[None] | None = None
        self._close()

    def _close(self) -> None:
        self._positions: list[float] = []
        self._statistics: list[list[Tensor]] = []
        self._sums: Tensor | None = None
        self._rows = self._seen = self._samples = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_positions": [], "_statistics": [], "_sums": None, "_chosen": None}

    @property
    def positions(self) -> list[float]:
        """The positions that are evaluated."""
        return [place / (self.num_points - 1) for place in range(self.num_points)]

    # -- hooks of Lightning --------------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the budgets against the data."""
        super().setup(trainer, pl_module, stage)
        if not self._takes_part(stage):
            return
        self._space = {name: input_space(attack, trainer) for name, attack in self.attacks.items()}
        for name, attack in self.attacks.items():
            attack.check_budget(self._space[name])
        if stage == "fit":
            self._last, self.best_t = {}, None

    def state(self) -> dict[str, Any]:
        """The figures last logged, and the chosen position."""
        return {"last": dict(self._last), "best_t": self.best_t}

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the figures last logged."""
        self._last, self.best_t = dict(state["last"]), state["best_t"]

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Re-estimate the statistics of each point."""
        if self._due(trainer):
            self._open(trainer, pl_module, self.positions)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Re-estimate the statistics of each point, that chosen in validation included."""
        if self.best_t is None and self._saved is not None:
            # a test of a checkpoint
            self.best_t = self._saved["best_t"]
        chosen = set() if self.best_t is None else {self.best_t}
        self._open(trainer, pl_module, sorted({*self.positions, *chosen}))
        if self.best_t is not None:
            curve = curve_of(pl_module, self.network, type(self).__name__)
            statistics = self._statistics[self._positions.index(self.best_t)]
            self._chosen = point_of(curve, self.best_t, statistics)
            self._chosen.__enter__()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack a batch at each point."""
        if self._due(trainer):
            self._evaluate(trainer, pl_module, batch, dataloader_idx, trainer.val_dataloaders)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack a batch at each point."""
        self._evaluate(trainer, pl_module, batch, dataloader_idx, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Choose the best point, log, and write the table."""
        if trainer.sanity_checking:
            return
        points = self._points() if self._due(trainer) else []
        if points:
            ranked = best_positions(
                [point["robust_acc/union"] for point in points],
                [point["robust_acc/mean"] for point in points],
                self.select_by,
                self.top_k,
            )
            best = ranked[0]
            self.best_t = self._positions[best]
            self._last = {
                **self._figures(points),
                "trust/curve/best_t": self.best_t,
                **{f"trust/curve/best/{key}": value for key, value in points[best].items()},
            }
            self._write(trainer, "validate", points)
            if self.export is not None and trainer.is_global_zero and not trainer.fast_dev_run:
                self._export(pl_module, ranked, self._folder(trainer) / self.export)
            self._close()
        pl_module.log_dict(self._last)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log, and write the table."""
        points = self._points()
        if not points:
            return
        figures = self._figures(points)
        if self.best_t is not None:
            chosen = points[self._positions.index(self.best_t)]
            figures |= {f"trust/curve/selected/{key}": value for key, value in chosen.items()}
        pl_module.log_dict(figures)
        self._write(trainer, "test", points)
        self._close()

    def _export(self, host: Any, ranked: list[int], file: Path) -> None:
        curve = curve_of(host, self.network, type(self).__name__)
        for place, point in enumerate(ranked, start=1):
            path = file if place == 1 else file.with_name(f"{file.stem}_{place}{file.suffix}")
            with point_of(curve, self._positions[point], self._statistics[point]):
                write_tensors(path, _WEIGHTS_KIND, 1, _plain_state(host, curve))

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Move the curve back."""
        self._move_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Move the curve back, and leave the host as it was."""
        self._move_back()
        super().on_exception(trainer, pl_module, exception)

    def _move_back(self) -> None:
        chosen, self._chosen = self._chosen, None
        if chosen is not None:
            chosen.__exit__(None, None, None)

    def _due(self, trainer: Any) -> bool:
        if trainer.sanity_checking:
            return False
        # what is exported and chosen is of the trained curve
        last = trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.state.fn != "fit" or last or trainer.current_epoch % self.every_n_epochs == 0

    # -- one point, one batch ------------------------------------------------------------------------------------------
    def _open(self, trainer: Any, host: Any, positions: list[float]) -> None:
        self._close()
        curve = curve_of(host, self.network, type(self).__name__)
        check_statistics(curve)
        self._positions = positions
        self._sums = torch.zeros(len(positions), len(self.attacks) + 4, dtype=torch.float64)
        if not statistics_of(curve):
            self._statistics = [[] for _ in positions]
            return
        loader = training_batches(
            trainer, host, type(self).__name__, "re-estimates BatchNorm's statistics", self.bn_batches
        )
        for t in positions:
            with point_of(curve, t, statistics_of(curve)):
                reestimate_batchnorm(trainer, host, curve, loader, self.batch_spec)
                self._statistics.append([buffer.clone() for buffer in statistics_of(curve)])

    def _evaluate(self, trainer: Any, host: Any, batch: Any, dataloader_idx: int, loaders: Any) -> None:
        if dataloader_idx:
            raise MisconfigurationException(
                f"CurveEvaluation evaluates one data loader, but got one with the index {dataloader_idx}. Give the"
                " others in a run of their own."
            )
        inputs, targets = self.batch_spec.inputs_of(batch), self.batch_spec.targets_of(batch)
        keys = (self._seen + torch.arange(len(inputs))) * world_size() + rank()
        first, self._seen = self._seen == 0, self._seen + len(inputs)
        if world_size() > 1:
            # rows that a distributed sampler repeats, to deal all ranks the same number, count once
            loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
            own = keys < len(loader.dataset)
            inputs, targets, keys = inputs[own.to(inputs.device)], targets[own.to(targets.device)], keys[own]
        if not len(inputs):
            return
        self._rows += len(inputs)
        curve = curve_of(host, self.network, type(self).__name__)
        for place, (t, statistics) in enumerate(zip(self._positions, self._statistics, strict=True)):
            with trainer.precision_plugin.forward_context(), point_of(curve, t, statistics):
                columns = self._columns(curve, inputs, targets, keys.to(inputs.device), first and place == 0)
            if self._sums is not None:
                self._sums[place] += columns.sum(dim=1).double().cpu()

    def _columns(self, curve: CurveNetwork, x: Tensor, y: Tensor, keys: Tensor, first: bool) -> Tensor:
        """Clean, each attack's and union verdicts, clean and worst losses: shape ``(A + 4, N)``."""
        outputs = _outputs(curve, x)
        if first:
            check_logits(outputs, y, type(self).__name__)
        held = [outputs.argmax(dim=1) == y]
        losses = [F.cross_entropy(outputs, y, reduction="none")]
        for name, attack in self.attacks.items():
            draws = SampleDraws(keys, self.random.sample_seed("attack", name))
            moved = _outputs(curve, attack(curve, x, y, space=self._space[name], draws=draws, check=first))
            # a sample that is missed clean is not robust, whatever the attack makes of it
            held.append((moved.argmax(dim=1) == y) & held[0])
            losses.append(F.cross_entropy(moved, y, reduction="none"))
        union = torch.stack(held).all(dim=0)
        worst = torch.stack(losses).amax(dim=0)
        return torch.stack([*(verdict.float() for verdict in (*held, union)), losses[0], worst])

    # -- figures -------------------------------------------------------------------------------------------------------
    def _points(self) -> list[dict[str, float]]:
        """What was measured at each position, over all ranks; nothing where there was no sample."""
        if self._sums is None:
            return []
        parts = from_all_ranks((self._sums, self._rows))
        self._samples = sum(part[1] for part in parts)
        if not self._samples:
            return []
        names = ["clean_acc", *(f"robust_acc/{name}" for name in self.attacks), "robust_acc/union"]
        points = []
        for shares in (torch.stack([part[0] for part in parts]).sum(dim=0) / self._samples).tolist():
            point = dict(zip([*names, "loss", "robust_loss"], shares, strict=True))
            robust = [point[f"robust_acc/{name}"] for name in self.attacks]
            points.append({**point, "robust_acc/mean": sum(robust) / len(robust)})
        return points

    def _barriers(self, points: list[dict[str, float]]) -> dict[str, float]:
        return {
            "barrier": loss_barrier([point["loss"] for point in points]),
            "robust_barrier": loss_barrier([point["robust_loss"] for point in points]),
        }

    def _figures(self, points: list[dict[str, float]]) -> dict[str, float]:
        figures = {f"trust/curve/{key}": value for key, value in self._barriers(points).items()}
        for t, point in zip(self._positions, points, strict=True):
            figures |= {f"trust/curve/{t:.4g}/{key}": value for key, value in point.items()}
        return figures

    def _folder(self, trainer: Any) -> Path:
        return Path(self.folder or trainer.default_root_dir)

    def _write(self, trainer: Any, stage: str, points: list[dict[str, float]]) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        path = self._folder(trainer) / f"curve_{stage}.json"
        table = {
            "stage": stage,
            "samples": self._samples,
            "attacks": {name: repr(attack) for name, attack in self.attacks.items()},
            "selected_by": self.select_by,
            "selected_t": self.best_t,
            **self._barriers(points),
            "points": [{"t": t, **point} for t, point in zip(self._positions, points, strict=True)],
        }
        write_json(path, _KIND, _VERSION, table)


@torch.no_grad()
def _outputs(curve: CurveNetwork, x: Tensor) -> Tensor:
    with eval_mode(curve):
        return curve(x).float()


def _plain_state(host: Any, curve: CurveNetwork) -> Mapping[str, Tensor]:
    """The state dict that the host has with the network at the curve's position in the curve's place."""
    prefix = plain_name(next(name for name, module in host.named_modules() if module is curve))
    state = {plain_name(name): value for name, value in host.state_dict().items()}
    others = {name: value for name, value in state.items() if not name.startswith(f"{prefix}.")}
    point = {f"{prefix}.{name}": value for name, value in curve.export().state_dict().items()}
    return {name: value.detach().clone() for name, value in {**others, **point}.items()}
