from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.callbacks import FineTune, L1Sparse
from lightning_trust.datamodules import ForgetIndices, ForgetSplit
from tests.conformance import CallbackConformance, Host, forget_random
from tests.two_ranks import QUIET


class TestConformance(CallbackConformance):
    callback = L1Sparse
    arguments: ClassVar = {"alpha": 0.01}
    wrap_data = staticmethod(forget_random)

    def test_alpha_zero_is_fine_tuning_bit_for_bit(self, tmp_path):
        states = []
        for callback in (FineTune(), L1Sparse(alpha=0.0), L1Sparse(alpha=0.01)):
            host = Host()
            self.trainer(tmp_path, [callback]).fit(host, self.data())
            states.append(host.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])

    def test_the_logged_loss_is_the_hosts_own(self, tmp_path):
        # the first loss is taken at equal weights, whatever the penalty
        losses = []
        for alpha in (0.0, 0.5):
            trainer = self.trainer(tmp_path, [L1Sparse(alpha)], max_epochs=1, limit_train_batches=1)
            trainer.fit(Host(), self.data())
            losses.append(float(trainer.callback_metrics["train_loss"]))
        assert losses[0] == losses[1]


class Plane(pl.LightningModule):
    """Two weights and a bias; the loss is linear in them, so that its gradient is (1, 2) and 3 everywhere."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[0.7, 0.0]]))
            self.net.bias.fill_(-0.2)

    def training_step(self, batch, batch_idx):
        return self.net.weight @ torch.tensor([1.0, 2.0]) + 3.0 * self.net.bias

    def configure_optimizers(self):
        # the weights stay where they are
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Gradients(Callback):
    """What the optimizer gets, by epoch and step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        weight, bias = pl_module.net.weight.grad.flatten().tolist(), pl_module.net.bias.grad.item()
        self.seen.append((trainer.current_epoch, [*weight, bias]))


class PlaneData(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(7, 2), torch.zeros(7).long()), batch_size=2)


def gradients(callback, epochs, **kwargs):
    seen = Gradients()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": epochs, "callbacks": [callback, seen], **kwargs})
    trainer.fit(Plane(), ForgetSplit(PlaneData(), ForgetIndices((0,))))
    return seen.seen


def test_hand_gradient():
    # alpha_e sign(theta) on top of (1, 2, 3); nothing where theta is zero
    for epoch, found in gradients(L1Sparse(alpha=0.5), 4):
        added = 0.5 * (1 - epoch / 4)
        assert found == pytest.approx([1.0 + added, 2.0, 3.0 - added], abs=1e-6)


def test_the_coefficient_starts_at_alpha_and_is_half_in_the_middle():
    added = {epoch: round(found[0] - 1.0, 6) for epoch, found in gradients(L1Sparse(alpha=0.5), 10)}
    assert added[0] == 0.5
    assert added[5] == 0.25
    assert added[9] == 0.05


def test_last_epochs_without_the_penalty():
    added = {epoch: round(found[0] - 1.0, 6) for epoch, found in gradients(L1Sparse(alpha=0.5, no_l1_epochs=2), 4)}
    assert added == {0: 0.5, 1: 0.25, 2: 0.0, 3: 0.0}


def test_added_once_an_optimizer_step_however_many_batches_it_accumulates():
    found = gradients(L1Sparse(alpha=0.5, schedule="constant"), 1, accumulate_grad_batches=3)
    assert len(found) == 1
    assert found[0][1] == pytest.approx([1.5, 2.0, 2.5])


def test_constant_needs_no_number_of_epochs():
    found = gradients(L1Sparse(alpha=0.5, schedule="constant"), -1, max_steps=9)
    assert [epoch for epoch, _ in found] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(values == pytest.approx([1.5, 2.0, 2.5]) for _, values in found)


@pytest.mark.parametrize("arguments", [{}, {"schedule": "linear_growth"}, {"schedule": "constant", "no_l1_epochs": 1}])
def test_a_changing_schedule_needs_the_number_of_epochs(arguments):
    with pytest.raises(
        MisconfigurationException,
        match=(
            r"^L1Sparse\(schedule='[a-z_]+', no_l1_epochs=[01]\) changes with the epochs, but the Trainer has"
            r" max_epochs=-1\. Set `max_epochs`, or take schedule='constant' without `no_l1_epochs`\.$"
        ),
    ):
        gradients(L1Sparse(**arguments), -1, max_steps=3)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^Expected argument `alpha` to be at least 0, but got -0\.1\.$"):
        L1Sparse(alpha=-0.1)
    with pytest.raises(ValueError, match=r"^Expected argument `alpha` to be at least 0, but got nan\.$"):
        L1Sparse(alpha=float("nan"))
    with pytest.raises(ValueError, match=r"^Expected argument `no_l1_epochs` to be at least 0, but got -1\.$"):
        L1Sparse(no_l1_epochs=-1)
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected argument `schedule` to be 'linear_decay', 'constant' or 'linear_growth', but got 'cosine'\.$"
        ),
    ):
        L1Sparse(schedule="cosine")
    with pytest.raises(
        ValueError,
        match=r"^Expected argument `no_l1_epochs` of L1Sparse to be at most max_epochs \(2\), but got 3\.$",
    ):
        gradients(L1Sparse(no_l1_epochs=3), 2)
