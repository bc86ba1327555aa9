from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.callbacks import ExactResume, FineTune, RandomLabel
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.step import StepTransform
from lightning_trust.datamodules import ForgetRandom, ForgetSplit
from tests.conformance import CallbackConformance, Data, Host, Kill, forget_random
from tests.two_ranks import QUIET, fit_on_two_ranks

ROWS, CLASSES = 60, 4


class TestConformance(CallbackConformance):
    callback = RandomLabel
    arguments: ClassVar = {"mode": "sequential", "alpha": 0.5}
    wrap_data = staticmethod(forget_random)


class TestMixedConformance(TestConformance):
    arguments: ClassVar = {"exclude_true_label": True}


# -- which labels the host gets ----------------------------------------------------------------------------------------
class NumberedData(pl.LightningDataModule):
    """Row i holds the number i and the label i mod 4."""

    def __init__(self, count=ROWS, targets=None, **loader):
        super().__init__()
        self.targets = torch.arange(count) % CLASSES if targets is None else targets
        self.loader = {"batch_size": 8, **loader}

    def train_dataloader(self):
        inputs = torch.arange(float(len(self.targets))).unsqueeze(1)
        return DataLoader(TensorDataset(inputs, self.targets), **self.loader)


class Records(pl.LightningModule):
    """Notes row, label, epoch and whether the loss that is optimised is scaled."""

    def __init__(self, outputs=CLASSES):
        super().__init__()
        self.net = nn.Linear(1, outputs)
        self.seen = []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        rows = inputs[:, 0].long().tolist()
        self.seen.append((self.current_epoch, batch_idx, dict(zip(rows, targets.tolist(), strict=True))))
        return F.cross_entropy(self.net(inputs / ROWS), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def labels(self, epoch):
        return {row: label for e, _, found in self.seen if e == epoch for row, label in found.items()}


def split_of(data=None, fraction=0.5, **kwargs):
    return ForgetSplit(data or NumberedData(), ForgetRandom(fraction=fraction), **kwargs)


def run(callback, split=None, host=None, *others, **kwargs):
    host = host or Records()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [callback, *others], **kwargs})
    trainer.fit(host, datamodule=split or split_of())
    return host


def forgotten(count=ROWS, fraction=0.5):
    return set(ForgetRandom(fraction=fraction).rows(count, lambda: torch.empty(0)).tolist())


@pytest.mark.parametrize("mode", ["mixed", "sequential"])
def test_only_the_rows_to_be_forgotten_get_other_labels(mode):
    host = run(RandomLabel(mode=mode, seed=1))
    for epoch in range(2):
        labels = host.labels(epoch)
        assert sorted(labels) == list(range(ROWS))
        changed = {row for row, label in labels.items() if label != row % CLASSES}
        assert changed <= forgotten()
        # three of four draws are another class
        assert 14 <= len(changed) <= 29


def test_labels_are_drawn_anew_every_epoch_and_by_seed():
    host = run(RandomLabel(seed=1))
    assert host.labels(0) != host.labels(1)
    assert run(RandomLabel(seed=1)).labels(0) == host.labels(0)
    assert run(RandomLabel(seed=2)).labels(0) != host.labels(0)


def test_the_order_of_the_rows_does_not_matter():
    host = run(RandomLabel(seed=1))
    assert run(RandomLabel(seed=1), split_of(seed=7)).labels(1) == host.labels(1)
    assert run(RandomLabel(seed=1), split_of(NumberedData(batch_size=3))).labels(1) == host.labels(1)
    assert run(RandomLabel(seed=1, mode="sequential")).labels(1) == host.labels(1)


def test_labels_do_not_come_from_the_global_generator():
    class Draws(Callback):
        def on_train_batch_start(self, *_):
            torch.rand(3)

    assert run(RandomLabel(seed=1), None, None, Draws()).labels(1) == run(RandomLabel(seed=1)).labels(1)


def test_seed_everything_seeds_the_labels():
    found = []
    for seed in (5, 5, 6):
        pl.seed_everything(seed, verbose=False)
        found.append(run(RandomLabel()).labels(0))
    assert found[0] == found[1] != found[2]


def test_the_true_label_is_never_drawn_where_it_is_excluded():
    host = run(RandomLabel(exclude_true_label=True, seed=3), max_epochs=4)
    for epoch in range(4):
        assert all((label != row % CLASSES) == (row in forgotten()) for row, label in host.labels(epoch).items())


def test_labels_are_uniform_over_the_classes():
    host = run(RandomLabel(seed=4), max_epochs=40)
    counts = torch.zeros(CLASSES)
    for epoch in range(40):
        for row, label in host.labels(epoch).items():
            counts[label] += row in forgotten()
    expected = 40 * len(forgotten()) / CLASSES
    # 16.3 is the 99.9 % point of chi-square with 3 degrees of freedom
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


@pytest.mark.parametrize("mode", ["mixed", "sequential"])
def test_two_ranks_draw_the_labels_of_one(tmp_path, mode):
    whole = run(RandomLabel(mode=mode, seed=1))
    host = Records()
    parts = fit_on_two_ranks(
        tmp_path, host, split_of(), [RandomLabel(mode=mode, seed=1)], lambda _, module: module.seen, max_epochs=2
    )
    for epoch in range(2):
        found = {}
        for seen in parts:
            found |= {row: label for e, _, labels in seen if e == epoch for row, label in labels.items()}
        assert found == whole.labels(epoch)


@pytest.mark.parametrize("mode", ["mixed", "sequential"])
def test_a_resumed_run_draws_the_labels_of_the_whole(tmp_path, mode):
    whole = run(RandomLabel(mode=mode, seed=1))
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0)
    with pytest.raises(RuntimeError, match="killed"):
        run(RandomLabel(mode=mode, seed=1), None, None, ExactResume(), saver, Kill(6), enable_checkpointing=True)
    host = Records()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [RandomLabel(mode=mode, seed=1), ExactResume()]})
    trainer.fit(host, datamodule=split_of(), ckpt_path=tmp_path / "last.ckpt")
    assert host.seen == whole.seen[5:]


def test_sequential_has_all_batches_to_forget_first():
    host = run(RandomLabel(mode="sequential"))
    for epoch in range(2):
        kinds = [{row in forgotten() for row in rows} for e, _, rows in host.seen if e == epoch]
        assert kinds == [{True}] * 4 + [{False}] * 4


# -- the weight of the retain loss -------------------------------------------------------------------------------------
class Norms(Callback):
    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(sum(p.grad.square().sum() for p in pl_module.parameters()).sqrt()))


class Frozen(Records):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_alpha_scales_the_retain_steps_only():
    found = []
    for alpha in (1.0, 0.25):
        torch.manual_seed(2)
        run(RandomLabel(mode="sequential", alpha=alpha, seed=1), None, Frozen(), norms := Norms(), max_epochs=1)
        found.append(torch.tensor(norms.norms))
    ratio = found[1] / found[0]
    torch.testing.assert_close(ratio, torch.tensor([1.0] * 4 + [0.25] * 4))


def test_alpha_in_mixed_mode():
    with pytest.raises(
        MisconfigurationException,
        match=r"^RandomLabel\(alpha=0\.5\) weights the batches of the retain set, but mode='mixed' has rows of both",
    ):
        RandomLabel(alpha=0.5)


# -- hosts and batches -------------------------------------------------------------------------------------------------
class DictBatches(NumberedData):
    def train_dataloader(self):
        samples = [{"x": torch.tensor([float(row)]), "y": int(label)} for row, label in enumerate(self.targets)]
        return DataLoader(samples, **self.loader)


class DictHost(Records):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step((batch["x"], batch["y"]), batch_idx), "more": 1}


def test_batches_that_are_dicts():
    spec = BatchSpec("x", "y")
    host = run(RandomLabel(seed=1, batch_spec=spec), split_of(DictBatches(), batch_spec=spec), DictHost())
    assert host.labels(1) == run(RandomLabel(seed=1)).labels(1)


def test_the_users_batch_is_left_as_it_was():
    kept = []

    class Keeps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(dict(zip(batch[0][:, 0].long().tolist(), batch[1].tolist(), strict=True)))

    run(RandomLabel(), None, None, Keeps())
    assert all(label == row % CLASSES for rows in kept for row, label in rows.items())


def test_num_classes_where_the_network_puts_out_more():
    host = run(RandomLabel(num_classes=CLASSES, seed=1), None, Records(outputs=9))
    assert host.labels(0) == run(RandomLabel(seed=1)).labels(0)
    more = run(RandomLabel(seed=1), None, Records(outputs=9)).labels(0)
    assert max(more.values()) > CLASSES


def test_counting_classes_leaves_training_as_it_is(tmp_path):
    """Modes and random state, which a host with dropout would show."""
    states = []
    for callback in (FineTune(), RandomLabel(num_classes=3), RandomLabel()):
        host, split = Host(dropout=0.4), forget_random(Data())
        torch.manual_seed(3)
        run(callback, split, host, state := StateAtStart())
        states.append(state.found)
    assert states[0] == states[1] == states[2]
    assert all(states[0][1])


class StateAtStart(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.found = torch.get_rng_state().tolist(), [module.training for module in pl_module.modules()]


class NoTensor(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (NoTensor(1, CLASSES), "a dict"),
        (nn.Sequential(nn.Linear(1, CLASSES), nn.Unflatten(1, (2, 2))), r"torch\.float32 of shape \(8, 2, 2\)"),
        (nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)), r"torch\.float32 of shape \(8,\)"),
    ],
)
def test_networks_that_put_out_no_logits(network, found):
    host = Records()
    host.net = network
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected the network to put out logits of shape \(N, K\), because RandomLabel classifies with them, but"
            rf" got {found}\. Name the part of the host that gives logits with `network`\.$"
        ),
    ):
        run(RandomLabel(), None, host)
    assert host.seen == []


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.rand(ROWS), r"but got torch\.float32 of shape \(8,\)\.$"),
        (torch.zeros(ROWS, 2).long(), r"but got torch\.int64 of shape \(8, 2\)\.$"),
        (
            torch.full((ROWS,), 4),
            r"classes in \[0, 4\), of which RandomLabel draws others, but got classes from 4 to 4\.$",
        ),
        (torch.full((ROWS,), -100), r"classes in \[0, 4\), .* but got classes from -100 to -100\.$"),
    ],
)
def test_targets_that_are_no_classes(targets, words):
    host = Records()
    with pytest.raises(ValueError, match=r"^Expected the targets of a batch to be .*" + words):
        run(RandomLabel(), split_of(NumberedData(targets=targets)), host)
    assert host.seen == []


def test_a_host_without_a_loss():
    class NoStep(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, CLASSES)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return []

    class NoLoss(Records):
        def training_step(self, batch, batch_idx):
            return {"error": super().training_step(batch, batch_idx)}

    weighted = RandomLabel(mode="sequential", alpha=0.5)
    # Lightning itself refuses a host without the step before any callback is asked
    with pytest.raises(MisconfigurationException, match=r"`training_step\(\)`"):
        run(weighted, None, NoStep())
    with pytest.raises(
        MisconfigurationException,
        match=(
            r"^Expected `NoLoss\.training_step` to return a loss tensor or a dict with the key 'loss', because"
            r" RandomLabel works on the loss, but got a dict with keys \['error'\]\.$"
        ),
    ):
        run(weighted, None, NoLoss())


def test_two_that_replace_the_loss():
    first, second = (
        type(name, (StepTransform,), {"replaces_loss": True, "loss": lambda self, host, step, batch, ctx: 0.0})()
        for name in ("First", "Second")
    )
    with pytest.raises(
        MisconfigurationException,
        match=r"^First and Second both want to replace the loss of the host; a run can have one\. Remove one of",
    ):
        run(RandomLabel(), None, None, first, second)


def test_contradicting_feed():
    with pytest.raises(
        MisconfigurationException,
        match=r"^RandomLabel trains on feed='mixed', but ForgetSplit got feed='forget_then_retain'\. Leave `feed` out",
    ):
        run(RandomLabel(), split_of(feed="forget_then_retain"))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^Expected argument `mode` to be 'mixed' or 'sequential', but got 'both'\.$"):
        RandomLabel(mode="both")
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"^Expected argument `alpha` to be positive, but got {alpha}\.$"):
            RandomLabel(mode="sequential", alpha=alpha)
    with pytest.raises(ValueError, match=r"^Expected argument `num_classes` to be at least 2, but got 1\.$"):
        RandomLabel(num_classes=1)
