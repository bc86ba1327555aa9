"""The same measure at home and elsewhere."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import gather_rows, rank, world_size
from lightning_trust.core.host import find_network
from lightning_trust.core.passes import evaluate
from lightning_trust.core.step import HostCallback
from lightning_trust.functional.adversarial.group_bootstrap import group_bootstrap_interval


class OODEvaluation(HostCallback):
    r"""Measure the network on the run's own test data and on others, side by side.

    Logs in ``trainer.test``: ``trust/id_<measure>``; for each other set ``trust/ood_<measure>/<name>`` and
    ``trust/ood_gap/<name>``, the first minus the second; and ``trust/ood_<measure>/worst``. With ``resamples`` also the
    ends of 95 % bootstrap intervals: ``trust/id_<measure>_low``, ``trust/ood_<measure>_low/<name>``, and the same with
    ``high``; see :func:`~lightning_trust.functional.adversarial.group_bootstrap_interval`.

    Whole groups are resampled where a set's test dataset has an attribute ``groups``, the group (such as the patient)
    of each of its rows, as that of :class:`~lightning_trust.datamodules.CXRDataModule` has; single rows elsewhere.

    Args:
        sets: Data modules by name, whose test data are the other sites; classes in the same order as the run's.
        measure: ``"acc"``: share of samples whose largest logit is that of the class; ``"auroc"``: mean area under the
            ROC curve over the labels of multi-hot targets. A label with one value only is left out, with a
            warning, and a set that has no other label does not count for the worst.
        resamples: Number of resamples for the intervals, such as 1000; 0 for none.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If there is no set, ``measure`` is another word, or ``resamples`` is negative (at once); if a set
            has other class names (before the test), or targets or groups do not fit.

    Example:
        >>> from lightning_trust.datamodules import ShortcutFashionMNIST
        >>> OODEvaluation({"elsewhere": ShortcutFashionMNIST(shifted=True)}).measure
        'acc'

    """

    # in a fit as well, so that a strategy that is not supported is refused before training
    stages = ("fit", "test")

    def __init__(
        self,
        sets: dict[str, LightningDataModule],
        measure: Literal["acc", "auroc"] = "acc",
        resamples: int = 0,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if not sets:
            raise ValueError("Expected argument `sets` to hold at least one data module, but got none.")
        if measure not in ("acc", "auroc"):
            raise ValueError(f"Expected argument `measure` to be 'acc' or 'auroc', but got {measure!r}.")
        if resamples < 0:
            raise ValueError(f"Expected argument `resamples` to be at least 0, but got {resamples}.")
        self.sets = sets
        self.measure = measure
        self.resamples = resamples
        self.batch_spec = batch_spec or BatchSpec()
        self.network = network

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Set the other data up, and compare the names of the classes."""
        super().setup(trainer, pl_module, stage)
        if stage != "test":
            return
        own = getattr(trainer.datamodule, "class_names", None)
        for name, data in self.sets.items():
            data.prepare_data()
            data.setup("test")
            other = getattr(data, "class_names", None)
            if own is not None and other is not None and tuple(own) != tuple(other):
                raise ValueError(
                    f"Expected the set '{name}' to have the classes of the run's data in the same order, {list(own)},"
                    f" but got {list(other)}."
                )

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure all sets and log them."""
        loaders = trainer.test_dataloaders
        own, ends = self._measured(trainer, pl_module, loaders[0] if isinstance(loaders, (list, tuple)) else loaders)
        found = {f"trust/id_{self.measure}": own}
        found |= {f"trust/id_{self.measure}_{end}": value for end, value in ends.items()}
        values = []
        for name, data in self.sets.items():
            value, ends = self._measured(trainer, pl_module, data.test_dataloader())
            found[f"trust/ood_{self.measure}/{name}"] = value
            found |= {f"trust/ood_{self.measure}_{end}/{name}": value for end, value in ends.items()}
            found[f"trust/ood_gap/{name}"] = own - value
            values.append(value)
        found[f"trust/ood_{self.measure}/worst"] = min(
            (value for value in values if not math.isnan(value)), default=math.nan
        )
        pl_module.log_dict(found)

    def _measured(self, trainer: Any, host: Any, loader: Any) -> tuple[float, dict[str, float]]:
        """The measure, and the ends of its interval if asked for."""
        dataset = loader.dataset
        # every row once, on any number of ranks, whatever sampler the loader has
        shard = Subset(dataset, list(range(rank(), len(dataset), world_size())))
        rows = DataLoader(
            shard,
            batch_size=loader.batch_size or 128,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
        )
        outputs, targets = [], []
        for logits, labels in evaluate(trainer, host, find_network(host, self.network), rows, self.batch_spec):
            outputs.append(logits.cpu())
            targets.append(labels.cpu())
        whole = gather_rows(torch.cat(outputs)), gather_rows(torch.cat(targets))
        measure = accuracy if self.measure == "acc" else mean_auroc
        value = measure(*whole)
        if not self.resamples:
            return value, {}
        # the same draws on all ranks, which hold the same rows
        interval = group_bootstrap_interval(
            lambda rows: measure(whole[0][rows], whole[1][rows]), groups_of(dataset), self.resamples
        )
        return value, dict(zip(("low", "high"), interval, strict=True))


def groups_of(dataset: Any) -> Tensor:
    """A number for the group of each row of a dataset; each row is one where the dataset has no ``groups``."""
    if isinstance(dataset, Subset):
        return groups_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    names = getattr(dataset, "groups", None)
    if names is None:
        return torch.arange(len(dataset))
    names = names.tolist() if isinstance(names, Tensor) else list(names)
    if len(names) != len(dataset):
        raise ValueError(
            f"Expected attribute `groups` of {type(dataset).__name__} to hold the group of each of {len(dataset)} rows,"
            f" but got {len(names)}."
        )
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of samples whose largest logit is that of the class."""
    if targets.ndim != 1:
        raise ValueError(f"Expected classes of shape (N,) for measure='acc', but got shape {tuple(targets.shape)}.")
    return float((logits.argmax(dim=1) == targets).double().mean())


def mean_auroc(logits: Tensor, targets: Tensor) -> float:
    """Mean area under the ROC curve over the labels that have both values; NaN where none has."""
    if targets.ndim != 2:
        raise ValueError(
            f"Expected multi-hot targets of shape (N, K) for measure='auroc', but got shape {tuple(targets.shape)}."
        )
    from sklearn.metrics import roc_auc_score

    values, left = [], []
    for label in range(targets.shape[1]):
        true = targets[:, label] > 0.5
        if bool(true.all()) or not bool(true.any()):
            left.append(label)
            continue
        values.append(float(roc_auc_score(true.numpy(), logits[:, label].numpy())))
    if left:
        rank_zero_warn(f"Labels {left} have one value only in this set, so they have no ROC curve and are left out.")
    return sum(values) / len(values) if values else float("nan")
