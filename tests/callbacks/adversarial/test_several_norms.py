"""AverageOf and ExtremeNormTraining: means of gradients, how often a norm is drawn, errors by hand, bad input."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler

from lightning_trust.attacks import FGSM, PGD
from lightning_trust.callbacks import AdversarialTraining, AverageOf, ExtremeNormTraining
from lightning_trust.core.schedules import LinearWarmup
from tests.callbacks.adversarial.test_adversarial_training import Images, fit, gradients_of, images, in_a_box
from tests.conformance import CallbackConformance
from tests.two_ranks import QUIET, fit_on_two_ranks

COMMON = {"steps": 2, "restarts": 1, "random_start": True, "targeted": False, "loss": "ce", "batch_norm": "eval"}
NORMS = [
    {"class_path": "lightning_trust.attacks.PGD", "init_args": {**COMMON, **own}}
    for own in ({"eps": 0.3, "norm": "linf", "l1_step": "topk"}, {"eps": 1.0, "norm": "l1", "l1_step": "apgd"})
]


class TestAverageOf(CallbackConformance):
    callback = AdversarialTraining
    arguments: ClassVar = {"objective": {"class_path": "AverageOf", "init_args": {"attacks": NORMS}}}
    wrap_data = staticmethod(in_a_box)


class TestExtremeNormTraining(CallbackConformance):
    callback = ExtremeNormTraining
    arguments: ClassVar = {"attacks": NORMS}
    wrap_data = staticmethod(in_a_box)


def balls():
    return [PGD(eps=0.1, steps=3, random_start=False), PGD(eps=0.5, norm="l2", steps=3, random_start=False)]


def test_average_has_the_mean_of_the_gradients():
    host = Images()
    twin = copy.deepcopy(host).double()
    found, (x, y) = gradients_of(host, AdversarialTraining(objective=AverageOf(balls())))
    losses = [F.cross_entropy(twin.net(attack(twin.net, x, y)), y) for attack in balls()]
    (sum(losses) / 2).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_average_of_one_is_that_attack():
    one, _ = fit(Images(), [AdversarialTraining(PGD(eps=0.1, steps=2), seed=3)])
    ours, _ = fit(Images(), [AdversarialTraining(objective=AverageOf([PGD(eps=0.1, steps=2)]), seed=3)])
    for name, value in one.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_norms_are_drawn_by_their_errors():
    callback = ExtremeNormTraining([*balls(), FGSM(eps=0.1)], seed=1)
    callback.errors = [0.6, 0.3, 0.1]
    drawn = [callback._norm_of(SimpleNamespace(total_batch_idx=step)) for step in range(3000)]
    shares = torch.bincount(torch.tensor(drawn)) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03, rtol=0.0)
    callback.errors = [0.0, 0.0, 0.0]
    assert len({callback._norm_of(SimpleNamespace(total_batch_idx=step)) for step in range(30)}) == 3


class Watch(ExtremeNormTraining):
    """Keeps, of each batch, its norm, the samples that the attack alone leaves wrong, and all samples."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.expected = [], []

    def prepare(self, host, batch, ctx):
        # by what has gone before this batch: all as likely until each norm was met
        met = [[entry for entry in self.seen if entry[0] == place] for place in range(len(self.attacks))]
        shares = [sum(wrong for _, wrong, _ in own) / sum(rows for _, _, rows in own) for own in met if own]
        assert self.errors == (shares if len(shares) == len(met) else [1.0] * len(met))
        norm = self._norm_of(ctx)
        crafted = super().prepare(host, batch, ctx)
        alone = self.attacks[norm](host.net, *batch)
        assert torch.equal(crafted[0], alone)
        wrong = (host.net.eval()(alone).argmax(1) != batch[1]).sum().item()
        host.net.train()
        self.seen.append((norm, wrong, len(alone)))
        return crafted


def test_errors_run_on_over_all_batches_that_met_the_norm():
    callback = Watch(balls(), seed=2)
    # two epochs of unequal batches
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(Images(batch_norm=True), DataLoader(images(38), batch_size=5))
    assert len(callback.seen) == 16
    assert {norm for norm, _, _ in callback.seen} == {0, 1}
    assert len(set(callback.errors)) == 2


def test_norms_are_as_likely_until_each_was_met():
    callback = ExtremeNormTraining(balls(), seed=2)
    fit(Images(), [callback], batches=1)
    assert callback.errors == [1.0, 1.0]
    assert sorted(seen > 0 for _, seen in callback._counts) == [False, True]


def test_two_ranks_count_together(tmp_path):
    def counted(trainer, host):
        (callback,) = (each for each in trainer.callbacks if isinstance(each, ExtremeNormTraining))
        return callback.errors, callback._counts

    class Shared(Images):
        """The ranks share every batch of four."""

        def train_dataloader(self):
            return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))

    data = images(24)
    own = [ExtremeNormTraining(balls(), seed=2)]
    found = fit_on_two_ranks(tmp_path, Shared(), None, own, counted, max_epochs=1)
    assert found[0] == found[1]
    alone = ExtremeNormTraining(balls(), seed=2)
    fit(Images(), [alone], batches=6, data=DataLoader(data, batch_size=4))
    assert found[0] == (alone.errors, alone._counts)
    assert sum(seen for _, seen in alone._counts) == 24


def test_bad_input():
    for kind in (AverageOf, ExtremeNormTraining):
        with pytest.raises(ValueError, match="at least one attack"):
            kind([])
        with pytest.raises(ValueError, match="targeted=False"):
            kind([PGD(targeted=True)])
    with pytest.raises(MisconfigurationException, match="AverageOf brings its attacks, but got another one"):
        fit(Images(), [AdversarialTraining(PGD(eps=0.2), AverageOf(balls()))])
    with pytest.raises(MisconfigurationException, match="`eps_schedule` of AdversarialTraining at None"):
        fit(Images(), [AdversarialTraining(objective=AverageOf(balls()), eps_schedule=LinearWarmup(0.0, 0.1, 2))])
    with pytest.raises(ValueError, match="eps"):
        fit(Images(), [ExtremeNormTraining([PGD(eps=0.1), PGD(eps=8.0)])])
