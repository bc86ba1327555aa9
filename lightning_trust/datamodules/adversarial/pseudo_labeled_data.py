"""Labelled rows and rows that a teacher labelled, side by side in every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Subset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import gather_rows, rank, world_size
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.randomness import derived_seed, untouched_random_state
from lightning_trust.core.saved_weights import load_weights
from lightning_trust.datamodules.rows import with_transform
from lightning_trust.datamodules.wrapped import WrappedDataModule, loader_settings


@torch.no_grad()
def pseudo_labels(
    teacher: nn.Module, loader: Iterable[Any], threshold: float = 0.0, batch_spec: BatchSpec | None = None
) -> Tensor:
    r"""The classes that a teacher is confident of.

    .. math:: y_i = \arg\max_k p_k(x_i) \text{ where } \max_k p_k(x_i) \ge \tau, \text{ else } -1

    Paper: Unlabeled Data Improves Adversarial Robustness (NeurIPS 2019): a teacher trained on clean labelled data.

    Args:
        teacher: Maps inputs to logits ``(B, K)``; run in eval mode, where its parameters are, and left as it was.
        loader: Batches of the rows, in order; where they have labels, nobody looks at them.
        threshold: Least probability :math:`\tau` of the class, in [0, 1).
        batch_spec: Where inputs sit in a batch; a batch that is a tensor is the inputs.

    Returns:
        int64, shape ``(N,)``; -1 for a row that the teacher is not confident of.

    Raises:
        ValueError: If the threshold is out of its range, or the outputs are no finite logits.

    Example:
        >>> import torch
        >>> rows = [torch.tensor([[3.0, 0.0], [0.0, 0.1]])]
        >>> pseudo_labels(torch.nn.Identity(), rows, threshold=0.9).tolist()
        [0, -1]

    """
    _check_threshold(threshold)
    spec = batch_spec or BatchSpec()
    first = next(iter(teacher.parameters()), None)
    labels = []
    with untouched_random_state(), eval_mode(teacher):
        for batch in loader:
            inputs = batch if isinstance(batch, Tensor) else spec.inputs_of(batch)
            logits = teacher(inputs if first is None else inputs.to(first.device))
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"Expected argument `teacher` to give logits of shape (B, K), but got {found}.")
            confidence, label = logits.float().softmax(dim=1).max(dim=1)
            if not bool(confidence.isfinite().all()):
                raise ValueError("Expected argument `teacher` to give finite logits, but got NaN or infinity.")
            labels.append(label.masked_fill(confidence < threshold, -1).cpu())
    return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)


class MixedOrder(DistributedSampler[int]):
    """Rows of two parts, so many of each a batch: a function of seed and epoch, dealt to the ranks row by row.

    An epoch is long enough to serve every row of both; the shorter part is shuffled and served anew as often as needed.
    Being a ``DistributedSampler``, it is left in place by Lightning on one rank and on many.

    Args:
        sizes: Numbers of rows of the two parts; rows of the second follow those of the first.
        shares: Rows a batch on each rank of the two parts.
        seed: Seed of the shuffles.

    """

    def __init__(self, sizes: tuple[int, int], shares: tuple[int, int], seed: int) -> None:
        super().__init__(cast(Dataset[Any], range(sum(sizes))), world_size(), rank(), seed=seed)
        self.sizes = sizes
        self.shares = shares
        pairs = zip(sizes, shares, strict=True)
        self.batches = max(-(-size // (share * self.num_replicas)) for size, share in pairs)

    def dealt(self) -> Tensor:
        """The rows of this rank in this epoch, shape ``(batches, rows a batch)``, those of the first part first."""
        columns = []
        for part, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            wanted = self.batches * share * self.num_replicas
            passes = [self._shuffled(size, part, number) for number in range(-(-wanted // size))]
            own = torch.cat(passes)[:wanted][self.rank :: self.num_replicas]
            columns.append(own.view(self.batches, share) + part * self.sizes[0])
        return torch.cat(columns, dim=1)

    def _shuffled(self, size: int, *key: int) -> Tensor:
        seed = derived_seed("mixed order", self.seed, self.epoch, *key)
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[int]:
        return iter(self.dealt().flatten().tolist())

    def __len__(self) -> int:
        return self.batches * sum(self.shares)


class MixedBatches(BatchSampler):
    """Batches of a :class:`MixedOrder`."""

    def __init__(self, sampler: MixedOrder) -> None:
        super().__init__(sampler, sum(sampler.shares), drop_last=False)
        self.order = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.order.dealt().tolist())

    def __len__(self) -> int:
        return self.order.batches


class _Mixed(Dataset[Any]):
    """Rows of a labelled data set, followed by rows of another with the labels that a teacher gave them."""

    def __init__(self, labeled: Dataset[Any], unlabeled: Dataset[Any], labels: Tensor, spec: BatchSpec) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.rows = (labels >= 0).nonzero().flatten()
        self.labels = labels[self.rows]
        self.spec = spec
        self.count = len(cast(Sized, labeled))
        # a batch is stacked from labels of one type
        with untouched_random_state():
            template = spec.targets_of(labeled[0])
        self.dtype = template.dtype if isinstance(template, Tensor) else None

    def __len__(self) -> int:
        return self.count + len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The rows at ``indices``; each part fetches its own together where it can."""
        places = [index - self.count for index in indices if index >= self.count]
        known = iter(_fetched(self.labeled, [index for index in indices if index < self.count]))
        guessed = iter(_fetched(self.unlabeled, self.rows[places].tolist()))
        relabeled = (self._relabeled(sample, place) for sample, place in zip(guessed, places, strict=True))
        return [next(known) if index < self.count else next(relabeled) for index in indices]

    def _relabeled(self, sample: Any, place: int) -> Any:
        label = self.labels[place]
        value = int(label) if self.dtype is None else label.to(self.dtype)
        if isinstance(sample, Tensor):
            sample = (sample, None)
        elif isinstance(sample, tuple | list) and len(sample) == 1:
            sample = (*sample, None)
        return self.spec.replace(sample, targets=value)


def _fetched(dataset: Any, rows: list[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(rows) if rows else []
    return [dataset[row] for row in rows]


class PseudoLabeledData(WrappedDataModule):
    r"""The user's data module, with rows without labels in every training batch, labelled by a teacher.

    Of a batch of :math:`B` rows, :math:`\mathrm{round}(B \cdot \mathrm{unlabeled\_fraction})` come from
    ``unlabeled``, with the class that the teacher gives them, and the others are the user's. An epoch is long enough to
    serve every row of both; the shorter part is shuffled and served anew as often as needed. The order depends on seed
    and epoch alone, whatever the number of ranks. Validation, test and prediction data are the user's own.

    Papers: Unlabeled Data Improves Adversarial Robustness (NeurIPS 2019); Distributed Adversarial Training to Robustify
    Deep Neural Networks at Scale (UAI 2022).

    Args:
        datamodule: The user's data module; its ``train_dataloader`` returns one loader over a map-style dataset, whose
            batch size and workers count.
        unlabeled: A data module whose training set has the rows without labels. Labels that it has are replaced.
        teacher: A network trained on clean data, inputs to logits; it labels in ``setup``, its rows shared by the
            ranks. It sees batches as the loader gives them.
        teacher_checkpoint: Weights of the teacher: a checkpoint or state dict that loads as weights only.
        labels: In place of a teacher: labels of all rows of ``unlabeled``, int64 ``(N,)``, -1 where there is none, or
            the path of a file that ``torch.save`` wrote them to.
        unlabeled_fraction: Share of pseudo-labelled rows in a batch, in (0, 1).
        threshold: Least probability of a class that the teacher gives, in [0, 1); other rows are left out.
        eval_transform: Takes the place of the ``transform`` of the rows while the teacher labels them; the dataset as
            it is if None.
        batch_spec: Where inputs and targets sit in a sample.
        seed: Seed of the order of the rows.

    Raises:
        ValueError: If a number is out of its range, ``labels`` do not fit the rows, the checkpoint does not fit the
            teacher, or no row is left above the threshold.
        MisconfigurationException: If neither a teacher nor labels are given, or both, or a loader is not over a
            map-style dataset, or the Trainer would replace the order of the data, or a run is resumed with other
            pseudo-labels.

    Example:
        >>> import torch
        >>> from lightning_trust.datamodules import Digits, PseudoLabeledData
        >>> labels = torch.arange(1000) % 10
        >>> data = PseudoLabeledData(Digits(train_rows=100), Digits(train_rows=1000), labels=labels)
        >>> data.setup("fit")
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> len(inputs), len(data.train_dataloader())
        (64, 32)

    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        unlabeled: LightningDataModule,
        teacher: nn.Module | None = None,
        teacher_checkpoint: str | None = None,
        labels: Tensor | str | None = None,
        unlabeled_fraction: float = 0.5,
        threshold: float = 0.0,
        eval_transform: Callable[[Any], Any] | None = None,
        batch_spec: BatchSpec | None = None,
        seed: int = 0,
    ) -> None:
        if not 0.0 < unlabeled_fraction < 1.0:
            raise ValueError(
                f"Expected argument `unlabeled_fraction` to be a number in (0, 1), but got {unlabeled_fraction}."
            )
        _check_threshold(threshold)
        if (teacher is None) == (labels is None):
            raise MisconfigurationException(
                "PseudoLabeledData takes its labels from a `teacher` or from `labels`, but got"
                f" {'neither' if labels is None else 'both'}."
            )
        if teacher is None and teacher_checkpoint is not None:
            raise MisconfigurationException(
                f"Argument `teacher_checkpoint` holds weights for `teacher`, but got {teacher_checkpoint!r} and no"
                " teacher."
            )
        super().__init__(datamodule)
        self.unlabeled = unlabeled
        self.teacher = teacher
        self.teacher_checkpoint = teacher_checkpoint
        self.labels = labels
        self.unlabeled_fraction = unlabeled_fraction
        self.threshold = threshold
        self.eval_transform = eval_transform
        self.batch_spec = batch_spec or BatchSpec()
        self.seed = seed
        self._labels: Tensor | None = None

    # -- the user's own ------------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        """Prepare both data modules."""
        super().prepare_data()
        self.unlabeled.trainer = self.trainer
        self.unlabeled.prepare_data()

    def setup(self, stage: str) -> None:
        """Set up both data modules, and let the teacher label its rows where training is to come."""
        stage = str(getattr(stage, "value", stage))
        super().setup(stage)
        if stage != "fit":
            return
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit > 0:
            raise MisconfigurationException(
                f"PseudoLabeledData decides the order of the data, but Trainer(overfit_batches={overfit}) would replace"
                " it. Use `limit_train_batches`."
            )
        self.unlabeled.trainer = self.trainer
        self.unlabeled.setup(stage)
        if self._labels is None:
            self._labels = self._given() if self.teacher is None else self._taught(self.teacher)
            if not bool((self._labels >= 0).any()):
                raise ValueError(
                    f"Expected argument `threshold` to leave rows that the teacher is confident of, but got"
                    f" {self.threshold}, which leaves none of {len(self._labels)}."
                )

    def teardown(self, stage: str) -> None:
        """Tear both data modules down."""
        super().teardown(stage)
        if str(getattr(stage, "value", stage)) == "fit":
            self.unlabeled.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Tell both data modules."""
        super().on_exception(exception)
        self.unlabeled.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """State of both data modules, and which labels were given."""
        state = {**super().state_dict(), "unlabeled": self.unlabeled.state_dict()}
        return state if self._labels is None else {**state, "labels_hash": self._hash()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both data modules.

        Raises:
            MisconfigurationException: If the checkpoint is of a run with other pseudo-labels.

        """
        if self._labels is not None and state_dict.get("labels_hash", self._hash()) != self._hash():
            raise MisconfigurationException(
                f"Expected the pseudo-labels of the checkpoint ({state_dict['labels_hash']}), but got others"
                f" ({self._hash()}). Resume with the same teacher, or keep its labels in a file and pass `labels`."
            )
        super().load_state_dict(state_dict)
        self.unlabeled.load_state_dict(state_dict["unlabeled"])

    def _hash(self) -> str:
        assert self._labels is not None  # noqa: S101 (for mypy: callers have looked)
        return hashlib.blake2b(self._labels.numpy().tobytes(), digest_size=8).hexdigest()

    # -- labels --------------------------------------------------------------------------------------------------------
    @property
    def pseudo_labels(self) -> Tensor:
        """Labels of the rows of ``unlabeled``, int64 ``(N,)``, -1 for rows that are left out; there after ``setup``."""
        if self._labels is None:
            raise RuntimeError(
                "Expected `setup('fit')` to have run before pseudo-labels are asked for, but it has not."
            )
        return self._labels

    def _given(self) -> Tensor:
        labels = self.labels
        if not isinstance(labels, Tensor):
            labels = torch.load(str(labels), map_location="cpu", weights_only=True)
        count = len(cast(Sized, self.rows_loader(self.unlabeled).dataset))
        if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point():
            found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"Expected argument `labels` to have an integer for each of the {count} rows without labels,"
                f" but got {found}."
            )
        return labels.long().cpu()

    def _taught(self, teacher: nn.Module) -> Tensor:
        if self.teacher_checkpoint is not None:
            try:
                load_weights(teacher, self.teacher_checkpoint, inside=True)
            except ValueError as error:
                raise ValueError(f"Argument `teacher_checkpoint` does not fit the teacher. {error}") from error
        loader = self.rows_loader(self.unlabeled)
        dataset = with_transform(loader.dataset, self.eval_transform)
        own = range(rank(), len(cast(Sized, dataset)), world_size())
        settings = {**loader_settings(loader), "persistent_workers": False}
        batches: DataLoader[Any] = DataLoader(Subset(dataset, own), batch_size=loader.batch_size or 1, **settings)
        place = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
        device = place if self.trainer is None else self.trainer.strategy.root_device
        try:
            labels = pseudo_labels(teacher.to(device), batches, self.threshold, self.batch_spec)
        finally:
            teacher.to(place)
        return gather_rows(labels)

    # -- loader --------------------------------------------------------------------------------------------------------
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of both kinds of rows, the user's first, with the settings of the user's loader."""
        loader = self.rows_loader(self.datamodule)
        if loader.batch_size is None:
            raise MisconfigurationException(
                "PseudoLabeledData cuts batches of its own, but"
                f" `{type(self.datamodule).__name__}.train_dataloader` has a batch sampler and no `batch_size`."
            )
        guessed = round(loader.batch_size * self.unlabeled_fraction)
        if not 0 < guessed < loader.batch_size:
            raise ValueError(
                f"Expected argument `unlabeled_fraction` to leave rows of both kinds in a batch of {loader.batch_size},"
                f" but got {self.unlabeled_fraction}."
            )
        rows = _Mixed(loader.dataset, self.rows_loader(self.unlabeled).dataset, self.pseudo_labels, self.batch_spec)
        order = MixedOrder((rows.count, len(rows.rows)), (loader.batch_size - guessed, guessed), self.seed)
        mixed: DataLoader[Any] = DataLoader(rows, batch_sampler=MixedBatches(order), **loader_settings(loader))
        # what Lightning looks at to see that the order is distributed already; DataLoader refuses a plain assignment
        mixed.__dict__["sampler"] = order
        return mixed


def _check_threshold(threshold: float) -> None:
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"Expected argument `threshold` to be a probability in [0, 1), but got {threshold}.")
