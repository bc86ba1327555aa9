"""PseudoLabeledData and pseudo_labels: what each batch holds, who labels, two ranks, resume, refusals."""

from __future__ import annotations

from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_trust.callbacks import ExactResume
from lightning_trust.core.batch import BatchSpec
from lightning_trust.datamodules import FashionMNIST, PseudoLabeledData, RepeatBatches, pseudo_labels
from lightning_trust.nn import SmallCNN
from tests.conformance import Host, Kill
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks

KNOWN, HIDDEN = 10, 26


class Rows(Dataset):
    """Row i holds i / 128 and a one at its class; hidden rows say nothing that is true about their class."""

    def __init__(self, count, first=0, label=None):
        self.count, self.first, self.label = count, first, label

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        inputs = torch.zeros(6)
        inputs[row % 3], inputs[5] = 2.0, (self.first + row) / 128
        return inputs, row % 3 if self.label is None else self.label


class RowsData(pl.LightningDataModule):
    secret = 42

    def __init__(self, dataset, **loader):
        super().__init__()
        self.dataset = dataset
        self.loader = {"batch_size": 8, "shuffle": True, **loader}
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)

    def teardown(self, stage):
        self.calls.append(f"end {stage.value}")

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.loader)

    def val_dataloader(self):
        return DataLoader(Rows(6), batch_size=3)


class Teacher(nn.Module):
    """Reads the class from where it stands; its sharpness is a parameter."""

    def __init__(self, sharpness=1.0):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.dropout = nn.Dropout(0.9)

    def forward(self, inputs):
        return self.sharpness * self.dropout(inputs[:, :3])


def mixed(teacher=True, **arguments):
    loader = arguments.pop("loader", {})
    source = {"teacher": Teacher() if teacher is True else teacher} if teacher else {}
    return PseudoLabeledData(
        RowsData(Rows(KNOWN), **loader), RowsData(Rows(HIDDEN, 100, label=-7)), **{**source, **arguments}
    )


def numbers(batch):
    return (batch[0][:, 5] * 128).long().tolist()


# -- pseudo_labels -----------------------------------------------------------------------------------------------------
def test_labels_are_those_of_the_softmax():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3
    loader = DataLoader(TensorDataset(logits, torch.zeros(40)), batch_size=7)
    found = pseudo_labels(nn.Identity(), loader, threshold=0.8)
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    assert found.tolist() == [int(row.argmax()) if row.max() >= 0.8 else -1 for row in p]
    assert 0 < (found < 0).sum() < 40
    assert pseudo_labels(nn.Identity(), loader).tolist() == p.argmax(1).tolist()


def test_teacher_is_asked_in_eval_mode_and_left_as_it_was():
    teacher = Teacher().train()
    state = torch.get_rng_state()
    found = pseudo_labels(teacher, [{"x": Rows(1)[0][0][None], "y": None}], batch_spec=BatchSpec("x", "y"))
    assert found.tolist() == [0]
    assert teacher.training
    assert teacher.dropout.training
    assert teacher.sharpness.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 3, 4), r"logits of shape \(B, K\), but got \(2, 3, 4\)"),
        ("words", r"logits of shape \(B, K\), but got str"),
        (torch.full((2, 3), torch.nan), "finite logits"),
    ],
)
def test_outputs_that_are_no_logits(output, message):
    class Odd(nn.Module):
        def forward(self, inputs):
            return output

    with pytest.raises(ValueError, match=message):
        pseudo_labels(Odd(), [torch.zeros(2, 3)])


# -- batches -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("fraction", "known"), [(0.5, 4), (0.25, 6), (0.8, 2)])
def test_each_batch_holds_the_share(fraction, known, workers):
    data = mixed(unlabeled_fraction=fraction, loader={"num_workers": workers})
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == max(-(-KNOWN // known), -(-HIDDEN // (8 - known)))
    for inputs, targets in batches:
        rows = (inputs[:, 5] * 128).long()
        assert (rows < 100).tolist() == [True] * known + [False] * (8 - known)
        # the teacher is right
        assert torch.equal(targets, (rows % 100) % 3)
    served = [row for batch in batches for row in numbers(batch)]
    assert {*served} == {*range(KNOWN), *range(100, 100 + HIDDEN)}
    # no row of the shorter part is served again before all others were
    shorter = [row for row in served if row < 100]
    for start in range(0, len(shorter), KNOWN):
        part = shorter[start : start + KNOWN]
        assert len(part) == len(set(part))


def test_order_is_a_function_of_seed_and_epoch():
    def orders(seed, epochs):
        data = mixed(seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        found = []
        for epoch in epochs:
            torch.rand(3)
            loader.sampler.set_epoch(epoch)
            found.append([numbers(batch) for batch in loader])
        return found

    assert orders(0, [0, 1]) == orders(0, [0, 1])
    first, second, other = *orders(0, [0, 1]), *orders(1, [0])
    assert first != second
    assert first != other


def test_unsure_rows_are_left_out():
    class Sure(Teacher):
        def forward(self, inputs):
            return 50.0 * super().forward(inputs) * (inputs[:, 5:] < 110 / 128)

    data = mixed(teacher=Sure(), threshold=0.9)
    data.setup("fit")
    assert {row for batch in data.train_dataloader() for row in numbers(batch)} == {*range(KNOWN), *range(100, 110)}
    assert (data.pseudo_labels >= 0).tolist() == [True] * 10 + [False] * 16


def test_labels_in_place_of_a_teacher(tmp_path):
    labels = torch.arange(HIDDEN) % 2
    labels[5] = -1
    torch.save(labels, tmp_path / "labels.pt")
    for given in (labels, str(tmp_path / "labels.pt")):
        data = mixed(teacher=False, labels=given)
        data.setup("fit")
        seen = {}
        for batch in data.train_dataloader():
            seen.update(zip(numbers(batch), batch[1].tolist(), strict=True))
        assert {row - 100: label for row, label in seen.items() if row >= 100} == {
            row: row % 2 for row in range(HIDDEN) if row != 5
        }


def test_checkpoint_of_the_teacher(tmp_path):
    torch.save({"state_dict": Teacher(-1.0).state_dict()}, tmp_path / "teacher.ckpt")
    data = mixed(teacher_checkpoint=str(tmp_path / "teacher.ckpt"))
    data.setup("fit")
    assert all(label != row % 3 for row, label in enumerate(data.pseudo_labels.tolist()))
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match="`teacher_checkpoint` does not fit .* the weights of Teacher, but got another architecture"
    ):
        mixed(teacher_checkpoint=str(tmp_path / "other.ckpt")).setup("fit")


@pytest.mark.parametrize("hidden", [torch.zeros(5, 2), TensorDataset(torch.zeros(5, 2))])
def test_rows_without_any_label(hidden):
    known = TensorDataset(torch.ones(4, 2), torch.tensor([1, 2, 1, 2], dtype=torch.int32))
    labels = torch.tensor([3, 4, 3, 4, 3])
    data = PseudoLabeledData(RowsData(known, batch_size=4), RowsData(hidden), labels=labels)
    data.setup("fit")
    for inputs, targets in data.train_dataloader():
        assert inputs.sum(1).tolist() == [2.0, 2.0, 0.0, 0.0]
        assert targets.dtype == torch.int32
        assert {*targets[:2].tolist()} <= {1, 2}
        assert {*targets[2:].tolist()} <= {3, 4}


def test_eval_transform_is_the_teachers_alone():
    known = FashionMNIST(train_rows=20, val_rows=0, batch_size=8)
    hidden = FashionMNIST(train_rows=40, val_rows=0, augment=True)
    asked = []

    class Looks(nn.Module):
        def forward(self, inputs):
            asked.append(inputs)
            return inputs.flatten(1)[:, :10]

    data = PseudoLabeledData(known, hidden, teacher=Looks(), eval_transform=torch.zeros_like)
    data.setup("fit")
    assert all((inputs == 0).all() for inputs in asked)
    assert sum(len(inputs) for inputs in asked) == 40
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs[4:].sum() > 0
    assert targets[4:].tolist() == [0] * 4
    assert data.input_space == known.input_space


# -- runs --------------------------------------------------------------------------------------------------------------
class Records(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(numbers(batch))


def test_two_ranks_equal_one(tmp_path):
    record = Records()
    found = fit_on_two_ranks(
        tmp_path,
        Host(),
        mixed(loader={"batch_size": 4}),
        [record],
        lambda trainer, module: (record.seen, module.state_dict(), trainer.datamodule.pseudo_labels),
        max_epochs=2,
    )
    (first, weights, labels), (second, others, same) = found
    assert_equal_states(weights, others)
    assert labels.tolist() == same.tolist() == [row % 3 for row in range(HIDDEN)]
    host, alone = Host(), Records()
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[alone])
    trainer.fit(host, datamodule=mixed())
    assert [sorted(one + other) for one, other in zip(first, second, strict=True)] == list(map(sorted, alone.seen))
    assert_equal_states(host.state_dict(), weights, rtol=0.0, atol=1e-6)
    assert alone.seen[: len(alone.seen) // 2] != alone.seen[len(alone.seen) // 2 :]


@pytest.mark.parametrize("after", [3, 9])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, after):
    def run(folder, *extra, **settings):
        torch.manual_seed(11)
        host = Host(dropout=0.3)
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        trainer = pl.Trainer(
            **{**QUIET, "enable_checkpointing": True, "max_epochs": 2}, callbacks=[ExactResume(), saver, *extra]
        )
        trainer.fit(host, datamodule=mixed(), **settings)
        return host

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(after))
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_states(whole.state_dict(), resumed.state_dict())


def test_other_labels_on_resume_are_refused():
    data, other = mixed(), mixed(teacher=Teacher(-1.0))
    data.setup("fit")
    other.setup("fit")
    data.load_state_dict(data.state_dict())
    with pytest.raises(MisconfigurationException, match="Expected the pseudo-labels of the checkpoint"):
        other.load_state_dict(data.state_dict())


def test_both_data_modules_are_prepared_and_torn_down():
    data = mixed()
    pl.Trainer(**QUIET, max_epochs=1).fit(Host(), datamodule=data)
    assert data.datamodule.calls == data.unlabeled.calls == ["prepare", "fit", "end fit"]
    assert data.secret == 42


def test_goes_inside_repeat_batches():
    data = RepeatBatches(mixed(), replays=3)
    data.setup("fit")
    batches = [numbers(batch) for batch in data.train_dataloader()]
    assert batches[0] == batches[1] == batches[2] != batches[3]


def test_yaml_round_trip():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=pl.LightningDataModule)
    small = {"class_path": "FashionMNIST", "init_args": {"train_rows": 20}}
    config = parser.parse_object(
        {
            "data": {
                "class_path": "PseudoLabeledData",
                "init_args": {
                    "datamodule": small,
                    "unlabeled": small,
                    "teacher": {"class_path": "SmallCNN"},
                    "teacher_checkpoint": "teacher.ckpt",
                    "threshold": 0.5,
                },
            }
        }
    )
    data = parser.instantiate(config).data
    assert isinstance(data.teacher, SmallCNN)
    assert data.threshold == 0.5


# -- refusals ----------------------------------------------------------------------------------------------------------
class TestRefusals:
    arguments: ClassVar = {"datamodule": RowsData(Rows(4)), "unlabeled": RowsData(Rows(4))}

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
    def test_fraction(self, fraction):
        with pytest.raises(ValueError, match=rf"`unlabeled_fraction` to be a number in \(0, 1\), but got {fraction}"):
            PseudoLabeledData(**self.arguments, teacher=Teacher(), unlabeled_fraction=fraction)

    def test_fraction_that_leaves_no_row(self):
        data = mixed(unlabeled_fraction=0.01)
        data.setup("fit")
        with pytest.raises(ValueError, match="rows of both kinds in a batch of 8, but got 0.01"):
            data.train_dataloader()

    @pytest.mark.parametrize("threshold", [1.0, -0.1])
    def test_threshold(self, threshold):
        with pytest.raises(ValueError, match=rf"`threshold` to be a probability in \[0, 1\), but got {threshold}"):
            PseudoLabeledData(**self.arguments, teacher=Teacher(), threshold=threshold)

    def test_neither_teacher_nor_labels(self):
        with pytest.raises(MisconfigurationException, match="but got neither"):
            PseudoLabeledData(**self.arguments)
        with pytest.raises(MisconfigurationException, match="but got both"):
            PseudoLabeledData(**self.arguments, teacher=Teacher(), labels=torch.zeros(4))
        with pytest.raises(MisconfigurationException, match="`teacher_checkpoint` holds weights for `teacher`"):
            PseudoLabeledData(**self.arguments, labels=torch.zeros(4), teacher_checkpoint="x.ckpt")

    @pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(4)])
    def test_labels_that_do_not_fit(self, labels):
        with pytest.raises(ValueError, match="`labels` to have an integer for each of the 4 rows"):
            PseudoLabeledData(**self.arguments, labels=labels).setup("fit")

    def test_nobody_is_sure(self):
        with pytest.raises(ValueError, match="`threshold` to leave rows .* but got 0.999, which leaves none of 26"):
            mixed(threshold=0.999).setup("fit")

    def test_iterable_data(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([])

        data = PseudoLabeledData(RowsData(Rows(4)), RowsData(Stream(), shuffle=False), teacher=Teacher())
        with pytest.raises(MisconfigurationException, match="gave a DataLoader over an IterableDataset"):
            data.setup("fit")

    def test_overfit_batches(self):
        trainer = pl.Trainer(**QUIET, overfit_batches=1, max_epochs=1)
        with pytest.raises(MisconfigurationException, match="overfit_batches=1"):
            trainer.fit(Host(), datamodule=mixed())
