"""A data module around the user's that feeds what an unlearning method trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    Subset,
)

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import rank, world_size
from lightning_trust.core.randomness import derived_seed, untouched_random_state
from lightning_trust.datamodules.rows import dataset_targets, with_transform
from lightning_trust.datamodules.unlearning.forget_set import ForgetClass, ForgetSet
from lightning_trust.datamodules.wrapped import WrappedDataModule, loader_settings

Feed = Literal["retain", "forget", "forget_then_retain", "mixed"]
Part = Literal["forget", "retain", "test"]
_FEEDS: tuple[Feed, ...] = ("retain", "forget", "forget_then_retain", "mixed")


class ForgetOrder(DistributedSampler[int]):
    """The order in which rows are fed: a function of seed and epoch, dealt to the ranks row by row.

    Being a ``DistributedSampler``, it is left in place by Lightning on one rank and on many.

    Args:
        segments: Row numbers; the segments follow one another, each is shuffled in itself, no batch has rows of two.
        seed: Seed of the shuffles.

    """

    def __init__(self, segments: list[Tensor], seed: int) -> None:
        super().__init__(cast(Dataset[Any], range(sum(map(len, segments)))), world_size(), rank(), seed=seed)
        self.segments = segments

    def dealt(self) -> list[Tensor]:
        """The rows of this rank in this epoch, by segment; short ranks repeat rows, as every distributed sampler."""
        dealt = []
        for place, rows in enumerate(self.segments):
            generator = torch.Generator().manual_seed(derived_seed("forget order", self.seed, self.epoch, place))
            order = rows[torch.randperm(len(rows), generator=generator)]
            missing = -len(order) % self.num_replicas
            order = torch.cat([order, order.repeat(missing // len(order) + 1)[:missing]])
            dealt.append(order[self.rank :: self.num_replicas])
        return dealt

    def __iter__(self) -> Iterator[int]:
        return iter(torch.cat(self.dealt()).tolist())

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.num_replicas) for rows in self.segments)


class ForgetBatches(BatchSampler):
    """Batches of a :class:`ForgetOrder`; remembers those of the pass that is under way.

    Args:
        sampler: The order.
        batch_size: Rows a batch.
        drop_last: Whether an incomplete last batch of a segment is left out (unless nothing else is in it).

    """

    def __init__(self, sampler: ForgetOrder, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.order = sampler
        self.current: list[Tensor] = []

    def _cut(self, rows: Tensor) -> list[Tensor]:
        batches = list(torch.split(rows, self.batch_size))
        if self.drop_last and len(batches) > 1 and len(batches[-1]) < self.batch_size:
            batches.pop()
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        self.current = [batch for rows in self.order.dealt() for batch in self._cut(rows)]
        return iter([batch.tolist() for batch in self.current])

    def __len__(self) -> int:
        total = 0
        for rows in self.order.segments:
            count = -(-len(rows) // self.order.num_replicas)
            whole, part = divmod(count, self.batch_size)
            total += whole + (part > 0 and (whole == 0 or not self.drop_last))
        return total


class ForgetLoader(DataLoader[Any]):
    """A data loader over a :class:`ForgetOrder` that knows which batch it served last."""

    def __init__(self, dataset: Dataset[Any], batches: ForgetBatches, **settings: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self.batches = batches
        self.served = 0
        # what Lightning looks at to see that the order is distributed already; DataLoader refuses a plain assignment
        self.__dict__["sampler"] = batches.order

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        self.served = 0
        return _Counted(self, iterator)


class _Counted:
    def __init__(self, loader: ForgetLoader, iterator: Iterator[Any]) -> None:
        self.loader = loader
        self.iterator = iterator

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        batch = next(self.iterator)
        self.loader.served += 1
        return batch

    def __len__(self) -> int:
        return len(self.loader)


class ForgetSplit(WrappedDataModule):
    """The user's data module with its training set split in what is to be forgotten and what is to be retained.

    Validation, test and prediction data, transfer hooks and attributes are the user's own.

    Args:
        datamodule: The user's data module; its ``train_dataloader`` returns one loader over a map-style dataset.
        forget: Which rows are to be forgotten.
        feed: What training gets. ``"retain"`` and ``"forget"``: these rows alone. ``"forget_then_retain"``: in every
            epoch first the batches to forget, then the batches to retain. ``"mixed"``: both, shuffled together. If
            None, the unlearning callback of the run decides, and without one it is ``"retain"``: a plain fit is then
            Retrain.
        eval_transform: Takes the place of the dataset's ``transform`` where rows are measured rather than trained on;
            the dataset as it is if None.
        batch_spec: Where targets sit in a sample, for datasets without ``targets``.
        seed: Seed of the order of the rows.

    Raises:
        ValueError: If ``feed`` is another word, the forget set is empty or the whole training set, or a class is
            absent (the latter two when the data are set up).

    Example:
        >>> from lightning_trust.datamodules import Digits, ForgetClass
        >>> split = ForgetSplit(Digits(), ForgetClass(3))
        >>> split.setup("fit")
        >>> bool((split.targets[split.forget_rows] == 3).all())
        True

    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        forget: ForgetSet,
        feed: Feed | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        batch_spec: BatchSpec | None = None,
        seed: int = 0,
    ) -> None:
        if feed is not None and feed not in _FEEDS:
            raise ValueError(f"Expected argument `feed` to be one of {list(_FEEDS)}, but got {feed!r}.")
        super().__init__(datamodule)
        self.forget = forget
        self.feed = feed
        self.eval_transform = eval_transform
        self.batch_spec = batch_spec or BatchSpec()
        self.seed = seed
        self.requested: Feed | None = None
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._loader: ForgetLoader | None = None
        self._set_up: set[str] = set()

    # -- the user's own ------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Set up the user's data.

        Raises:
            MisconfigurationException: If the Trainer would replace the order of the data.

        """
        stage = str(getattr(stage, "value", stage))
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if stage == "fit" and overfit > 0:
            raise MisconfigurationException(
                f"ForgetSplit decides the order of the data, but Trainer(overfit_batches={overfit}) would replace it."
                " Use `limit_train_batches`."
            )
        super().setup(stage)
        self._set_up = {stage}
        self._rows = self._loader = None
        # from a run that ended in an exception
        self.requested = None
        if stage == "fit":
            self._split()

    def _ensure_set_up(self, stage: str) -> None:
        """Set up what another stage needs of the user's data, once."""
        if stage not in self._set_up:
            # a run draws the same numbers whether it is measured or not
            with untouched_random_state():
                self.datamodule.setup(stage)
            self._set_up.add(stage)

    def teardown(self, stage: str) -> None:
        """Tear the user's data down."""
        super().teardown(stage)
        self._set_up.clear()
        self.requested = None

    def state_dict(self) -> dict[str, Any]:
        """State of the user's data module, and which rows are forgotten."""
        return {**super().state_dict(), "forget_hash": self.forget_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the user's data module.

        Raises:
            MisconfigurationException: If the checkpoint is of a run that forgot other rows.

        """
        # a model may be measured against any forget set
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        if fits and state_dict["forget_hash"] != self.forget_hash:
            raise MisconfigurationException(
                f"Expected the forget set of the checkpoint ({state_dict['forget_hash']}), but got {self.forget}"
                f" ({self.forget_hash}). Resume with the same `forget` and the same training set."
            )
        super().load_state_dict(state_dict)

    # -- the split -----------------------------------------------------------------------------------------------------
    def _train_loader(self) -> DataLoader[Any]:
        self._ensure_set_up("fit")
        return self.rows_loader(self.datamodule)

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows to forget, rows to retain, and which of all rows are to be forgotten."""
        if self._rows is None:
            dataset = self._train_loader().dataset
            count = len(cast(Sized, dataset))
            forget = self.forget.rows(count, lambda: dataset_targets(dataset, self.batch_spec))
            if len(forget) == 0 or len(forget) >= count:
                amount = "no row" if len(forget) == 0 else "every row"
                raise ValueError(
                    f"Expected argument `forget` to leave rows to forget and rows to retain of {count}, but got"
                    f" {self.forget!r}, which is {amount}."
                )
            forgotten = torch.zeros(count, dtype=torch.bool)
            forgotten[forget] = True
            self._rows = forget, (~forgotten).nonzero().flatten(), forgotten
        return self._rows

    @property
    def forget_rows(self) -> Tensor:
        """Numbers of the rows to be forgotten, sorted."""
        return self._split()[0]

    @property
    def retain_rows(self) -> Tensor:
        """Numbers of the rows to be retained, sorted."""
        return self._split()[1]

    @property
    def targets(self) -> Tensor:
        """Labels of the training set."""
        return dataset_targets(self._train_loader().dataset, self.batch_spec)

    @property
    def forget_hash(self) -> str:
        """Names the forget set: equal for equal rows of a training set of equal size."""
        forget, retain, _ = self._split()
        content = f"{len(forget) + len(retain)}:".encode() + forget.numpy().tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def request_feed(self, feed: Feed, owner: str) -> None:
        """Let the run's unlearning callback decide what training gets.

        Raises:
            MisconfigurationException: If the user asked for another feed.

        """
        if self.feed not in (None, feed):
            raise MisconfigurationException(
                f"{owner} trains on feed='{feed}', but ForgetSplit got feed='{self.feed}'. Leave `feed` out."
            )
        self.requested = feed

    @property
    def current_feed(self) -> Feed:
        """What training gets."""
        return self.feed or self.requested or "retain"

    # -- loaders -------------------------------------------------------------------------------------------------------
    def train_dataloader(self) -> ForgetLoader:
        """Batches of the feed, with the settings of the user's loader."""
        loader = self._train_loader()
        if loader.batch_size is None:
            raise MisconfigurationException(
                "ForgetSplit cuts batches of its own, but"
                f" `{type(self.datamodule).__name__}.train_dataloader` has a batch sampler and no `batch_size`."
            )
        forget, retain, _ = self._split()
        segments = {
            "retain": [retain],
            "forget": [forget],
            "forget_then_retain": [forget, retain],
            "mixed": [torch.cat([forget, retain])],
        }[self.current_feed]
        batches = ForgetBatches(ForgetOrder(segments, self.seed), loader.batch_size, loader.drop_last)
        self._loader = ForgetLoader(loader.dataset, batches, **loader_settings(loader))
        return self._loader

    def indices(self, batch_idx: int) -> Tensor:
        """Numbers of the rows, in the training set, of the batch that training got last.

        Args:
            batch_idx: Index of that batch in its epoch.

        Raises:
            MisconfigurationException: If the loader served another batch: a run resumed in mid-epoch starts its data
                anew.

        """
        loader = self._loader
        if (
            self.trainer is not None
            and self.trainer.training
            and isinstance(self.trainer.train_dataloader, ForgetLoader)
        ):
            # others may have asked for loaders since
            loader = self.trainer.train_dataloader
        if loader is None or loader.served == 0:
            raise RuntimeError("Expected a batch to have been served before its rows are asked for, but none was.")
        if loader.served != batch_idx + 1:
            raise MisconfigurationException(
                f"Expected to be asked for the rows of batch {loader.served - 1}, which was served last, but got"
                f" batch_idx={batch_idx}. A run that is resumed within an epoch needs `callbacks.ExactResume`."
            )
        return loader.batches.current[batch_idx]

    def rows(self, batch_idx: int) -> Tensor:
        """Which rows of the batch that training got last are to be forgotten: a boolean for each."""
        return self._split()[2][self.indices(batch_idx)]

    def forget_dataloader(self) -> DataLoader[Any]:
        """The rows to be forgotten, in order, as they are measured."""
        return self.part("forget")

    def retain_dataloader(self) -> DataLoader[Any]:
        """The rows to be retained, in order, as they are measured."""
        return self.part("retain")

    def part(self, part: Part, shard: bool = False) -> DataLoader[Any]:
        """One part of the data, in order, as it is measured.

        Args:
            part: ``"forget"`` and ``"retain"`` are rows of the training set with ``eval_transform``. ``"test"`` is
                the user's test set; where a class is forgotten, without that class.
            shard: Whether to take only the rows ``r::W`` on rank r of W, without repeating any.

        """
        if part == "test":
            self._ensure_set_up("test")
            loader = self.datamodule.test_dataloader()
            if not isinstance(loader, DataLoader):
                raise MisconfigurationException(
                    "ForgetSplit measures one test DataLoader, but"
                    f" `{type(self.datamodule).__name__}.test_dataloader` gave {type(loader).__name__}."
                )
            dataset = loader.dataset
            rows = torch.arange(len(cast(Sized, dataset)))
            if isinstance(self.forget, ForgetClass):
                rows = rows[dataset_targets(dataset, self.batch_spec) != self.forget.label]
        else:
            loader = self._train_loader()
            dataset = with_transform(loader.dataset, self.eval_transform)
            rows = self.forget_rows if part == "forget" else self.retain_rows
        if shard:
            rows = rows[rank() :: world_size()]
        settings = {**loader_settings(loader), "persistent_workers": False}
        subset = Subset(dataset, cast(Any, rows.tolist()))
        return DataLoader(subset, batch_size=loader.batch_size or 1, shuffle=False, **settings)
