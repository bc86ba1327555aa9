"""Loaders of data that are split in three."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import SequentialSampler, TensorDataset

from lightning_trust.datamodules.split_data_module import SplitDataModule, check_integer


class Numbers(SplitDataModule):
    def __init__(self, batch_size=None, val_rows=0):
        super().__init__()
        self.batch_size = batch_size
        self.val_rows = val_rows

    def setup(self, stage=None):
        self.train_dataset = TensorDataset(torch.arange(100))
        self.val_dataset = TensorDataset(torch.arange(self.val_rows))
        self.test_dataset = TensorDataset(torch.arange(5))

    def loader_settings(self, dataset):
        return {"drop_last": dataset is self.test_dataset}


def test_training_rows_alone_are_shuffled():
    data = Numbers(batch_size=50, val_rows=3)
    data.setup()
    torch.manual_seed(0)
    seen = torch.cat([batch for (batch,) in data.train_dataloader()])
    assert seen.tolist() != list(range(100))
    assert seen.sort().values.tolist() == list(range(100))
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
    assert data.predict_dataloader().dataset is data.test_dataset


def test_all_rows_at_once_and_settings_of_a_part():
    data = Numbers()
    data.setup()
    assert [len(batch) for (batch,) in data.train_dataloader()] == [100]
    assert data.test_dataloader().drop_last
    assert not data.train_dataloader().drop_last


def test_without_validation_there_is_no_loader():
    data = Numbers()
    assert data.val_dataloader() == []
    data.setup()
    assert data.val_dataloader() == []


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_integers(value):
    with pytest.raises(ValueError, match=f"`rows` to be an integer of at least 1, but got {value}"):
        check_integer("rows", value, 1)
