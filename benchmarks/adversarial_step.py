"""What a training step costs with AdversarialTraining beside the same objective written by hand, and what attacks hold.

Its rows are a part of ``python -m benchmarks.attacks``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.overhead import peak_bytes
from benchmarks.silent_trainer import SILENT
from benchmarks.timing import row
from lightning_trust.attacks import APGD, PGD, Attack
from lightning_trust.callbacks import AdversarialTraining
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.modules import ImageClassifier

EPS, STEP, STEPS, BETA = 0.1, 0.02, 10, 6.0


class ByHand(ImageClassifier):
    """What one would write without this package: the attack in the step, parameters without gradients in it."""

    def perturbed(self, inputs: Tensor, start: Tensor, loss_of: Any) -> Tensor:
        """PGD, the network in eval mode."""
        low, high = (inputs - EPS).clamp(0.0, 1.0), (inputs + EPS).clamp(0.0, 1.0)
        moved = torch.clamp(start, low, high)
        self.network.eval()
        self.network.requires_grad_(False)
        for _ in range(STEPS):
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(self.network(moved)), moved)
            moved = torch.clamp(moved.detach() + STEP * gradient.sign(), low, high)
        self.network.requires_grad_(True)
        self.network.train()
        return moved


class StandardByHand(ByHand):
    """The loss at adversarial inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The step of the classifier, on other inputs."""
        inputs, targets = batch
        start = inputs + torch.empty_like(inputs).uniform_(-EPS, EPS)
        moved = self.perturbed(inputs, start, lambda logits: F.cross_entropy(logits, targets, reduction="sum"))
        return super().training_step((moved, targets), batch_idx)


class TradesByHand(ByHand):
    """The loss at clean inputs and the divergence to adversarial ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The step of the classifier, whose logits are kept, and one forward pass more."""
        inputs, _ = batch
        with torch.no_grad():
            self.network.eval()
            clean = F.softmax(self.network(inputs), dim=1)
        start = inputs + 0.001 * torch.randn_like(inputs)
        moved = self.perturbed(
            inputs, start, lambda logits: F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum")
        )
        held: list[Tensor] = []
        handle = self.network.register_forward_hook(lambda module, args, output: held.append(output))
        loss = super().training_step(batch, batch_idx)
        handle.remove()
        divergence = F.kl_div(
            F.log_softmax(self.network(moved), dim=1), F.softmax(held[0], dim=1), reduction="batchmean"
        )
        return loss + BETA * divergence


class Periods(pl.Callback):
    """Seconds from the start of one training batch to that of the next, the first ones left out."""

    def __init__(self, skip: int = 2) -> None:
        self.skip = skip
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the batch before."""
        self._last = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the time."""
        present = time.perf_counter()
        if self._last is not None and batch_idx >= self.skip:
            self.seconds.append(present - self._last)
        self._last = present


def training_step(rounds: int = 8, batches: int = 8, batch_size: int = 128) -> list[dict[str, object]]:
    """A step with the callback over one written by hand, in runs of a few batches that take turns."""
    data = FashionMNIST(train_rows=batches * batch_size, val_rows=10, test_rows=10, batch_size=batch_size)
    result = []
    for objective, by_hand in (("standard", StandardByHand), ("trades", TradesByHand)):
        clocks = {"ours": Periods(), "by hand": Periods()}
        for round_ in range(rounds):
            for name in ("ours", "by hand") if round_ % 2 else ("by hand", "ours"):
                callbacks: list[pl.Callback] = [clocks[name]]
                if name == "ours":
                    host = ImageClassifier("SmallCNN")
                    callbacks.append(AdversarialTraining(PGD(EPS, STEP, STEPS), objective=objective))
                else:
                    host = by_hand("SmallCNN")
                pl.Trainer(**SILENT, max_epochs=1, limit_val_batches=0, callbacks=callbacks).fit(host, data)
        found = {name: statistics.median(clock.seconds) for name, clock in clocks.items()}
        what = f"AdversarialTraining step over one by hand, {objective}, PGD-{STEPS}, small CNN, batch {batch_size}"
        result.append(row(what, found["ours"] / found["by hand"], 1.03, found))
    return result


def memory(width: int = 2048) -> list[dict[str, object]]:
    """Peak bytes of an attack on a network that is nearly all parameters, in bytes of its parameters."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    network.append(nn.Linear(width, 10))
    inputs, targets = torch.rand(8, 1, 28, 28), torch.arange(8)
    bytes_ = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    result = []
    attacks: dict[str, Attack] = {f"PGD-{STEPS}": PGD(EPS, STEP, STEPS), "APGD": APGD(EPS, steps=10)}
    for name, attack in attacks.items():
        attack(network, inputs, targets, check=False)
        peak = peak_bytes(lambda attack=attack: attack(network, inputs, targets, check=False))
        what = f"{name}, peak memory in parameter bytes, where a parameter gradient would be 1"
        result.append(row(what, peak / bytes_, 0.1, {"peak": peak, "parameters": bytes_}))
    return result
