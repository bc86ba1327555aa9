"""What a prompt costs to train, to count for and to keep, beside full fine-tuning of the same network.

    python -m benchmarks.prompting [--rounds 15]

All that is compared runs in one process, on the same network and batch, in turn; a figure of time is a ratio of
medians. Memory is the largest sum of live storage that torch's profiler saw allocated on the CPU during a step: weights
and what an optimizer holds, which are there before, do not count. Results go to benchmarks/results/prompting.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from benchmarks.overhead import peak_bytes  # noqa: E402
from benchmarks.prompting_tasks import QUIET  # noqa: E402
from benchmarks.timing import Row, measure, medians, row  # noqa: E402
from lightning_trust.callbacks import IterativeLabelMapping, VisualPrompting  # noqa: E402
from lightning_trust.modules import ImageClassifier  # noqa: E402
from lightning_trust.nn import LabelMapping, PadPrompt, VisualPrompt, resnet18_small, save_prompt  # noqa: E402

SOURCES, BATCH, IMAGE, CANVAS = 40, 64, 16, 28


class Steps(pl.Callback):
    """Stops a run before its first batch and lends it out: a step, and whatever else is asked of it."""

    def __init__(self, use: Callable[[Any, Any], None]) -> None:
        self.use = use

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int:
        """Use the run that is set up."""
        self.use(trainer, pl_module)
        return -1


def step(trainer: Any, host: Any, batch: list[torch.Tensor]) -> Callable[[], None]:
    """A training step as Lightning makes it: zero, forward, backward, optimizer."""
    (optimizer,) = trainer.optimizers

    def closure() -> torch.Tensor:
        loss = host.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        return loss

    # what the host logs belongs to Lightning's loop
    host.log = lambda *_, **__: None
    return lambda: optimizer.step(closure)


def batches(size: int, count: int = 1) -> DataLoader:
    """Images with random pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH * count, 1, size, size, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size=BATCH)


def prompted(method: str = "identity") -> list[pl.Callback]:
    """Callbacks of a prompted run."""
    return [VisualPrompting(PadPrompt(IMAGE, CANVAS, channels=1), LabelMapping(SOURCES, 10, method))]  # type: ignore[arg-type]


def host() -> ImageClassifier:
    """A ResNet-18 with a 3x3 stem for images of 28 pixels."""
    torch.manual_seed(0)
    return ImageClassifier(resnet18_small(num_classes=SOURCES, in_channels=1), SOURCES, schedule="constant")


def steps(rounds: int) -> list[Row]:
    """A step of prompt training over one of full fine-tuning: time and memory."""
    lent: dict[str, tuple[Any, Any]] = {}

    def measure(trainer: Any, pl_module: Any) -> None:
        lent["prompt"] = (trainer, pl_module)

        def inner(other: Any, other_module: Any) -> None:
            lent["full"] = (other, other_module)
            work = {
                "prompt": step(*lent["prompt"], next(iter(batches(IMAGE)))),
                "full": step(*lent["full"], next(iter(batches(CANVAS)))),
            }
            found.update(medians(rounds, **work))
            memory.update({name: peak_bytes(one) for name, one in work.items()})

        pl.Trainer(**QUIET, max_epochs=1, callbacks=[Steps(inner)]).fit(host(), batches(CANVAS))

    found: dict[str, float] = {}
    memory: dict[str, int] = {}
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[*prompted(), Steps(measure)]).fit(host(), batches(IMAGE))
    what = f"prompt training of a ResNet-18, {CANVAS} px, batch {BATCH}, over full fine-tuning"
    return [
        row(f"{what}: time of a step", found["prompt"] / found["full"], 0.80, found),
        row(f"{what}: peak memory of a step", memory["prompt"] / memory["full"], 1.0, memory),
    ]


def refresh(rounds: int) -> list[Row]:
    """A count for the mapping over one pass of the prompted network over the same data, without a graph."""
    found: dict[str, float] = {}
    loader = batches(IMAGE, 8)
    counting = IterativeLabelMapping()

    def measure(trainer: Any, pl_module: Any) -> None:
        part = next(each.part for each in trainer.callbacks if isinstance(each, VisualPrompting))
        network = pl_module.network

        @torch.no_grad()
        def one_pass() -> None:
            pl_module.eval()
            with part.outputs_as_they_are():
                for images, _ in loader:
                    network(images)

        found.update(medians(rounds, refresh=lambda: counting.refresh(trainer, pl_module), one_pass=one_pass))

    callbacks = [*prompted("iterative"), counting, Steps(measure)]
    pl.Trainer(**QUIET, max_epochs=1, callbacks=callbacks).fit(host(), loader)
    what = f"counting for a mapping, {BATCH * 8} images, over a pass of the prompted network without a graph: time"
    return [row(what, found["refresh"] / found["one_pass"], 1.05, found)]


def file(rounds: int) -> list[Row]:
    """Bytes of a saved prompt over the prompt's own and 4 KiB."""
    part = VisualPrompt(PadPrompt(128, 224), LabelMapping(1000, 100, "identity"))
    network = torch.nn.Linear(1, 1000)
    with tempfile.TemporaryDirectory() as folder:
        save_prompt(folder, part, network, class_names=[f"class {place}" for place in range(100)])
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    own = part.prompt.num_bytes
    parts = {"files": size, "prompt": own}
    return [
        row(
            "a saved prompt of 101,376 values and 100 classes: bytes less 4 KiB over its own",
            (size - 4096) / own,
            1.1,
            parts,
        )
    ]


#: what is measured, in this order
MEASURED: dict[str, Callable[[int], list[Row]]] = {"steps": steps, "refresh": refresh, "file": file}


def main() -> None:
    """Measure, print, write."""
    measure("prompting", (__doc__ or "").splitlines()[0], MEASURED)


if __name__ == "__main__":
    main()
