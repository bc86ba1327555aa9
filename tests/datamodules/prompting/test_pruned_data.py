"""Pruned data sets, loaders and data modules."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_trust.core.batch import BatchSpec
from lightning_trust.datamodules import (
    FashionMNIST,
    ImageRows,
    PrunedDataModule,
    PrunedDataset,
    RandomClassPruner,
    remap_labels,
)
from lightning_trust.datamodules.rows import dataset_targets
from tests.conformance import CLASSES, ROWS, Data, Host, rows
from tests.two_ranks import QUIET, assert_equal_states


def result_of(ratio=0.67, dataset=None):
    return RandomClassPruner(ratio, seed=1).fit(None, dataset or rows())


# -- labels ------------------------------------------------------------------------------------------------------------
def test_remapping_is_a_bijection_and_inverts():
    kept = torch.tensor([1, 4, 5, 9])
    labels = kept[torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))]
    new = remap_labels(labels, kept)
    assert torch.equal(kept[new], labels)
    assert sorted(set(new.tolist())) == [0, 1, 2, 3]
    for strange in (0, 6, 10):
        with pytest.raises(ValueError, match=f"of the 4 classes that are kept, but got {strange}"):
            remap_labels(torch.tensor([4, strange]), kept)


# -- the data set ------------------------------------------------------------------------------------------------------
def test_rows_are_those_of_the_data_set():
    whole = rows()
    pruned = PrunedDataset(whole, [40, 2, 7])
    assert len(pruned) == 3
    for place, row in enumerate([40, 2, 7]):
        assert torch.equal(pruned[place][0], whole[row][0])
        assert torch.equal(pruned.__getitems__([place])[0][0], whole[row][0])
    assert pruned.targets.tolist() == [whole[row][1].item() for row in (40, 2, 7)]


@pytest.mark.parametrize("kind", ["tuple", "dict", "integer labels"])
def test_labels_are_counted_anew_in_samples_and_in_the_list(kind):
    inputs, labels = rows().tensors
    spec = BatchSpec("x", "y") if kind == "dict" else BatchSpec()
    whole = {
        "tuple": TensorDataset(inputs, labels),
        "dict": [{"x": x, "y": y} for x, y in zip(inputs, labels, strict=True)],
        "integer labels": ImageRows(torch.zeros(ROWS, 1, 2, 2, dtype=torch.uint8), labels),
    }[kind]
    kept = (labels != 1).nonzero().flatten()
    pruned = PrunedDataset(whole, kept, {0: 0, 2: 1}, spec)
    expected = [0 if labels[row] == 0 else 1 for row in kept]
    assert pruned.targets.tolist() == dataset_targets(pruned, spec).tolist() == expected
    assert [int(spec.targets_of(pruned[place])) for place in range(len(pruned))] == expected
    (batch,) = DataLoader(pruned, batch_size=len(pruned))
    assert spec.targets_of(batch).tolist() == expected
    assert spec.targets_of(batch).dtype == torch.int64
    if kind == "dict":
        # the user's rows are not written to
        assert whole[2]["y"] == 2


def test_bad_rows_and_labels():
    for indices in ([0, 0], [-1], [ROWS]):
        with pytest.raises(ValueError, match=r"`indices` to be numbers in \[0, 48\), each once"):
            PrunedDataset(rows(), indices)
    with pytest.raises(ValueError, match="`label_map` to have the label 2, which a row has"):
        _ = PrunedDataset(rows(), [2], {0: 0})[0]


# -- the data module ---------------------------------------------------------------------------------------------------
def trained(data, epochs=2):
    torch.manual_seed(3)
    host = Host(dropout=0.3)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs)
    trainer.fit(host, data)
    return host, trainer


def test_keeping_all_trains_bit_by_bit_as_without():
    pruned, _ = trained(PrunedDataModule(Data(shuffle=True), result_of(1.0)))
    assert_equal_states(pruned.state_dict(), trained(Data(shuffle=True))[0].state_dict())


def test_loaders_have_the_kept_classes_and_the_users_settings():
    result = result_of()
    data = PrunedDataModule(Data(shuffle=True), result)
    train, val = data.train_dataloader(), data.val_dataloader()
    assert sorted(train.dataset.indices.tolist()) == result.kept_indices.tolist()
    assert set(val.dataset.targets.tolist()) == set(result.kept_classes.tolist())
    assert len(val.dataset) == 16
    assert (train.batch_size, type(train.sampler).__name__) == (8, "RandomSampler")
    assert type(val.sampler).__name__ == "SequentialSampler"
    # the test set is the user's own
    assert len(data.test_dataloader().dataset) == 24
    _, trainer = trained(data)
    assert trainer.global_step == 2 * 4


def test_schedules_in_steps_see_the_shorter_run():
    class Asks(Host):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    host = Asks()
    pl.Trainer(**QUIET, max_epochs=3).fit(host, PrunedDataModule(Data(), result_of()))
    assert host.steps == 3 * 4


def test_remapped_labels_fit_a_smaller_head():
    data = PrunedDataModule(Data(), result_of(), remap_labels=True)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert torch.cat([targets for _, targets in loader]).unique().tolist() == [0, 1]


def test_one_with_a_list_of_validation_loaders_and_one_without():
    class Several(Data):
        def val_dataloader(self):
            return [super().val_dataloader()] * 2

    class Without(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(rows(), batch_size=8)

    assert [len(loader.dataset) for loader in PrunedDataModule(Several(), result_of()).val_dataloader()] == [16, 16]
    trained(PrunedDataModule(Without(), result_of()))


def test_distributed_samplers_deal_the_kept_rows():
    class Distributed(Data):
        def train_dataloader(self):
            sampler = DistributedSampler(rows(), 2, 1, shuffle=True, seed=4, drop_last=True)
            return DataLoader(rows(), batch_size=4, sampler=sampler)

    sampler = PrunedDataModule(Distributed(), result_of()).train_dataloader().sampler
    settings = (sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last)
    assert settings == (2, 1, True, 4, True)
    assert len(sampler) == 16


def test_a_file_will_do(tmp_path, monkeypatch):
    result = result_of()
    path = result.save(tmp_path / "coreset.safetensors")
    assert PrunedDataModule(Data(), str(path)).result.hash == result.hash
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PrunedDataModule, "data", skip={"datamodule"})
    config = parser.parse_object({"data": {"result": str(path), "remap_labels": True}})
    assert config.data.result == str(path)
    with pytest.raises(FileNotFoundError):
        PrunedDataModule(Data(), str(tmp_path / "none"))


def test_copies_and_pickles_prune_as_well():
    data = PrunedDataModule(Data(), result_of())
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert len(twin.val_dataloader().dataset) == 16
        assert twin.val_dataloader.__self__ is twin


def test_resuming_with_other_rows_is_refused(tmp_path):
    _, trainer = trained(PrunedDataModule(Data(), result_of()), epochs=1)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    other = RandomClassPruner(0.67, seed=2).fit(None, rows())
    assert other.hash != result_of().hash
    with pytest.raises(MisconfigurationException, match="Expected the kept rows of the checkpoint"):
        pl.Trainer(**QUIET, max_epochs=2).fit(Host(), PrunedDataModule(Data(), other), ckpt_path=path)
    again = pl.Trainer(**QUIET, max_epochs=2)
    again.fit(Host(), PrunedDataModule(Data(), result_of()), ckpt_path=path)
    assert again.global_step == 8
    # a model is measured beside any rows
    pl.Trainer(**QUIET).validate(Host(), PrunedDataModule(Data(), other), ckpt_path=path, verbose=False)


def test_a_real_data_set():
    data = FashionMNIST(train_rows=300, val_rows=100, test_rows=50, augment=True)
    data.prepare_data()
    data.setup("fit")
    result = RandomClassPruner(0.3).fit(None, data.train_dataset)
    pruned = PrunedDataModule(data, result, remap_labels=True)
    _, targets = next(iter(pruned.train_dataloader()))
    assert targets.unique().tolist() == [0, 1, 2]
    assert pruned.input_space is not None


class Broken(Data):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


class OwnLoader(DataLoader):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Stream()), "over an IterableDataset"),
        (lambda: [DataLoader(rows())], "got a list"),
        (lambda: OwnLoader(rows()), "got a OwnLoader"),
        (lambda: DataLoader(rows(), sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)), "got a WeightedRandomSampler"),
        (lambda: DataLoader(rows(), batch_size=None), "batch_size=None"),
        (lambda: DataLoader(rows(), batch_sampler=[[0, 1], [2]]), "a list"),
        (lambda: DataLoader(rows(seed=3, count=45)), "Expected the source from which rows were chosen"),
    ],
)
def test_loaders_that_cannot_be_made_anew(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        PrunedDataModule(Broken(make), result_of()).train_dataloader()


def test_validation_without_a_kept_class():
    class Other(Data):
        def val_dataloader(self):
            inputs, labels = rows().tensors
            gone = next(label for label in range(CLASSES) if label not in result_of().kept_classes.tolist())
            return DataLoader(TensorDataset(inputs[labels == gone], labels[labels == gone]))

    with pytest.raises(MisconfigurationException, match="no row of a kept class in the validation data"):
        PrunedDataModule(Other(), result_of()).val_dataloader()
