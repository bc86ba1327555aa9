import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_trust.callbacks import ExactResume
from lightning_trust.core.batch import BatchSpec
from lightning_trust.datamodules import ForgetClass, ForgetIndices, ForgetRandom, ForgetSplit
from lightning_trust.datamodules.unlearning.forget_split import ForgetOrder
from tests.conformance import Data, Host, Kill
from tests.two_ranks import QUIET, fit_on_two_ranks, run_on_two_ranks

ROWS = 37
FORGET = (2, 3, 5, 11, 12, 13, 30, 36)
SPLIT = set(FORGET)


class Numbered(Dataset):
    """Row i holds the number i; labels as torchvision lists them."""

    def __init__(self, count=ROWS, transform=None):
        self.targets = [row % 3 for row in range(count)]
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        # six features, as the host of tests/conformance.py takes
        inputs = torch.full((6,), float(row))
        return (inputs if self.transform is None else self.transform(inputs)), self.targets[row]


class NumberedData(pl.LightningDataModule):
    def __init__(self, dataset=None, test=None, **loader):
        super().__init__()
        self.dataset = Numbered() if dataset is None else dataset
        self.test = Numbered(12) if test is None else test
        self.loader = {"batch_size": 5, "shuffle": True, **loader}
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.loader)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=5)


def split_of(feed=None, forget=None, data=None, **loader):
    split = ForgetSplit(data or NumberedData(**loader), forget or ForgetIndices(FORGET), feed)
    split.setup("fit")
    return split


def numbers(batch):
    return batch[0][:, 0].long().tolist()


def served(split):
    """Row numbers by batch, checked against what `rows` and `indices` tell of each."""
    batches = []
    for place, batch in enumerate(split.train_dataloader()):
        found = numbers(batch)
        assert split.indices(place).tolist() == found
        assert split.rows(place).tolist() == [row in SPLIT for row in found]
        assert batch[1].tolist() == [row % 3 for row in found]
        batches.append(found)
    return batches


# -- what training gets ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("feed", ["retain", "forget", "mixed", "forget_then_retain"])
def test_feeds(feed, drop_last, workers):
    split = split_of(feed, num_workers=workers, drop_last=drop_last)
    batches = served(split)
    assert len(batches) == len(split.train_dataloader())
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows))
    expected = {"retain": 29, "forget": 8, "mixed": 37, "forget_then_retain": 37}[feed]
    dropped = {"retain": 4, "forget": 3, "mixed": 2, "forget_then_retain": 7}[feed]
    assert len(rows) == expected - drop_last * dropped
    assert {row in SPLIT for row in rows} == {"retain": {False}, "forget": {True}}.get(feed, {True, False})
    assert all(len(batch) == 5 for batch in batches) or not drop_last


def test_forget_comes_strictly_before_retain_and_no_batch_has_both():
    kinds = [{row in SPLIT for row in batch} for batch in served(split_of("forget_then_retain"))]
    assert kinds == [{True}] * 2 + [{False}] * 6


def test_mixed_batches_have_both():
    kinds = [{row in SPLIT for row in batch} for batch in served(split_of("mixed"))]
    assert {True, False} in kinds


def test_a_segment_smaller_than_a_batch_is_not_dropped():
    split = split_of("forget_then_retain", ForgetIndices((2, 3)), drop_last=True)
    batches = [numbers(batch) for batch in split.train_dataloader()]
    assert sorted(batches[0]) == [2, 3]
    assert len(batches) == len(split.train_dataloader()) == 1 + 35 // 5


def test_order_is_shuffled_by_epoch_and_seed_and_nothing_else():
    def order(epoch=0, seed=0):
        split = ForgetSplit(NumberedData(), ForgetIndices(FORGET), "mixed", seed=seed)
        split.setup("fit")
        loader = split.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [row for batch in loader for row in numbers(batch)]

    first = order()
    torch.manual_seed(8)
    assert order() == first
    assert first != sorted(first)
    assert order(epoch=1) != first
    assert order(seed=1) != first


def test_without_a_feed_it_is_retrain():
    assert split_of().current_feed == "retain"


def test_settings_of_the_users_loader_are_kept():
    def collate(samples):
        return ["mine", torch.stack([inputs for inputs, _ in samples])]

    split = split_of(batch_size=3, collate_fn=collate, timeout=7, num_workers=1, persistent_workers=True)
    for loader in (split.train_dataloader(), split.forget_dataloader()):
        assert (loader.batch_size or loader.batches.batch_size) == 3
        assert loader.collate_fn is collate
        assert (loader.timeout, loader.num_workers) == (7, 1)
    assert split.train_dataloader().persistent_workers


# -- which rows --------------------------------------------------------------------------------------------------------
def test_rows_of_a_batch_that_was_not_served():
    split = split_of()
    with pytest.raises(RuntimeError, match=r"^Expected a batch to have been served before its rows are asked for"):
        split.rows(0)
    next(iter(split.train_dataloader()))
    with pytest.raises(
        MisconfigurationException, match=r"rows of batch 0, .* but got batch_idx=3\. A run that is resumed"
    ):
        split.rows(3)


class CheckRows(Callback):
    """In every training step, and across epochs: the rows that are flagged are those that are in the batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        split = trainer.datamodule
        found = numbers(batch)
        assert split.rows(batch_idx).tolist() == [row in SPLIT for row in found], (batch_idx, found)
        self.batches.append((trainer.current_epoch, batch_idx, found))


class NumberedHost(Host):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] / 37.0, batch[1]), batch_idx)


def fit(split, *callbacks, folder=None, **kwargs):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "devices": 1, "callbacks": list(callbacks)}, **kwargs)
    trainer.fit(NumberedHost(), datamodule=split)
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_in_a_run(workers, drop_last):
    check = CheckRows()
    split = ForgetSplit(NumberedData(num_workers=workers, drop_last=drop_last), ForgetIndices(FORGET), "mixed")
    fit(split, check)
    assert [batch[:2] for batch in check.batches] == [(e, b) for e in range(2) for b in range(8 - drop_last)]
    assert check.batches[0][2] != check.batches[8 - drop_last][2]


def test_rows_while_another_callback_reads_the_training_data():
    class Reads(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            next(iter(trainer.datamodule.train_dataloader()))

    fit(ForgetSplit(NumberedData(), ForgetIndices(FORGET), "mixed"), Reads(), CheckRows())


@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_on_two_ranks(tmp_path, drop_last):
    check = CheckRows()
    split = ForgetSplit(NumberedData(drop_last=drop_last), ForgetIndices(FORGET), "mixed")
    ranks = fit_on_two_ranks(tmp_path, NumberedHost(), split, [check], lambda *_: check.batches, max_epochs=2)
    for epoch in range(2):
        rows = [[row for e, _, found in batches if e == epoch for row in found] for batches in ranks]
        assert len(rows[0]) == len(rows[1]) == (15 if drop_last else 19)
        # 37 rows for two ranks: one is dealt twice
        assert len(set(rows[0] + rows[1])) == len(rows[0] + rows[1]) - (not drop_last)


def resumed(folder, split, *callbacks):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks)})
    trainer.fit(NumberedHost(), datamodule=split, ckpt_path=folder / "last.ckpt")


def killed(folder, split, after):
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        **{**QUIET, "max_epochs": 2, "enable_checkpointing": True, "callbacks": [ExactResume(), saver, Kill(after)]}
    )
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(NumberedHost(), datamodule=split)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after", [3, 11])
def test_rows_after_a_resume_within_an_epoch(tmp_path, after, workers):
    def split():
        return ForgetSplit(NumberedData(num_workers=workers), ForgetIndices(FORGET), "mixed")

    whole, rest = CheckRows(), CheckRows()
    fit(split(), whole)
    killed(tmp_path, split(), after)
    resumed(tmp_path, split(), ExactResume(), rest)
    # the last checkpoint is of the step before
    assert rest.batches == whole.batches[after - 1 :]


def test_resume_within_an_epoch_without_exact_resume_is_refused(tmp_path):
    split = ForgetSplit(NumberedData(), ForgetIndices(FORGET), "mixed")
    killed(tmp_path, split, 3)
    with pytest.raises(MisconfigurationException, match=r"needs `callbacks\.ExactResume`\.$"):
        resumed(tmp_path, split, CheckRows())


def test_resume_with_another_forget_set_is_refused(tmp_path):
    killed(tmp_path, ForgetSplit(NumberedData(), ForgetIndices(FORGET), "mixed"), 3)
    other = ForgetSplit(NumberedData(), ForgetIndices(FORGET[1:]), "mixed")
    with pytest.raises(
        MisconfigurationException,
        match=(
            r"^Expected the forget set of the checkpoint \([0-9a-f]{16}\), but got 7 given rows \([0-9a-f]{16}\)\."
            r" Resume with the same `forget` and the same training set\.$"
        ),
    ):
        resumed(tmp_path, other, ExactResume())


def test_a_checkpoint_is_tested_against_any_forget_set(tmp_path):
    killed(tmp_path, ForgetSplit(NumberedData(), ForgetIndices(FORGET), "mixed"), 3)
    other = ForgetSplit(NumberedData(), ForgetIndices(FORGET[1:]))
    trainer = pl.Trainer(**QUIET)
    trainer.test(NumberedHost(), datamodule=other, ckpt_path=tmp_path / "last.ckpt", verbose=False)


# -- what is measured --------------------------------------------------------------------------------------------------
def test_parts_are_whole_and_in_order():
    split = split_of()
    rows = {
        part: [row for batch in split.part(part) for row in numbers(batch)] for part in ("forget", "retain", "test")
    }
    assert rows == {
        "forget": sorted(FORGET),
        "retain": sorted(set(range(ROWS)) - SPLIT),
        "test": list(range(12)),
    }
    assert split.targets.tolist() == [row % 3 for row in range(ROWS)]


def test_the_forgotten_class_leaves_the_test_set():
    split = split_of(forget=ForgetClass(1))
    assert [row for batch in split.part("test") for row in numbers(batch)] == [row for row in range(12) if row % 3 != 1]
    # the user's own test run is not touched
    assert len(split.test_dataloader().dataset) == 12


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_shards_hold_each_row_once(tmp_path, count):
    def function(rank):
        split = ForgetSplit(NumberedData(), ForgetIndices(FORGET[:count]))
        split.setup("fit")
        return {part: [r for b in split.part(part, shard=True) for r in numbers(b)] for part in ("forget", "retain")}

    first, second = run_on_two_ranks(tmp_path, function)
    assert first["forget"] == sorted(FORGET[:count])[::2]
    assert second["forget"] == sorted(FORGET[:count])[1::2]
    assert sorted(first["retain"] + second["retain"]) == sorted(set(range(ROWS)) - set(FORGET[:count]))


def minus(inputs):
    return -inputs


def plus_half(inputs):
    return inputs + 0.5


@pytest.mark.parametrize("around", ["plain", "subset", "concat", "both"])
def test_eval_transform_takes_the_place_of_the_training_transform_where_rows_are_measured(around):
    plain = Numbered(transform=minus)
    dataset = {
        "plain": lambda: plain,
        "subset": lambda: Subset(plain, range(ROWS)),
        "concat": lambda: ConcatDataset([plain]),
        "both": lambda: Subset(ConcatDataset([Subset(plain, range(ROWS))]), range(ROWS)),
    }[around]()
    split = ForgetSplit(NumberedData(dataset), ForgetIndices(FORGET), eval_transform=plus_half)
    split.setup("fit")
    for loader in (split.forget_dataloader(), split.retain_dataloader()):
        assert all(float(value) % 1 == 0.5 and value > 0 for inputs, _ in loader for value in inputs[:, 0])
    assert all(float(value) <= 0 for inputs, _ in split.train_dataloader() for value in inputs[:, 0])
    assert plain.transform is minus


def test_eval_transform_of_a_dataset_without_transform():
    data = NumberedData(TensorDataset(torch.rand(9, 6), torch.arange(9) % 3))
    split = ForgetSplit(data, ForgetIndices((1,)), eval_transform=minus)
    split.setup("fit")
    with pytest.raises(
        MisconfigurationException,
        match=r"an attribute `transform` that `eval_transform` can take the place of, but TensorDataset has none\.$",
    ):
        split.forget_dataloader()


# -- kinds of data sets ------------------------------------------------------------------------------------------------
class NoTargets(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, row):
        return torch.full((6,), float(row)), row % 3


class Samples(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, row):
        return {"x": torch.full((6,), float(row)), "y": {"fine": torch.tensor(row % 3)}}


KINDS = {
    "list": lambda: Numbered(9),
    "tensors": lambda: TensorDataset(torch.arange(9.0).unsqueeze(1).repeat(1, 6), torch.arange(9) % 3),
    "subset": lambda: Subset(Numbered(30), range(9)),
    "subset of a subset": lambda: Subset(Subset(Numbered(30), list(range(3, 30))), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "concat": lambda: ConcatDataset([Subset(Numbered(30), range(4)), Subset(NoTargets(), [1, 2, 0, 4, 5])]),
    "without targets": NoTargets,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_labels_of(kind):
    split = split_of(forget=ForgetClass(2), data=NumberedData(KINDS[kind]()))
    assert split.targets.tolist() == [row % 3 for row in range(9)] if kind != "concat" else [0, 1, 2, 0, 1, 2, 0, 1, 2]
    labels = [label for _, targets in split.forget_dataloader() for label in targets.tolist()]
    assert labels == [2] * 3
    assert 2 not in [label for _, targets in split.retain_dataloader() for label in targets.tolist()]


def test_samples_that_are_dicts():
    split = ForgetSplit(NumberedData(Samples()), ForgetClass(1), "mixed", batch_spec=BatchSpec("x", "y.fine"))
    split.setup("fit")
    assert split.forget_rows.tolist() == [1, 4, 7]
    for place, batch in enumerate(split.train_dataloader()):
        assert split.rows(place).tolist() == (batch["y"]["fine"] == 1).tolist()


def test_float_labels_are_not_rounded():
    data = NumberedData(TensorDataset(torch.rand(4, 6), torch.tensor([0.0, 1.7, 1.0, 2.0])))
    with pytest.raises(ValueError, match=r"to be integer class labels.* looks for class 1, but got torch\.float32"):
        split_of(forget=ForgetClass(1), data=data)

    class Floats(NoTargets):
        def __getitem__(self, row):
            return torch.zeros(6), row + 0.7

    with pytest.raises(ValueError, match=r"to be integer class labels.* looks for class 1, but got torch\.float32"):
        split_of(forget=ForgetClass(1), data=NumberedData(Floats()))


# -- the user's own ----------------------------------------------------------------------------------------------------
class Hooked(NumberedData):
    calls = ()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.calls += ("before",)
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.calls += ("move",)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class HookedHost(NumberedHost):
    calls = ()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls += ("after",)
        return batch


def test_transfer_hooks_of_data_and_host_are_called():
    data, host = Hooked(), HookedHost()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "limit_train_batches": 2})
    trainer.fit(host, datamodule=ForgetSplit(data, ForgetIndices(FORGET)))
    assert data.calls == ("before", "move") * 2
    assert host.calls == ("after",) * 2


class HostWithEveryHook(HookedHost):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.calls += ("before",)
        return batch


def test_hooks_that_the_data_do_not_bring_stay_the_hosts():
    host = HostWithEveryHook()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "limit_train_batches": 2})
    trainer.fit(host, datamodule=ForgetSplit(NumberedData(), ForgetIndices(FORGET)))
    assert host.calls == ("before", "after") * 2


def test_data_without_validation_is_no_error():
    # NumberedData has no val_dataloader, the host has a validation_step: Lightning skips validation
    trainer = fit(ForgetSplit(NumberedData(), ForgetIndices(FORGET)))
    assert trainer.num_val_batches == []


def test_lightning_gets_validation_test_and_prediction_data_of_the_user():
    split = ForgetSplit(Data(), ForgetRandom(fraction=0.25))
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1})
    trainer.fit(Host(), datamodule=split)
    assert trainer.num_val_batches == [3]
    assert len(trainer.predict(Host(), datamodule=split)) == 3
    assert trainer.test(Host(), datamodule=split, verbose=False)[0]["val_loss"] > 0


def test_whoever_asks_for_an_attribute_of_the_user_finds_it():
    data = NumberedData()
    data.input_space = "a box"
    split = ForgetSplit(data, ForgetIndices(FORGET))
    assert split.input_space == "a box"
    with pytest.raises(AttributeError):
        split.something_else  # noqa: B018


def test_hyperparameters_of_the_user_reach_loggers_and_checkpoints(tmp_path):
    class WithHyperparameters(Data):
        def __init__(self, size: int = 3):
            super().__init__()
            self.save_hyperparameters()

    split = ForgetSplit(WithHyperparameters(4), ForgetRandom(fraction=0.25))
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "logger": logger})
    trainer.fit(Host(), datamodule=split)
    assert logger.experiment.hparams == {"size": 4}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert WithHyperparameters.load_from_checkpoint(tmp_path / "run.ckpt").hparams.size == 4


def test_every_hook_of_the_users_data_is_called_with_the_trainer():
    class Hooks(NumberedData):
        calls = ()

        def prepare_data(self):
            self.calls += (("prepare", self.trainer is not None),)

        def setup(self, stage):
            self.calls += ((stage, self.trainer is not None),)

        def teardown(self, stage):
            self.calls += (("teardown", self.trainer is not None),)

        def on_exception(self, exception):
            self.calls += ((str(exception), self.trainer is not None),)

        def state_dict(self):
            return {"page": 3}

        def load_state_dict(self, state_dict):
            self.calls += ((state_dict["page"], True),)

    data = Hooks()
    trainer = fit(ForgetSplit(data, ForgetIndices(FORGET)))
    assert data.calls == (("prepare", True), ("fit", True), ("teardown", True))

    class Fails(Callback):
        def on_train_start(self, trainer, pl_module):
            raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError):
        fit(split := ForgetSplit(data, ForgetIndices(FORGET)), Fails())
    assert ("oh", True) in data.calls
    split.load_state_dict(split.state_dict())
    assert data.calls[-1] == (3, True)
    assert trainer.global_step == 12


def test_user_data_are_set_up_once_a_stage():
    data = NumberedData()
    split = ForgetSplit(data, ForgetIndices(FORGET))
    split.setup("test")
    for _ in range(2):
        for part in ("forget", "retain", "test"):
            split.part(part)
        assert split.targets is not None
    assert data.stages == ["test", "fit"]


def test_prepare_data_per_node_is_the_users():
    data = NumberedData()
    data.prepare_data_per_node = False
    assert not ForgetSplit(data, ForgetIndices(FORGET)).prepare_data_per_node


def test_pickle_and_deepcopy():
    split = split_of("mixed", data=Hooked())
    for twin in (pickle.loads(pickle.dumps(split)), copy.deepcopy(split)):
        assert [numbers(batch) for batch in twin.train_dataloader()] == [numbers(b) for b in split.train_dataloader()]
        # the hooks are the copy's own
        twin.on_before_batch_transfer(None, 0)
        assert (twin.datamodule.calls, split.datamodule.calls) == (("before",), ())


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_feed():
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected argument `feed` to be one of \['retain', 'forget', 'forget_then_retain', 'mixed'\],"
            r" but got 'all'\.$"
        ),
    ):
        ForgetSplit(Data(), ForgetClass(0), "all")


def test_contradicting_feed():
    split = split_of("retain")
    with pytest.raises(
        MisconfigurationException,
        match=r"^SalUn trains on feed='mixed', but ForgetSplit got feed='retain'\. Leave `feed` out\.$",
    ):
        split.request_feed("mixed", "SalUn")
    split.request_feed("retain", "FineTune")


@pytest.mark.parametrize(
    ("forget", "words"),
    [
        (ForgetIndices(()), "no row"),
        (ForgetIndices(tuple(range(ROWS))), "every row"),
        (ForgetRandom(fraction=0.001), "no row"),
        (ForgetRandom(num=99), "every row"),
    ],
)
def test_empty_and_full_forget_sets(forget, words):
    start = "Expected argument `forget` to leave rows to forget and rows to retain of 37, but got"
    with pytest.raises(ValueError, match=rf"^{start} .*, which is {words}\.$"):
        split_of(forget=forget)


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match=r"ForgetRandom\(fraction=None, num=99, seed=1\), which is every row"):
        split_of(forget=ForgetRandom(num=99))


def test_one_class_only_is_every_row():
    with pytest.raises(ValueError, match=r"ForgetClass\(label=0\), which is every row\.$"):
        split_of(forget=ForgetClass(0), data=NumberedData(TensorDataset(torch.rand(4, 6), torch.zeros(4).long())))


def test_training_data_that_cannot_be_split():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(6), 0

    class Several(NumberedData):
        def train_dataloader(self):
            return [super().train_dataloader()]

    class Batched(NumberedData):
        def train_dataloader(self):
            return DataLoader(self.dataset, batch_sampler=[[0, 1], [2, 3]])

    class SeveralTests(NumberedData):
        def test_dataloader(self):
            return [super().test_dataloader()]

    words = r"`NumberedData\.train_dataloader` gave a DataLoader over an IterableDataset"
    with pytest.raises(MisconfigurationException, match=words):
        split_of(data=NumberedData(Stream(), shuffle=False))
    with pytest.raises(MisconfigurationException, match=r"`Several\.train_dataloader` gave list\.$"):
        split_of(data=Several())
    with pytest.raises(MisconfigurationException, match=r"`Batched\.train_dataloader` has a batch sampler and no"):
        split_of(data=Batched()).train_dataloader()
    with pytest.raises(MisconfigurationException, match=r"`SeveralTests\.test_dataloader` gave list\.$"):
        split_of(data=SeveralTests()).part("test")


def test_overfit_batches_would_replace_the_order():
    with pytest.raises(MisconfigurationException, match=r"overfit_batches=2\) would replace it\. Use `limit_train"):
        fit(ForgetSplit(NumberedData(), ForgetIndices(FORGET)), overfit_batches=2)


def test_hash_names_the_rows():
    first = split_of().forget_hash
    assert split_of(forget=ForgetIndices(tuple(reversed(FORGET)))).forget_hash == first
    assert split_of(forget=ForgetIndices(FORGET[1:])).forget_hash != first
    assert split_of(data=NumberedData(Numbered(38))).forget_hash != first


def test_what_a_failed_run_asked_for_does_not_last():
    split = split_of()
    split.request_feed("mixed", "SalUn")
    # no teardown after an exception
    split.setup("fit")
    assert split.current_feed == "retain"


def test_short_ranks_repeat_rows():
    order = ForgetOrder([torch.tensor([4]), torch.arange(5, 10)], seed=0)
    order.num_replicas, order.rank = 4, 3
    assert [len(rows) for rows in order.dealt()] == [1, 2]
    assert order.dealt()[0].tolist() == [4]
    assert len(order) == len(list(order)) == 3
