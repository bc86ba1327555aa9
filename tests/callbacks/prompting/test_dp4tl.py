"""SourcePruning: runs on what a pruner keeps, wherever their data come from."""

from __future__ import annotations

from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.callbacks import SourcePruning
from lightning_trust.datamodules import (
    FeatureMappingPruner,
    LabelMappingPruner,
    PrunedDataModule,
    PruneResult,
    RandomClassPruner,
    RepeatBatches,
)
from tests.conformance import BATCH, CallbackConformance, Data, Host, rows
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks


class Target(pl.LightningDataModule):
    """Images of the source's classes 2 and 0, with labels of their own; made in ``setup``, prepared once."""

    prepared = 0

    def prepare_data(self):
        type(self).prepared += 1

    def setup(self, stage):
        inputs, labels = rows(30, seed=8).tensors
        kept = labels != 1
        self.dataset = TensorDataset(inputs[kept], torch.zeros(int(kept.sum())))

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=7, shuffle=True, drop_last=True)


class Surrogate(nn.Module):
    """Sees the three classes of the source where they are: inputs 0, 1 and 2."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x[:, :3]


HERE = "tests.callbacks.prompting.test_dp4tl"


class TestSourcePruning(CallbackConformance):
    callback = SourcePruning
    arguments: ClassVar = {
        "pruner": {"class_path": "LabelMappingPruner", "init_args": {"num_source": 3, "keep_ratio": 0.67}},
        "surrogate": {"class_path": f"{HERE}.Surrogate"},
        "target": {"class_path": f"{HERE}.Target"},
    }

    def arguments_in(self, folder):
        return {**self.arguments, "coreset": None if folder is None else str(folder / "coreset.safetensors")}

    def test_fit_is_that_on_the_kept_rows(self, tmp_path):
        host, callback, trainer = self.fitted(tmp_path)
        assert callback.result.kept_classes.tolist() == [0, 2]
        assert trainer.global_step == 2 * 4
        plain = pl.Trainer(**QUIET, max_epochs=2)
        other = Host()
        plain.fit(other, PrunedDataModule(Data(), callback.result))
        assert_equal_states(host.state_dict(), other.state_dict())

    def test_the_choice_is_a_file(self, tmp_path):
        host, callback, _ = self.fitted(tmp_path)
        path = tmp_path / "coreset.safetensors"
        assert PruneResult.load(path).hash == callback.result.hash
        reading = SourcePruning(coreset=str(path))
        again = Host()
        pl.Trainer(**QUIET, max_epochs=2, callbacks=[reading]).fit(again, Data())
        assert reading.result.hash == callback.result.hash
        assert_equal_states(again.state_dict(), host.state_dict())

    def test_a_dry_run_writes_no_file(self, tmp_path):
        self.fitted(tmp_path, fast_dev_run=True)
        assert not list(tmp_path.glob("*.safetensors"))


def pruning(ratio=0.67, **kwargs):
    return SourcePruning(LabelMappingPruner(3, ratio), Surrogate(), target=Target(), **kwargs)


def fit(host, data, *callbacks, epochs=1, **kwargs):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": epochs, "callbacks": list(callbacks), **kwargs})
    if isinstance(data, dict):
        trainer.fit(host, **data)
    else:
        trainer.fit(host, data)
    return trainer


class Own(Host):
    """Brings its data, which it makes in ``setup``."""

    def setup(self, stage):
        self.train_rows = rows()

    def train_dataloader(self):
        return DataLoader(self.train_rows, batch_size=BATCH)

    def val_dataloader(self):
        return DataLoader(rows(24, seed=4), batch_size=BATCH)


# -- where data come from ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("kind", ["datamodule", "host", "loaders"])
def test_data_of_every_kind_are_pruned(kind, sanity):
    seen = {"train": [], "val": []}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["train"].append(batch[1])

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["val"].append(batch[1])

    data = {
        "datamodule": Data(),
        "host": {},
        "loaders": {
            "train_dataloaders": DataLoader(rows(), batch_size=BATCH),
            "val_dataloaders": [DataLoader(rows(24, seed=4), batch_size=BATCH)],
        },
    }[kind]
    host = Own() if kind == "host" else Host()
    trainer = fit(host, data, pruning(), Watch(), num_sanity_val_steps=sanity)
    assert trainer.global_step == 4
    assert all(torch.cat(labels).unique().tolist() == [0, 2] for labels in seen.values())
    expected = Host()
    fit(expected, PrunedDataModule(Data(), pruning_result()))
    assert_equal_states(host.state_dict(), expected.state_dict())


def pruning_result():
    target = Target()
    target.setup("fit")
    return LabelMappingPruner(3, 0.67).fit(Surrogate(), rows(), target.train_dataloader())


@pytest.mark.parametrize("fails", [False, True])
def test_data_modules_are_given_back(fails):
    class Fails(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            if fails:
                raise ZeroDivisionError

    data = Data()
    own = lambda: DataLoader(rows(), batch_size=4)  # noqa: E731 - a user's patch
    data.train_dataloader = own
    before = set(data.__dict__)
    try:
        trainer = fit(Host(), data, pruning(), Fails())
        assert trainer.global_step == 8
    except ZeroDivisionError:
        assert fails
    assert data.train_dataloader is own
    assert "val_dataloader" not in data.__dict__
    assert set(data.__dict__) - before <= {"trainer"}
    assert len(data.train_dataloader().dataset) == 48


def test_schedules_in_steps_see_the_shorter_run():
    class Asks(Own):
        def configure_optimizers(self):
            self.steps = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    for data in (Data(), {}):
        host = Asks()
        fit(host, data, pruning(), epochs=3)
        assert host.steps == 3 * 4


def test_a_run_of_another_ratio_chooses_anew():
    callback, data = pruning(), Data()
    fit(Host(), data, callback)
    assert len(callback.result.kept_indices) == 32
    callback.pruner = LabelMappingPruner(3, 0.34)
    assert fit(Host(), data, callback).global_step == 2
    assert len(callback.result.kept_indices) == 16


def test_remapped_labels_train_a_smaller_head():
    host = Host()
    host.net[3] = nn.Linear(16, 2)
    fit(host, Data(), pruning(remap_labels=True))


def test_other_stages_see_all_classes():
    host = Host()
    trainer = fit(host, Data(), pruning())
    counts = []
    host.validation_step = lambda batch, batch_idx: counts.append(len(batch[0]))
    trainer.validate(host, Data(), verbose=False)
    assert sum(counts) == 24


# -- the surrogate -----------------------------------------------------------------------------------------------------
def test_weights_of_the_surrogate_come_from_a_file(tmp_path):
    """Of the surrogate itself, or of a module that holds it."""
    negative = Surrogate(-1.0)
    holder = pl.LightningModule()
    holder.network = negative
    kept = []
    for state in (negative.state_dict(), {"state_dict": holder.state_dict()}):
        torch.save(state, tmp_path / "surrogate.ckpt")
        callback = pruning(0.34, checkpoint=str(tmp_path / "surrogate.ckpt"))
        fit(Host(), Data(), callback)
        assert callback.surrogate.scale == -1.0
        kept.append(callback.result.kept_classes.tolist())
    # it sees in everything what it is least like
    assert kept[0] == kept[1] == [1]


def test_the_surrogate_of_features_is_any_network():
    torch.manual_seed(0)
    callback = SourcePruning(
        FeatureMappingPruner(0.67), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), target=Target()
    )
    fit(Host(), Data(), callback)
    assert callback.result.class_scores.sum() == 20


def test_random_classes_need_neither(tmp_path):
    callback = SourcePruning(RandomClassPruner(0.67, seed=1))
    fit(Host(), Data(), callback)
    assert len(callback.result.kept_classes) == 2


# -- resuming ----------------------------------------------------------------------------------------------------------
def test_resuming_with_another_choice_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    first = pruning()
    fit(Host(), Data(), first).save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["SourcePruning"]
    assert torch.equal(state["kept_indices"], first.result.kept_indices)
    assert state["source_hash"] == first.result.source_hash

    def resumed(callback, data=None, host=None):
        trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[callback])
        trainer.fit(host or Host(), data or Data(), ckpt_path=path)
        return trainer

    class Other(Data):
        def train_dataloader(self):
            inputs, labels = rows().tensors
            return DataLoader(TensorDataset(inputs, labels.flip(0)), batch_size=BATCH)

    assert resumed(pruning()).global_step == 8
    for callback, data in ((pruning(0.34), None), (pruning(remap_labels=True), None), (pruning(), Other())):
        with pytest.raises(MisconfigurationException, match=f"the choice of the checkpoint .{first.result.hash}"):
            resumed(callback, data)


# -- ranks -------------------------------------------------------------------------------------------------------------
def test_ranks_choose_what_one_chooses(tmp_path):
    Target.prepared = 0
    callback = pruning(coreset=str(tmp_path / "coreset.safetensors"))
    ranks = fit_on_two_ranks(
        tmp_path / "ranks",
        Host(),
        Data(batch_size=4),
        [callback],
        lambda *_: (callback.result.kept_indices, callback.result.class_scores, Target.prepared),
        max_epochs=1,
    )
    alone = pruning_result()
    for kept, scores, _ in ranks:
        assert torch.equal(kept, alone.kept_indices)
        assert torch.equal(scores, alone.class_scores)
    assert [prepared for _, _, prepared in ranks] == [1, 0]
    assert PruneResult.load(tmp_path / "coreset.safetensors").hash == alone.hash


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MisconfigurationException, match="`pruner` to choose, or `coreset` to read"):
        SourcePruning()
    with pytest.raises(MisconfigurationException, match="LabelMappingPruner needs argument `surrogate`"):
        SourcePruning(LabelMappingPruner(), target=Target())
    with pytest.raises(MisconfigurationException, match="LabelMappingPruner needs argument `target`"):
        SourcePruning(LabelMappingPruner(), Surrogate())
    with pytest.raises(MisconfigurationException, match="`checkpoint` is for a `surrogate`"):
        SourcePruning(RandomClassPruner(), checkpoint="a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"`checkpoint` of SourcePruning to be a file, but got 'a.ckpt'"):
        fit(Host(), Data(), pruning(checkpoint="a.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        fit(Host(), Data(), SourcePruning(coreset=str(tmp_path / "none.safetensors")))


def test_data_that_cannot_be_pruned_are_refused_before_training(tmp_path):
    with pytest.raises(MisconfigurationException, match="SourcePruning makes plain DataLoaders anew, but got a Repeat"):
        fit(Host(), RepeatBatches(Data(), 2), pruning())
    with pytest.raises(MisconfigurationException, match=r"overfit_batches=2\) would take others"):
        fit(Host(), Data(), pruning(), overfit_batches=2)
    several = Target()
    several.train_dataloader = lambda: [DataLoader(rows())]
    with pytest.raises(
        MisconfigurationException, match=r"one DataLoader of the target, .*Target.train_dataloader` gave"
    ):
        fit(Host(), Data(), SourcePruning(LabelMappingPruner(3), Surrogate(), target=several))
    path = pruning_result().save(tmp_path / "coreset.safetensors")

    class Shorter(Data):
        def train_dataloader(self):
            return DataLoader(rows(45), batch_size=BATCH)

    with pytest.raises(MisconfigurationException, match="Expected the source from which rows were chosen"):
        fit(Host(), Shorter(), SourcePruning(coreset=str(path)))
