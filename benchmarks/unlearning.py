"""The small experiment of the unlearning and pruning methods: every method against Retrain, three seeds, two scenarios.

    python -m benchmarks.unlearning

Runs the committed configurations through the command line, in this process, with the seed, the forget set and the
folder replaced. For each seed: the existing run; and for a random 10 % and for class 0 of it, two Retrains (their gap
is the yardstick) and every method from the trained model. Seconds of optimizer steps are compared within a seed and
scenario, on the same machine. Writes one result file a method under benchmarks/results/.

How the learning rates in the configurations were found stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import write_results
from lightning_trust.cli import main as command_line
from lightning_trust.core.records import RunRecord

SCENARIOS = {
    "random": {"class_path": "ForgetRandom", "init_args": {"fraction": 0.1}},
    "class": {"class_path": "ForgetClass", "init_args": {"label": 0}},
}
#: run -> (configuration, changes to the init_args of callbacks)
METHODS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "fine_tune": ("configs/unlearning/fine_tune.yaml", {}),
    "random_label": ("configs/unlearning/random_label.yaml", {}),
    "l1_sparse": ("configs/unlearning/l1_sparse.yaml", {}),
    "salun": ("configs/unlearning/salun.yaml", {}),
    "salun_sequential": ("configs/unlearning/salun.yaml", {"SalUn": {"mode": "sequential"}}),
    "salun_random_mask": ("configs/unlearning/salun.yaml", {"SalUn": {"random": True}}),
    "pruned_fine_tune": ("configs/unlearning/fine_tune.yaml", {}),
    "pruned_salun": ("configs/unlearning/pruned_salun.yaml", {}),
}
LABELS = {
    "retrain": "Retrain",
    "retrain_again": "Retrain (another seed)",
    "fine_tune": "FineTune",
    "random_label": "RandomLabel",
    "l1_sparse": "L1Sparse",
    "salun": "SalUn",
    "salun_sequential": "SalUn, sequential",
    "salun_random_mask": "SalUn, random mask",
    "pruned_fine_tune": "OneShotPruning + FineTune",
    "pruned_salun": "OneShotPruning + SalUn",
}


def configured(path: str, folder: Path, seed: int, order: int | None = None) -> dict[str, Any]:
    """A committed configuration with another seed and folder."""
    config = yaml.safe_load(Path(path).read_text())
    config["seed_everything"] = seed
    config["data"]["init_args"]["seed"] = 0 if order is None else order
    config["trainer"].update(default_root_dir=str(folder), enable_progress_bar=False)
    return config


def fit(config: dict[str, Any], folder: Path) -> None:
    """Run one configuration unless its record or checkpoint is there already."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config))
    start = time.perf_counter()
    command_line(["fit", f"--config={path}"])
    (folder / "done").touch()
    print(f"  {folder}: {time.perf_counter() - start:.1f} s", flush=True)


def run_seed(root: Path, seed: int, scenarios: list[str], methods: list[str]) -> dict[str, dict[str, RunRecord]]:
    """All runs of one seed."""
    trained = root / str(seed) / "train"
    fit(configured("configs/fashion_mnist.yaml", trained, seed, seed), trained)
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    found: dict[str, dict[str, RunRecord]] = {}
    for scenario in scenarios:
        forget = copy.deepcopy(SCENARIOS[scenario])
        if scenario == "random":
            forget["init_args"]["seed"] = seed
        found[scenario] = {}
        for run in ("retrain", "retrain_again", *methods):
            folder = root / str(seed) / scenario / run
            path, changes = METHODS.get(run, ("configs/unlearning/retrain.yaml", {}))
            # a Retrain shares no random number with the trained model or with the other one
            offset = {"retrain": 100, "retrain_again": 200}.get(run, 0)
            config = configured(path, folder, seed + offset, seed)
            config["data_wrapper"]["init_args"].update(forget=forget, seed=seed + offset)
            if run == "pruned_fine_tune":
                pruned = yaml.safe_load(Path("configs/unlearning/pruned_salun.yaml").read_text())
                config["trainer"]["callbacks"].insert(1, pruned["trainer"]["callbacks"][1])
            for callback in config["trainer"]["callbacks"]:
                name, arguments = callback["class_path"], callback.setdefault("init_args", {})
                if name == "LoadWeights":
                    arguments["checkpoint"] = checkpoint
                if name == "UnlearningReport":
                    arguments["verbose"] = False
                arguments.update(changes.get(name, {}))
            fit(config, folder)
            found[scenario][run] = RunRecord.read(folder)
    return found


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--folder", default="runs/benchmark")
    parser.add_argument("--output", default="benchmarks/results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    records = {
        seed: run_seed(Path(arguments.folder), seed, arguments.scenarios, arguments.methods) for seed in arguments.seeds
    }
    write_results(Path(arguments.output), records, LABELS)


if __name__ == "__main__":
    main()
