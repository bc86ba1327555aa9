"""What the mechanisms of core/ cost: masks, the chain, the saliency mask, the import.

    python -m benchmarks.overhead

Every figure is a ratio of medians measured in one process, side by side; costs far below the noise of a training step
are timed alone and divided by it. Results go to benchmarks/results/overhead.json.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.silent_trainer import SILENT
from benchmarks.timing import Row, measure, medians, row
from lightning_trust.callbacks import SalUn
from lightning_trust.core.masks import ParameterMask, WeightZeroing, select_parameters
from lightning_trust.core.step import StepTransform
from lightning_trust.datamodules import FashionMNIST, ForgetRandom, ForgetSplit
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import resnet18_small


def mask_enforcement(rounds: int) -> list[Row]:
    """Zeroing a 90 % sparse ResNet-18 against its training step, and against torch.nn.utils.prune."""
    network = resnet18_small(1, 10)
    inputs, targets = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    step()
    weights = select_parameters(network, ["Conv2d", "Linear"])
    mask = ParameterMask.with_sparsity({name: weight.detach().abs() for name, weight in weights.items()}, 0.9)
    zeroing = WeightZeroing(mask, network)

    def enforce() -> None:
        zeroing.gradients()
        zeroing.weights()

    # what torch.nn.utils.prune adds to a step: weight = weight_orig * mask before the forward, its gradient after it
    pruned = resnet18_small(1, 10)
    layers = [module for module in pruned.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.9)
    hooks = [(hook, layer) for layer in layers for hook in layer._forward_pre_hooks.values()]
    originals = [layer.weight_orig for layer in layers]
    ones = [torch.ones_like(original) for original in originals]

    def parametrise() -> None:
        for hook, layer in hooks:
            hook(layer, None)
        torch.autograd.grad([layer.weight for layer in layers], originals, ones)

    found = medians(rounds, step=step, ours=enforce, prune=parametrise)
    return [
        row("mask enforcement, ResNet-18, share of a training step", found["ours"] / found["step"], 0.02, found),
        row("mask enforcement over torch.nn.utils.prune", found["ours"] / found["prune"], 1.0, found),
    ]


class NoTransform(StepTransform):
    """Changes nothing: what remains is the chain."""

    calls = 0

    def prepare(self, host, batch, ctx):
        """The batch as it is."""
        self.calls += 1
        return batch

    def loss(self, host, step, batch, ctx):
        """The loss as it is."""
        return step(batch)


class NoWork(pl.LightningModule):
    """A host whose step costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.value = self.layer.weight.sum()

    def training_step(self, batch, batch_idx):
        """A ready tensor."""
        return self.value

    def configure_optimizers(self):
        """Any."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def chain(rounds: int) -> list[Row]:
    """Seconds that the chain and one transform add to a step that does nothing."""
    found: dict[str, float] = {}

    class Time(pl.Callback):
        """Calls the host's step from within a fit."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            """With the chain and without it, in turn."""
            plain = type(pl_module).training_step
            new = iter([(batch[0],) for _ in range(200 * (rounds + 2))])

            def with_chain() -> None:
                for _ in range(200):
                    # a batch of its own each time, as in a run: a batch that is seen again is a replay
                    pl_module.training_step(next(new), batch_idx)

            def without() -> None:
                for _ in range(200):
                    plain(pl_module, batch, batch_idx)

            found.update(medians(rounds, chain=with_chain, plain=without))

    data = DataLoader(TensorDataset(torch.zeros(2, 1)), batch_size=1)
    host = NoWork()
    transform = NoTransform()
    pl.Trainer(**SILENT, max_steps=1, callbacks=[transform, Time()]).fit(host, data)
    if transform.calls != 200 * (rounds + 2) + 1:
        raise RuntimeError(f"Expected the chain to be timed with its transform, but that ran {transform.calls} times.")
    micros = (found["chain"] - found["plain"]) / 200 * 1e6
    return [row("chain and one transform, microseconds a step", micros, 50.0, found)]


def saliency(rounds: int) -> list[Row]:
    """SalUn's mask against one forward-backward pass over the same rows; its peak memory over that pass's."""
    split = ForgetSplit(FashionMNIST(train_rows=1280, batch_size=128), ForgetRandom(num=256))
    host = ImageClassifier(resnet18_small(1, 10))
    rows: list[Row] = []

    class Measure(pl.Callback):
        """Runs inside a fit, where the callback's pass runs."""

        def on_train_start(self, trainer, pl_module):
            """Mask and plain pass in turn."""
            salun = next(callback for callback in trainer.callbacks if isinstance(callback, SalUn))
            network, parameters = pl_module.network, list(pl_module.parameters())

            def mask() -> None:
                salun._mask(salun.saliency(trainer, pl_module))

            def plain() -> None:
                network.eval()
                for inputs, targets in split.part("forget"):
                    F.cross_entropy(network(inputs), targets).backward()
                for parameter in parameters:
                    parameter.grad = None
                network.train()

            found = medians(rounds, mask=mask, plain=plain)
            bytes_ = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
            peaks = {name: peak_bytes(work) for name, work in (("plain", plain), ("mask", mask))}
            extra = (peaks["mask"] - peaks["plain"]) / bytes_
            rows.append(row("SalUn's mask over one forward-backward pass", found["mask"] / found["plain"], 1.15, found))
            rows.append(row("SalUn's mask, extra peak memory in parameter bytes", extra, 1.3, peaks))
            trainer.should_stop = True

    pl.Trainer(**SILENT, max_steps=1, limit_train_batches=1, limit_val_batches=0, callbacks=[SalUn(), Measure()]).fit(
        host, split
    )
    return rows


def peak_bytes(work) -> int:
    """Largest sum of live tensor storage that torch's profiler saw allocated on the CPU while the work ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    total = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def imports(rounds: int) -> list[Row]:
    """``import lightning_trust`` beside ``import lightning``, fresh processes in turn, CPU seconds."""

    def seconds(code: str) -> float:
        command = "import time; start = time.process_time(); " + code + "; print(time.process_time() - start)"
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
        return float(done.stdout.strip().splitlines()[-1])

    values: dict[str, list[float]] = {"lightning": [], "both": []}
    for _ in range(rounds):
        values["lightning"].append(seconds("import lightning"))
        values["both"].append(seconds("import lightning, lightning_trust"))
    found = {name: sorted(times)[len(times) // 2] for name, times in values.items()}
    return [row("import of both packages over import lightning", found["both"] / found["lightning"], 1.10, found)]


#: what is measured, in this order
MEASURED: dict[str, Callable[[int], list[Row]]] = {
    "masks": mask_enforcement,
    "chain": chain,
    "saliency": lambda rounds: saliency(max(1, rounds // 2)),
    "imports": lambda rounds: imports(max(1, rounds // 3)),
}


def main() -> None:
    """Measure, print, write."""
    measure("overhead", (__doc__ or "").splitlines()[0], MEASURED)


if __name__ == "__main__":
    main()
