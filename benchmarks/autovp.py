"""The small experiment of AutoVP: which way of prompting a network that knows garments reads digits best.

    python -m benchmarks.autovp [--smoke] [--seeds 1 2 3]

Two frozen CNNs, narrow and wide, that tell ten garments in four rotations apart, 40 classes; five mappings, three
scales, learned or not: 60 configurations are tried for two epochs, and the best by validation accuracy is trained for
15. Beside it stand visual prompting as it is by default, a linear probe and full fine-tuning of the wide network. Six
of the trials are trained for 15 epochs as well: do short trials tell the order of long runs? All but the run without a
frame are trained on a part of the training rows too, with as many steps.
Writes benchmarks/results/prompting/autovp.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from scipy.stats import spearmanr

from benchmarks.ilm_vp import prompted
from benchmarks.prompting_tasks import CANVAS, IMAGE, QUIET, SMOKE, Budget, digits, rival, source_network, tested
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.nn import Backbone, BackboneSpec
from lightning_trust.recipes import AutoVPTuner, VPConfig, VPSearchSpace

WIDTHS = {"narrow": (8, 16, 16, 32), "wide": (16, 32, 32, 64)}
WINNER, NO_FRAME, DEFAULT = "AutoVP's winner", "its mapping and scale, no frame trained", "default (ILM, wide)"
RIVALS = {"linear probe (wide)": True, "full fine-tuning (wide)": False}
#: of the frame, as in the experiment of iterative label mapping; of scale and full mapping
LR, MAPPING_LR = 0.1, 0.01
TRIAL_EPOCHS = 2
#: how many of the trials are trained to the end
COMPARED = 6
#: column -> share of the training rows
SHARES = {"some": 0.3, "few": 0.1}
TRAIN_ROWS = 1237


def backbones(seed: int, folder: Path, budget: Budget) -> dict[str, Backbone]:
    """The two networks, trained on garments."""
    found = {}
    for name, widths in WIDTHS.items():
        spec = BackboneSpec("SmallCNN", "classifier", 40, 1, (CANVAS, CANVAS))
        found[name] = Backbone(source_network(seed, folder, budget, widths), spec)
    return found


def space(networks: dict[str, Backbone], smoke: bool) -> VPSearchSpace:
    """What is searched over."""
    return VPSearchSpace(
        networks,
        ("fully", "frequency", "iterative"),
        num_map=(1, 4),
        scale=(0.75,) if smoke else (0.5, 0.75, 1.0),
        learn_scale=(True,) if smoke else (True, False),
        lr=(LR,),
        mapping_lr=MAPPING_LR,
        image_size=IMAGE,
    )


def trained(config: VPConfig, seed: int, budget: Budget) -> dict[str, float]:
    """Train a configuration to the end: accuracies, bytes and seconds."""
    pl.seed_everything(seed, verbose=False)
    host = config.build()
    trainer = pl.Trainer(**QUIET, max_epochs=budget.epochs, callbacks=config.callbacks())
    found = tested(trainer, host, digits(budget))
    found["val"] = trainer.validate(host, digits(budget), verbose=False)[0]["val/acc"]
    return found


def with_fewer(measure: Callable[[Budget], Mapping[str, float]], budget: Budget) -> dict[str, float]:
    """Test accuracies with a part of the training rows, in as many steps."""
    found = {}
    for name, share in SHARES.items():
        rows = round(share * (budget.train_rows or TRAIN_ROWS))
        part = replace(budget, train_rows=rows, epochs=round(budget.epochs / share))
        found[name] = measure(part)["accuracy"]
    return found


def fewer_rows(best: VPConfig, wide: torch.nn.Module, seed: int, folder: Path, budget: Budget) -> dict[str, Any]:
    """Name of a run -> its accuracies with a part of the training rows."""

    def beside(frozen: bool) -> Callable[[Budget], Mapping[str, float]]:
        return lambda part: rival(source_network(seed, folder, budget, WIDTHS["wide"]), frozen, seed, part)

    runs: dict[str, Callable[[Budget], Mapping[str, float]]] = {
        WINNER: lambda part: trained(best, seed, part),
        DEFAULT: lambda part: prompted(wide, "iterative", True, seed, part),
        **{name: beside(frozen) for name, frozen in RIVALS.items()},
    }
    return {name: with_fewer(measure, budget) for name, measure in runs.items()}


def rows_of(seeds: Sequence[int], folder: Path, budget: Budget, console: Console) -> Iterator[dict[str, Any]]:
    """One dict a run and seed."""
    for seed in seeds:
        networks = backbones(seed, folder, budget)
        before = {name: network.sha256() for name, network in networks.items()}
        tuner = AutoVPTuner(
            space(networks, budget is SMOKE),
            min_epochs=1,
            max_epochs=TRIAL_EPOCHS,
            seed=seed,
            trainer_args=QUIET,
            console=console,
        )
        start = time.perf_counter()
        best = tuner.search(digits(budget))
        tuning = time.perf_counter() - start
        winner = trained(best, seed, budget)
        fewer = fewer_rows(best, networks["wide"].network, seed, folder, budget)
        # six of those that saw both epochs, from the best to the last
        whole = [row for row in tuner.results if row["state"] == "complete"]
        places = [round(place * (len(whole) - 1) / (COMPARED - 1)) for place in range(COMPARED)]
        some = [whole[place] for place in sorted(set(places))]
        # the first of them is the winner
        late = [winner["val"], *(trained(row["config"], seed, budget)["val"] for row in some[1:])]
        order = float(spearmanr([row["value"] for row in some], late).statistic)
        yield {
            "run": WINNER,
            "seed": seed,
            **winner,
            **fewer[WINNER],
            "tuning": tuning,
            "trials": len(tuner.results),
            "pruned": sum(row["state"] == "pruned" for row in tuner.results) / len(tuner.results),
            "order": order,
            "config": str(best),
        }
        still = replace(best, lr=0.0, learn_scale=False)
        kept = float(sum(parameter.nbytes for parameter in still.output_mapping().parameters()))
        yield {"run": NO_FRAME, "seed": seed, **trained(still, seed, budget), "bytes": kept}
        wide = networks["wide"].network
        default = prompted(wide, "iterative", True, seed, budget)
        yield {"run": DEFAULT, "seed": seed, **default, **fewer[DEFAULT]}
        # no run has changed a weight or a buffer
        assert before == {name: network.sha256() for name, network in networks.items()}
        for name, frozen in RIVALS.items():
            own = source_network(seed, folder, budget, WIDTHS["wide"])
            yield {"run": name, "seed": seed, **rival(own, frozen, seed, budget), **fewer[name]}


def result(found: Sequence[dict[str, Any]]) -> TableResult:
    """The rows as a result."""
    columns = {
        "accuracy": Column("Test accuracy"),
        "some": Column("... with 30 % of the training rows"),
        "few": Column("... with 10 %"),
        "bytes": Column("Trained, bytes", "number"),
        "seconds": Column("Seconds", "seconds"),
        "tuning": Column("Seconds of the search", "seconds"),
        "trials": Column("Trials", "number"),
        "pruned": Column("... ended early"),
        "order": Column("Rank correlation with six long runs", "number"),
    }
    winners = "; ".join(f"seed {row['seed']}: {row['config']}" for row in found if row["run"] == WINNER)
    return TableResult.measured_here(
        "autovp",
        experiment="frozen CNNs of 9,600 (narrow) and 35,288 weights (wide) that tell ten garments in four rotations"
        " apart read digits of 16 pixels on a canvas of 28; 1,237 training rows, 200 for validation, 360 test rows;"
        f" trials of {TRIAL_EPOCHS} epochs, then 15, batches of 32; with fewer training rows as many steps."
        f" Winners: {winners}",
        columns=columns,
        rows=[
            TableRow(
                row["run"],
                row["seed"],
                "garments to digits",
                {name: None if row.get(name) is None else float(row[name]) for name in columns},
            )
            for row in found
        ],
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", default="runs/prompting/sources", help="where trained source networks lie")
    parser.add_argument("--rows", default="runs/prompting/autovp.jsonl", help="each row, as soon as it is there")
    parser.add_argument("--output", default="benchmarks/results/prompting/autovp.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    budget = SMOKE if arguments.smoke else Budget()
    kept = Path(arguments.rows)
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    # a row of every run or none: a seed that was killed begins anew
    whole = len(RIVALS) + 3
    found = [row for row in found if sum(row["seed"] == other["seed"] for other in found) == whole]
    if arguments.smoke:
        found = []
    seeds = [1] if arguments.smoke else [seed for seed in arguments.seeds if seed not in {row["seed"] for row in found}]
    for row in rows_of(seeds, Path(arguments.folder), budget, Console(width=110)):
        print(json.dumps(row), flush=True)
        found.append(row)
        if not arguments.smoke:
            kept.write_text("".join(f"{json.dumps(each)}\n" for each in found))
    made = result(found)
    if not arguments.smoke:
        made.write(Path(arguments.output))


if __name__ == "__main__":
    main()
