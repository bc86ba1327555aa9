"""The robustness table: nine ways of training one small network, under PGD-50 and AutoAttack.

    python -m benchmarks.robustness

Runs the committed configurations through the command line, in this process: fit, then test. A finished run is not
repeated. Seconds an epoch are measured afterwards, in interleaved rounds of a few batches, so that all are timed alike.
Writes one result file a method under benchmarks/results/adversarial/.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import shutil
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from benchmarks.robustness_results import RobustnessResult, RobustnessRow
from benchmarks.stored import now
from lightning_trust.catalog import METHODS
from lightning_trust.cli import main as command_line
from lightning_trust.core.robustness_record import RobustnessRecord

#: configuration -> its name in tables
RUNS = {
    "robust_evaluation": "natural",
    "fgsm": "FGSM",
    "fast": "Fast",
    "free_adversarial_training": "Free (4 replays)",
    "fast_bat": "Fast-BAT",
    "adversarial_training": "PGD-10",
    "mart": "MART",
    "trades": "TRADES",
    "awp": "TRADES + AWP",
}
#: method of the catalog -> runs that its result shows
SHOWN = {
    "adversarial-training": list(RUNS),
    "free-adversarial-training": ["robust_evaluation", "fast", "free_adversarial_training", "adversarial_training"],
    "awp": ["robust_evaluation", "adversarial_training", "trades", "awp"],
    "robust-evaluation": ["robust_evaluation", "fast", "adversarial_training", "trades"],
}
EXPERIMENT = (
    "Fashion-MNIST, 12,000 training rows, a small CNN with 33,338 parameters, linf eps 0.1; robust accuracy on 500 test"
    " rows"
)


def config_of(run: str, seed: int, folder: Path) -> dict[str, Any]:
    """A committed configuration with another seed and folder."""
    config: dict[str, Any] = yaml.safe_load(Path(f"configs/adversarial/{run}.yaml").read_text())
    config["seed_everything"] = seed
    config["trainer"].update(default_root_dir=str(folder), enable_progress_bar=False)
    return config


def trained_and_tested(run: str, seed: int, root: Path) -> RobustnessRecord:
    """Fit and test one configuration, unless its record is there already."""
    folder = root / str(seed) / run
    if not (folder / "tested").exists():
        path = folder / "benchmark.yaml"
        start = time.perf_counter()
        if not (folder / "fitted").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            path.write_text(yaml.safe_dump(config_of(run, seed, folder)))
            command_line(["fit", f"--config={path}"])
            (folder / "fitted").touch()
        path.write_text(yaml.safe_dump(config_of(run, seed, folder)))
        command_line(["test", f"--config={path}", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"])
        (folder / "tested").touch()
        print(f"  {folder}: {time.perf_counter() - start:.1f} s", flush=True)
    return RobustnessRecord.read(folder)


class BatchClock(pl.Callback):
    """Seconds of training batches, the first ones left out."""

    def __init__(self, skip: int = 3) -> None:
        self.skip = skip
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx >= self.skip:
            self.seconds.append(time.perf_counter() - self._start)


def epoch_seconds(runs: list[str], root: Path, rounds: int = 3, batches: int = 12) -> dict[str, float]:
    """Seconds of an epoch over the training rows: median batch of interleaved rounds, times batches of an epoch.

    An epoch of Free counts all replays of every batch.
    """
    clocks = {run: BatchClock() for run in runs}
    counts: dict[str, int] = {}
    for round_ in range(rounds):
        for run in runs[round_ % len(runs) :] + runs[: round_ % len(runs)]:
            config = config_of(run, 1, root / "timing" / run)
            config["trainer"].update(
                max_epochs=1, limit_train_batches=batches, limit_val_batches=0, enable_checkpointing=False
            )
            config["trainer"]["callbacks"] = [
                each
                for each in config["trainer"]["callbacks"]
                if each["class_path"] not in ("ModelCheckpoint", "RobustEvaluation")
            ]
            path = root / "timing" / f"{run}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(config))
            # of the module by its name, as the command line finds it: as a script this one is another
            importlib.import_module("benchmarks.robustness")._Attached.clock = clocks[run]
            config["trainer"]["callbacks"].append({"class_path": "benchmarks.robustness._Attached"})
            path.write_text(yaml.safe_dump(config))
            command_line(["fit", f"--config={path}"])
            rows, size = config["data"]["init_args"]["train_rows"], config["data"]["init_args"]["batch_size"]
            replays = config.get("data_wrapper", {}).get("init_args", {}).get("replays", 1)
            counts[run] = -(-rows // size) * replays
    return {run: statistics.median(clock.seconds) * counts[run] for run, clock in clocks.items()}


class _Attached(pl.Callback):
    """Hands the hooks of a run that the command line made to the clock of the script."""

    clock: BatchClock

    def on_train_batch_start(self, *args):
        self.clock.on_train_batch_start(*args)

    def on_train_batch_end(self, *args):
        self.clock.on_train_batch_end(*args)


def write(records: dict[int, dict[str, RobustnessRecord]], seconds: dict[str, float], output: Path) -> list[Path]:
    """One result a method of the catalog whose runs are all there."""
    one = next(iter(next(iter(records.values())).values()))
    written = []
    for entry in METHODS:
        shown = SHOWN.get(entry.name, [])
        if not shown or not all(run in runs for runs in records.values() for run in shown):
            continue
        rows = [
            RobustnessRow.of(runs[run], RUNS[run], seed, seconds.get(run))
            for seed, runs in records.items()
            for run in shown
        ]
        result = RobustnessResult(
            entry.name, EXPERIMENT, entry.config, one.hardware, one.versions, now(), list(records), rows
        )
        written.append(result.write(output / Path(entry.results).relative_to("benchmarks/results")))
    return written


def main() -> None:
    """Run, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--folder", default="runs/robustness")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--untimed", action="store_true", help="leave the seconds an epoch out")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    root = Path(arguments.folder)
    records = {seed: {run: trained_and_tested(run, seed, root) for run in arguments.runs} for seed in arguments.seeds}
    seconds = {} if arguments.untimed else epoch_seconds(arguments.runs, root)
    write(records, seconds, Path(arguments.output))


if __name__ == "__main__":
    main()
