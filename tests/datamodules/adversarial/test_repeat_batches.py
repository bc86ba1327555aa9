"""RepeatBatches: what is served, what stays the user's own, two ranks, a kill between two replays."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from lightning_trust.callbacks import ExactResume, FreeAdversarialTraining
from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules import Digits, FashionMNIST, RepeatBatches
from tests.conformance import Host, Kill
from tests.two_ranks import QUIET, fit_on_two_ranks


class Noisy(Dataset):
    """Row i holds the number i and a random number that an augmentation drew."""

    def __init__(self, count=14):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return torch.cat([torch.tensor([float(row)]), torch.rand(5)]), row % 3


class NoisyData(pl.LightningDataModule):
    secret = 42

    def __init__(self, **loader):
        super().__init__()
        self.loader = {"batch_size": 4, "shuffle": True, **loader}

    def train_dataloader(self):
        return DataLoader(Noisy(), **self.loader)

    def val_dataloader(self):
        return DataLoader(Noisy(6), batch_size=3)


class Records(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())


def fit(host, data, *callbacks, **settings):
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **settings})
    trainer.fit(host, datamodule=data)
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_batch_is_served_in_a_row_and_is_that_of_the_user(workers, drop_last):
    data = NoisyData(num_workers=workers, drop_last=drop_last)
    torch.manual_seed(5)
    plain = list(data.train_dataloader())
    torch.manual_seed(5)
    loader = RepeatBatches(data, replays=3).train_dataloader()
    repeated = list(loader)
    assert len(repeated) == len(loader) == 3 * len(plain)
    for place, (inputs, targets) in enumerate(repeated):
        assert torch.equal(inputs, plain[place // 3][0])
        assert torch.equal(targets, plain[place // 3][1])


def test_second_pass_is_shuffled_anew_with_persistent_workers():
    loader = RepeatBatches(NoisyData(num_workers=1, persistent_workers=True), replays=2).train_dataloader()
    passes = [torch.cat([inputs[:, 0] for inputs, _ in loader]) for _ in range(2)]
    assert not torch.equal(*passes)
    assert torch.equal(passes[0].sort().values, passes[1].sort().values)


def test_host_that_edits_its_batch_gets_the_same_each_time():
    class Edits(Host):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(2.0)
            return super().training_step(batch, batch_idx)

    records = Records()
    fit(Edits(), RepeatBatches(NoisyData(), replays=3), records)
    for place in range(0, len(records.batches), 3):
        first, *others = records.batches[place : place + 3]
        assert all(torch.equal(first, other) for other in others)


def test_run_counts_replays_as_batches():
    trainer = fit(Host(), RepeatBatches(NoisyData(), replays=3), max_epochs=2)
    assert trainer.num_training_batches == 12
    assert trainer.global_step == 24


def test_what_is_the_users_stays_the_users():
    data = RepeatBatches(NoisyData(), replays=2)
    assert data.secret == 42
    assert len(list(data.val_dataloader())) == 2
    assert RepeatBatches(FashionMNIST(normalise=True)).input_space.mean is not None


@pytest.mark.parametrize("sampler", ["Lightning's", "own"])
def test_two_ranks_share_every_batch(tmp_path, sampler):
    """Lightning's distributed sampler reaches the user's loader through ours; a sampler of the user's stays."""

    class Own(NoisyData):
        def train_dataloader(self):
            rows = Noisy()
            order = torch.utils.data.DistributedSampler(rows, shuffle=False)
            return DataLoader(rows, batch_size=4, sampler=order)

    data = RepeatBatches(NoisyData() if sampler == "Lightning's" else Own(), replays=3)
    records = Records()
    served = fit_on_two_ranks(
        tmp_path,
        Host(),
        data,
        [records],
        lambda trainer, _: (trainer.num_training_batches, records.batches),
        max_epochs=1,
    )
    rows = []
    for batches, seen in served:
        assert batches == len(seen) == 6
        for place in (0, 3):
            assert all(torch.equal(seen[place], other) for other in seen[place : place + 3])
        rows.append({int(row) for batch in seen for row in batch[:, 0]})
    assert rows[0].isdisjoint(rows[1])
    assert rows[0] | rows[1] == set(range(14))


def test_loader_of_a_class_of_the_users_stays_one(tmp_path):
    class Special(DataLoader):
        def __init__(self, rows, flavour, **settings):
            super().__init__(rows, **settings)
            self.flavour = flavour

    class SpecialData(NoisyData):
        def train_dataloader(self):
            return Special(Noisy(), "salt", batch_size=4)

    def found(trainer, _):
        loader = trainer.train_dataloader
        return isinstance(loader, Special), loader.flavour, len(loader)

    loader = RepeatBatches(SpecialData(), replays=3).train_dataloader()
    assert isinstance(loader, Special)
    assert fit_on_two_ranks(tmp_path, Host(), RepeatBatches(SpecialData(), replays=3), [], found, max_epochs=1) == [
        (True, "salt", 6),
        (True, "salt", 6),
    ]


@pytest.mark.parametrize("after", [4, 14])
def test_killed_between_two_replays_and_resumed_equals_uninterrupted(tmp_path, after):
    def run(folder, *extra, **settings):
        torch.manual_seed(11)
        host = Host(dropout=0.3)
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        trainer = pl.Trainer(
            **{**QUIET, "enable_checkpointing": True, "max_epochs": 2},
            callbacks=[ExactResume(), FreeAdversarialTraining(eps=0.1, space=InputSpace(0.0, 14.0)), saver, *extra],
        )
        trainer.fit(host, datamodule=RepeatBatches(NoisyData(), replays=3), **settings)
        return host

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(after))
    torch.rand(13)
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("replays", [0, -1, 2.0, True])
def test_replays_must_be_a_positive_integer(replays):
    with pytest.raises(ValueError, match=f"`replays` to be an integer of at least 1, but got {replays}"):
        RepeatBatches(Digits(), replays=replays)


def test_several_loaders_are_refused():
    class Several(NoisyData):
        def train_dataloader(self):
            return [super().train_dataloader()] * 2

    with pytest.raises(
        MisconfigurationException, match=r"RepeatBatches wants one DataLoader, but `Several.* gave list"
    ):
        fit(Host(), RepeatBatches(Several()))
