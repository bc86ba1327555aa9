"""Rows of tokens, and the data module that hands them out as a causal language model wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_trust.datamodules.language.tokenizers import Tokenizer, make_tokenizer
from lightning_trust.datamodules.split_data_module import SplitDataModule, check_integer

Batch = dict[str, Tensor]
Part = Literal["train", "val", "test"]
#: A label that does not count.
IGNORED = -100


class TokenRows(Dataset[Batch]):
    """Sequences of tokens; ``dataset[i]`` is ``{"input_ids": ..., "labels": ...}``, int64 of one length.

    Labels stand under the tokens that they are: the model shifts them.

    Args:
        rows: The sequences, each of at least two tokens.
        targets: The class of each row, where its last token is the word of a class: then that token alone has a label.
        candidates: The tokens of the classes, in their order.

    Attributes:
        targets: Classes, int64 ``(N,)``, or None.

    Example:
        >>> rows = TokenRows([torch.tensor([5, 6, 7])], targets=torch.tensor([0]), candidates=torch.tensor([7, 9]))
        >>> rows[0]["labels"]
        tensor([-100, -100,    7])

    """

    def __init__(
        self, rows: Sequence[Tensor] | Tensor, targets: Tensor | None = None, candidates: Tensor | None = None
    ) -> None:
        self.rows = rows
        self.targets = targets
        self.candidates = candidates

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        tokens = self.rows[index].long()
        labels = tokens.clone()
        if self.targets is not None:
            labels[:-1] = IGNORED
        return {"input_ids": tokens, "labels": labels}


@dataclass(frozen=True)
class PadRows:
    """Makes a batch of rows: padded on the right to the longest, the padding masked.

    Args:
        pad: The token of the padding.
        candidates: The tokens of the classes, which every batch carries; None where there are no classes.

    """

    pad: int
    candidates: Tensor | None = None

    def __call__(self, rows: list[Batch]) -> Batch:
        """Rows to a batch."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        width = int(lengths.max())
        filled = {"input_ids": self.pad, "labels": IGNORED}
        batch = {}
        for name, value in filled.items():
            batch[name] = torch.full((len(rows), width), value)
            for place, row in enumerate(rows):
                batch[name][place, : len(row[name])] = row[name]
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        if self.candidates is not None:
            batch["candidates"] = self.candidates
        return batch


class TextDataModule(SplitDataModule):
    """Train, validation and test rows of tokens; a subclass reads them.

    A batch is a dict: ``input_ids``, ``attention_mask`` and ``labels``, int64 ``(B, T)``, and where rows have classes
    ``candidates``, int64 ``(K,)``, the tokens of their words. The data sets (:class:`TokenRows`) and the tokenizer are
    there after ``setup``.

    Attributes:
        train_dataset: The training rows.
        val_dataset: The validation rows.
        test_dataset: The test rows.
        tokenizer: The tokenizer.

    """

    train_dataset: TokenRows
    val_dataset: TokenRows
    test_dataset: TokenRows
    tokenizer: Tokenizer

    def __init__(
        self,
        tokenizer: str,
        max_length: int,
        batch_size: int,
        num_workers: int,
        train_rows: int | None,
        val_rows: int | None,
        test_rows: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        check_integer("max_length", max_length, 2)
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_integer("seed", seed, 0)
        for name, count in (("train_rows", train_rows), ("val_rows", val_rows), ("test_rows", test_rows)):
            if count is not None:
                check_integer(name, count, 1)
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.counts: dict[Part, int | None] = {"train": train_rows, "val": val_rows, "test": test_rows}
        self.seed = seed

    def read(self, part: Part) -> TokenRows:
        """All rows of a part."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """Number of tokens that there are."""
        return len(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Read and choose the rows; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        self.tokenizer = make_tokenizer(self.tokenizer_name)
        found = {part: self._chosen(part, self.read(part), count) for part, count in self.counts.items()}
        self.train_dataset, self.val_dataset, self.test_dataset = found.values()

    def _chosen(self, part: Part, rows: TokenRows, count: int | None) -> TokenRows:
        """So many of the rows, the same ones in every run: of each class as many, where they have one."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(rows), generator=generator)
        if rows.targets is not None and rows.candidates is not None:
            own = [order[rows.targets[order] == place] for place in range(len(rows.candidates))]
            least = min(map(len, own))
            # one of each class after the other, so that fewer rows are a part of more
            order = torch.stack([each[:least] for each in own], dim=1).flatten()
        if count is not None and count > len(order):
            balance = "" if rows.targets is None else ", as many of each class"
            raise MisconfigurationException(
                f"Expected argument `{part}_rows` of {type(self).__name__} to be at most {len(order)}, the {part} rows"
                f" that there are{balance}, but got {count}."
            )
        if not len(order):
            raise MisconfigurationException(f"{type(self).__name__} found no {part} rows.")
        chosen = order[:count].sort().values
        targets = None if rows.targets is None else rows.targets[chosen]
        kept = rows.rows[chosen] if isinstance(rows.rows, Tensor) else [rows.rows[place] for place in chosen.tolist()]
        return TokenRows(kept, targets, rows.candidates)

    def loader_settings(self, dataset: TokenRows) -> dict[str, Any]:
        """Rows are padded to the longest of a batch."""
        pad = self.tokenizer.pad_token_id
        if pad is None:
            # it is masked
            pad = self.tokenizer.eos_token_id or 0
        return {"collate_fn": PadRows(pad, dataset.candidates)}
