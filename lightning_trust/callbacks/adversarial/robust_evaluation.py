"""Robust accuracy that can be trusted, in validation and test of an unchanged module."""

from __future__ import annotations

import datetime
import hashlib
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_trust.attacks import Attack
from lightning_trust.attacks.planted_weakness import find_planted_weakness
from lightning_trust.attacks.preparation import check_logits
from lightning_trust.callbacks.adversarial.adversarial_training import AdversarialTraining, input_space
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_first_rank, rank, world_size
from lightning_trust.core.files import read_json, write_json, write_tensors
from lightning_trust.core.host import find_network
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.randomness import SampleDraws, keyed_bits
from lightning_trust.core.records import hardware, versions
from lightning_trust.core.robustness_record import EXAMPLES_KIND, EXAMPLES_NAME, RobustnessRecord
from lightning_trust.core.space import InputSpace
from lightning_trust.core.step import HostCallback
from lightning_trust.functional.adversarial.confidence import wilson_interval
from lightning_trust.functional.adversarial.projections import norm_of
from lightning_trust.metrics.robust_accuracy import RobustAccuracy, check_names

Stage = Literal["validate", "test"]
_VERDICTS, _VERDICTS_VERSION = "lightning_trust.verdicts", 1
#: share of planted weaknesses that an attack must find
_MUST_FIND = 0.75


class RobustEvaluation(HostCallback):
    """Attack the network in validation and test, and log what is still classified correctly.

    Logs ``trust/clean_acc``, ``trust/robust_acc/<attack>`` and ``trust/robust_acc/union`` (correct under every attack),
    shares in [0, 1], once an epoch: ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them. A sample that is missed
    clean counts as not robust and is not attacked. It works with the Trainer's default flags (inference mode included)
    and leaves modes, BatchNorm statistics and random state alone. Every sample counts once on any number of ranks, and
    random starts belong to the sample: neither batch size nor ranks change a verdict.

    After ``trainer.test`` it prints a table with 95 % intervals (Wilson) and writes ``robustness.json``, which
    ``lightning-trust report`` compares.

    Args:
        attacks: The attacks by the name under which they are logged.
        stage: In which evaluations: ``"validate"`` (within a fit as well), ``"test"`` or ``"both"``. A fit may have a
            cheap attack in validation and a strong one, in a second callback with a ``name``, in its test.
        every_n_epochs: In which epochs of a fit the validation is attacked; in the others the last figures are logged
            again.
        max_samples: At most so many samples are attacked, drawn from all by ``seed``: the same ones whatever the batch
            size; all if None. Where a loader shuffles, or has no length, the first ones it gives.
        resume_dir: Folder in which the verdict on each sample is kept; an evaluation that was killed goes on there.
        repeats: Forward passes over which a network that is not deterministic is averaged. Whether it is, is looked at
            in the first batch.
        self_test: Whether each attack must first find weaknesses planted in copies of the network; see
            :class:`~lightning_trust.attacks.PlantedWeakness`.
        eps_curve: Further radii, at which the attacks that have one are run in ``trainer.test``; a sample broken at a
            smaller radius is broken at a larger one.
        examples: How many samples are kept with their adversarial inputs, for the report.
        folder: Where ``robustness.json`` is written; the Trainer's ``default_root_dir`` if None.
        label: Name of the run in tables; made of the run's callbacks if None.
        batch_spec: Where inputs, targets and the index of a sample sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of random starts and of the choice of samples; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range (at once), a radius cannot be meant in the units of the data
            (before the first batch), inputs lie outside the box, or the network puts out no logits (first batch).
        MisconfigurationException: If ``resume_dir`` holds verdicts on another network, other attacks or other data, or
            the order of the samples is not known.
        RuntimeError: If an attack does not find the weaknesses planted for the self-test.

    Example:
        >>> from lightning_trust.attacks import FGSM, PGD
        >>> RobustEvaluation({"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, steps=20)}).max_samples is None
        True

    """

    stages = ("validate", "test")

    def __init__(
        self,
        attacks: dict[str, Attack],
        stage: Literal["validate", "test", "both"] = "both",
        every_n_epochs: int = 1,
        max_samples: int | None = None,
        resume_dir: str | None = None,
        repeats: int = 8,
        self_test: bool = False,
        eps_curve: Sequence[float] = (),
        examples: int = 8,
        folder: str | None = None,
        label: str | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_names(list(attacks))
        for argument, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("max_samples", max_samples, 1),
            ("repeats", repeats, 1),
            ("examples", examples, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected argument `{argument}` to be at least {least}, but got {value}.")
        if any(not eps > 0.0 for eps in eps_curve) or len(set(eps_curve)) != len(eps_curve):
            raise ValueError(
                f"Expected argument `eps_curve` to be different positive radii, but got {list(eps_curve)}."
            )
        if stage not in ("validate", "test", "both"):
            raise ValueError(f"Expected argument `stage` to be 'validate', 'test' or 'both', but got {stage!r}.")
        self.attacks = dict(attacks)
        self.stage = stage
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.resume_dir = resume_dir
        self.repeats = repeats
        self.self_test = self_test
        self.eps_curve = eps_curve
        self.examples = examples
        self.folder = folder
        self.label = label
        self.batch_spec = batch_spec or BatchSpec()
        self.network = network
        self.record: RobustnessRecord | None = None
        self._last: dict[str, float] = {}
        self._space: dict[str, InputSpace] = {}
        self._epoch_seconds: list[float] = []
        self._epoch_start: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._metrics: dict[int, RobustAccuracy] = {}
        self._curves: dict[int, RobustAccuracy] = {}
        self._orders: dict[int, list[list[int]] | None] = {}
        self._chosen: dict[int, Tensor | None] = {}
        self._seen: dict[int, int] = {}
        self._known: dict[int, dict[int, tuple[list[bool], list[bool]]]] = {}
        self._random: bool | None = None
        self._seconds = dict.fromkeys(self.attacks, 0.0)
        self._examples: dict[str, Tensor] = {}
        self._identity = ""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_metrics": {}, "_curves": {}, "_orders": {}, "_chosen": {}, "_known": {}, "_examples": {}}

    # -- hooks of Lightning --------------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the budgets against the data."""
        super().setup(trainer, pl_module, stage)
        if not self._takes_part(stage):
            return
        self._space = {name: input_space(attack, trainer) for name, attack in self.attacks.items()}
        for name, attack in self.attacks.items():
            attack.check_budget(self._space[name])
            for eps in self.eps_curve:
                if attack.eps is not None and "eps" in attack.__dict__:
                    attack.replaced(eps=eps).check_budget(self._space[name])
        if stage == "fit":
            self._last, self._epoch_seconds, self._epoch_start = {}, [], None

    def state(self) -> dict[str, Any]:
        """The figures last logged."""
        return {"last": dict(self._last)}

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the figures last logged."""
        self._last = dict(state["last"])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock of an epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock after the last batch, before validation."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.is_last_batch and self._epoch_start is not None:
            self._epoch_seconds.append(time.perf_counter() - self._epoch_start)
            self._epoch_start = None

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew."""
        self._reset()

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew."""
        self._reset()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack a batch."""
        if self._due(trainer) and self.stage != "test":
            self._evaluate(trainer, pl_module, batch, batch_idx, dataloader_idx, "validate")

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack a batch."""
        if self.stage != "validate":
            self._evaluate(trainer, pl_module, batch, batch_idx, dataloader_idx, "test")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the accuracies."""
        if trainer.sanity_checking or self.stage == "test":
            return
        if self._due(trainer):
            self._last = self._figures()
        pl_module.log_dict(self._last)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the accuracies, print them with their intervals, and write the record."""
        if self.stage == "validate":
            return
        self._last = self._figures()
        pl_module.log_dict(self._last)
        if 0 not in self._metrics:
            return
        # collectives: on every rank
        self.record = self._made_record(trainer, pl_module)
        self._print()
        if trainer.is_global_zero and not trainer.fast_dev_run:
            folder = Path(self.folder or trainer.default_root_dir)
            if self._examples:
                write_tensors(folder / EXAMPLES_NAME, EXAMPLES_KIND, 1, self._examples)
            self.record.write(folder)

    def _due(self, trainer: Any) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != "fit" or trainer.current_epoch % self.every_n_epochs == 0

    # -- one batch -----------------------------------------------------------------------------------------------------
    def _evaluate(self, trainer: Any, host: Any, batch: Any, batch_idx: int, dataloader_idx: int, stage: Stage) -> None:
        inputs, targets = self.batch_spec.inputs_of(batch), self.batch_spec.targets_of(batch)
        network = find_network(host, self.network)
        if dataloader_idx not in self._metrics:
            self._open(trainer, network, dataloader_idx, stage, len(inputs))
        keys = self._keys(batch, batch_idx, dataloader_idx, len(inputs)).to(inputs.device)
        wanted = self._wanted(keys, dataloader_idx)
        known = self._known[dataloader_idx]
        fresh = wanted & torch.tensor([int(key) not in known for key in keys.tolist()], device=keys.device)
        old = [int(key) for key in keys[wanted & ~fresh].tolist()]
        if old:
            self._count(dataloader_idx, old, [known[key] for key in old])
        if not bool(fresh.any()):
            return
        with trainer.precision_plugin.forward_context():
            verdicts = self._verdicts(network, inputs[fresh], targets[fresh], keys[fresh], stage)
        new = keys[fresh].tolist()
        self._count(dataloader_idx, new, verdicts)
        if self.resume_dir is not None:
            self._keep(stage, dataloader_idx, new, verdicts)

    def _verdicts(
        self, network: nn.Module, x: Tensor, y: Tensor, keys: Tensor, stage: Stage
    ) -> list[tuple[list[bool], list[bool]]]:
        first = self._random is None
        if first:
            self._look(network, x, y)
        clean = self._correct(network, x, y)
        columns: dict[str, Tensor] = {}
        curve: dict[str, Tensor] = {}
        for name, attack in self.attacks.items():
            start = time.perf_counter()
            columns[name] = self._held(name, attack, network, x, y, keys, clean, first)
            self._seconds[name] += time.perf_counter() - start
            still = clean
            for eps in self._radii(attack, stage):
                at = f"{name}@{eps:g}"
                if attack.eps is not None and eps >= attack.eps:
                    still = still & columns[name]
                still = self._held(name, attack.replaced(eps=eps), network, x, y, keys, still, False)
                curve[at] = still
        held = torch.stack([clean, *columns.values()], dim=1).tolist()
        points = torch.stack(list(curve.values()), dim=1).tolist() if curve else [[] for _ in held]
        return list(zip(held, points, strict=True))

    def _held(
        self,
        name: str,
        attack: Attack,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        keys: Tensor,
        among: Tensor,
        first: bool,
    ) -> Tensor:
        """Which of the samples are still classified correctly; only those in question are attacked."""
        held = among.clone()
        if not bool(among.any()):
            return held
        space = self._space[name]
        rows = among.nonzero().squeeze(1)
        draws = SampleDraws(keys[rows], self.random.sample_seed("attack", name))
        result = attack(network, x[rows], y[rows], space=space, draws=draws, check=first)
        if not isinstance(result, Tensor):
            # attacks on text or prompts say themselves whether they won
            held[rows] = ~result.success
            return held
        broken = ~self._correct(network, result, y[rows])
        if attack.eps is not None:
            length = norm_of(space.to_raw(result.float()) - space.to_raw(x[rows].float()), attack.norm)
            broken &= length <= attack.eps * (1.0 + 1e-4) + 1e-6
        held[rows] = ~broken
        if first and self.examples:
            # of the samples that are classified correctly, the same for every attack
            self._examples[f"adversarial/{name}"] = space.to_raw(result[: self.examples].float()).cpu().clone()
            self._examples[f"predicted/{name}"] = self._outputs(network, result[: self.examples]).argmax(1).cpu()
            clean, true = x[rows[: self.examples]], y[rows[: self.examples]]
            self._examples |= {"clean": space.to_raw(clean.float()).cpu().clone(), "targets": true.cpu()}
        return held

    def _outputs(self, network: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad(), eval_mode(network):
            if not self._random:
                return network(x).float()
            return torch.stack([network(x).float().softmax(dim=1) for _ in range(self.repeats)]).mean(dim=0)

    def _correct(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._outputs(network, x).argmax(dim=1) == y

    def _radii(self, attack: Attack, stage: Stage) -> list[float]:
        return sorted(self.eps_curve) if stage == "test" and attack.eps is not None else []

    # -- the first batch -----------------------------------------------------------------------------------------------
    def _look(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        """See whether the network is what an evaluation takes it for."""
        self._random = False
        with torch.no_grad(), eval_mode(network):
            first, second = network(x), network(x)
        check_logits(first, y, "RobustEvaluation")
        self._random = bool(from_first_rank(not torch.equal(first, second)))
        if self._random:
            rank_zero_warn(
                f"{type(network).__name__} is not deterministic: two forward passes in eval mode differ. Verdicts are"
                f" taken from the mean probabilities of {self.repeats} passes (`repeats`). Attacks should average"
                " gradients as well: AutoAttack(version='rand'), APGD(eot_iter=20)."
            )
        if self.self_test:
            rows = slice(0, 16)
            for name, attack in self.attacks.items():
                if attack.eps is None:
                    continue
                outcome = find_planted_weakness(attack, network, x[rows], y[rows], self._space[name])
                if outcome.found < _MUST_FIND * outcome.testable:
                    raise RuntimeError(
                        f"Self-test: attack '{name}' ({type(attack).__name__}) found {outcome.found} of"
                        f" {outcome.testable} weaknesses that were planted in copies of {type(network).__name__}, so"
                        " the robust accuracy that it reports cannot be trusted. Does the network mask its gradients"
                        " (rounding, argmax, saturation), or is the attack too short?"
                    )

    def _open(self, trainer: Any, network: nn.Module, dataloader_idx: int, stage: Stage, rows: int) -> None:
        loaders = trainer.val_dataloaders if stage == "validate" else trainer.test_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        fixed = isinstance(sampler, SequentialSampler) or (
            isinstance(sampler, DistributedSampler) and not sampler.shuffle
        )
        self._orders[dataloader_idx] = [list(batch) for batch in loader.batch_sampler] if fixed else None
        self._seen[dataloader_idx] = 0
        self._chosen[dataloader_idx] = None
        known_order = fixed or self.batch_spec.index is not None
        if self.max_samples is not None and known_order and hasattr(loader.dataset, "__len__"):
            keys = torch.arange(len(loader.dataset))
            bits = keyed_bits(self.random.sample_seed("samples"), keys)
            self._chosen[dataloader_idx] = bits.argsort(stable=True)[: self.max_samples].sort().values
        self._metrics[dataloader_idx] = RobustAccuracy(list(self.attacks))
        columns = [f"{name}@{eps:g}" for name, attack in self.attacks.items() for eps in self._radii(attack, stage)]
        if columns:
            self._curves[dataloader_idx] = RobustAccuracy(columns)
        self._known[dataloader_idx] = {}
        if self.resume_dir is not None:
            if not known_order:
                raise MisconfigurationException(
                    "RobustEvaluation(resume_dir=...) must know which sample is which, but the data loader shuffles or"
                    " has a sampler of its own. Set shuffle=False, or say where the batch carries the index of a"
                    " sample: `batch_spec=BatchSpec(index=...)`."
                )
            self._identity = self._identify(network)
            self._read(stage, dataloader_idx)

    def _keys(self, batch: Any, batch_idx: int, dataloader_idx: int, rows: int) -> Tensor:
        index = self.batch_spec.index_of(batch)
        if index is not None:
            return index.long()
        order = self._orders[dataloader_idx]
        if order is not None:
            return torch.tensor(order[batch_idx][:rows])
        start = self._seen[dataloader_idx]
        self._seen[dataloader_idx] += rows
        return (start + torch.arange(rows)) * world_size() + rank()

    def _wanted(self, keys: Tensor, dataloader_idx: int) -> Tensor:
        chosen = self._chosen[dataloader_idx]
        if chosen is not None:
            return torch.isin(keys, chosen.to(keys.device))
        if self.max_samples is not None:
            return keys < self.max_samples
        return torch.ones_like(keys, dtype=torch.bool)

    # -- verdicts ------------------------------------------------------------------------------------------------------
    def _count(self, dataloader_idx: int, keys: list[int], verdicts: list[tuple[list[bool], list[bool]]]) -> None:
        held = torch.tensor([verdict[0] for verdict in verdicts])
        self._metrics[dataloader_idx].update(torch.tensor(keys), held[:, 0], held[:, 1:])
        if dataloader_idx in self._curves:
            points = torch.tensor([verdict[1] for verdict in verdicts])
            self._curves[dataloader_idx].update(torch.tensor(keys), held[:, 0], points)

    def _identify(self, network: nn.Module) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, value in network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
        return digest.hexdigest()

    def _run_card(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage,
            "weights": self._identity,
            "attacks": {name: repr(attack) for name, attack in self.attacks.items()},
            "curve": [float(eps) for eps in sorted(self.eps_curve)] if stage == "test" else [],
            "seed": self.random.seed,
        }

    def _keep(
        self, stage: Stage, dataloader_idx: int, keys: list[int], verdicts: list[tuple[list[bool], list[bool]]]
    ) -> None:
        path = Path(self.resume_dir or "") / f"{stage}{dataloader_idx}-{rank()}-{keys[0]}.json"
        rows = [[key, *verdict] for key, verdict in zip(keys, verdicts, strict=True)]
        write_json(path, _VERDICTS, _VERDICTS_VERSION, {**self._run_card(stage), "rows": rows})

    def _read(self, stage: Stage, dataloader_idx: int) -> None:
        card = self._run_card(stage)
        for path in sorted(Path(self.resume_dir or "").glob(f"{stage}{dataloader_idx}-*.json")):
            found = read_json(path, _VERDICTS, _VERDICTS_VERSION)
            other = [key for key, value in card.items() if found.get(key) != value]
            if other:
                raise MisconfigurationException(
                    f"Expected `resume_dir` to hold verdicts of this evaluation, but {path} differs in"
                    f" {', '.join(other)}. Take another folder, or remove it."
                )
            for key, held, points in found["rows"]:
                self._known[dataloader_idx][int(key)] = (held, points)

    # -- figures -------------------------------------------------------------------------------------------------------
    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for dataloader_idx, metric in sorted(self._metrics.items()):
            suffix = f"/dataloader_idx_{dataloader_idx}" if len(self._metrics) > 1 else ""
            for name, value in metric.compute().items():
                key = "trust/clean_acc" if name == "clean" else f"trust/robust_acc/{name}"
                figures[key + suffix] = float(value)
        return figures

    def _made_record(self, trainer: Any, host: Any) -> RobustnessRecord:
        metric = self._metrics[0]
        accuracy = {name: float(value) for name, value in metric.compute().items()}
        samples = metric.samples
        intervals = {
            name: dict(zip(("low", "high"), wilson_interval(round(value * samples), samples), strict=True))
            for name, value in accuracy.items()
        }
        curves: dict[str, list[list[float]]] = {}
        if 0 in self._curves:
            for column, value in self._curves[0].compute().items():
                name, at, eps = column.rpartition("@")
                if at:
                    curves.setdefault(name, [[0.0, accuracy["clean"]]]).append([float(eps), float(value)])
        return RobustnessRecord(
            label=self.label or _label(trainer.callbacks),
            seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            samples=samples,
            accuracy={name: {"value": value, **intervals[name]} for name, value in accuracy.items()},
            attacks={
                name: {
                    "attack": repr(attack),
                    "eps": attack.eps,
                    "norm": attack.norm,
                    "seconds": round(self._seconds[name], 3),
                }
                for name, attack in self.attacks.items()
            },
            curves=curves,
            examples=EXAMPLES_NAME if self._examples else None,
            random=bool(self._random),
            weights=self._identity or self._identify(find_network(host, self.network)),
            epochs=len(self._epoch_seconds) or None,
            train_seconds=round(statistics.median(self._epoch_seconds), 3) if self._epoch_seconds else None,
            hardware=hardware(host.device),
            versions=versions(),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    @rank_zero_only
    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        record = self.record
        if record is None:
            return
        random = ", network not deterministic" if record.random else ""
        table = Table(
            title=f"{record.label}: accuracy in percent on {record.samples} samples{random}",
            caption="union: correct under every attack; 95 % intervals (Wilson)",
        )
        for head in ("", "accuracy", "95 % interval", "seconds"):
            table.add_column(head, justify="left" if not head else "right")
        for name, values in record.accuracy.items():
            seconds = f"{record.attacks[name]['seconds']:.1f}" if name in record.attacks else ""
            interval = f"{100 * values['low']:.1f} to {100 * values['high']:.1f}"
            table.add_row(name, f"{100 * values['value']:.2f}", interval, seconds)
        Console().print(table)


def _label(callbacks: Sequence[Any]) -> str:
    """What a run is called after its callbacks."""
    names = []
    for callback in callbacks:
        if isinstance(callback, AdversarialTraining):
            objective = type(callback.objective).__name__
            names.append(f"{objective} ({type(callback.attack).__name__})" if objective == "StandardAT" else objective)
        elif getattr(callback, "claims", ()):
            names.append(type(callback).__name__)
    return " + ".join(names) or "natural"
