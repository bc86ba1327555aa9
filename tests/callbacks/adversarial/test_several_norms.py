"""AverageOf and ExtremeNormTraining: means of gradients, how often a norm is drawn, errors by hand, bad input."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_trust.attacks import FGSM, PGD
from lightning_trust.callbacks import AdversarialTraining, AverageOf, ExtremeNormTraining
from lightning_trust.core.schedules import LinearWarmup
from tests.callbacks.adversarial.test_adversarial_training import Images, fit, gradients_of, images, in_a_box
from tests.conformance import CallbackConformance

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


def test_errors_are_those_of_the_batches_that_met_the_norm():
    class Watch(ExtremeNormTraining):
        seen: ClassVar[list] = []

        def prepare(self, host, batch, ctx):
            crafted = super().prepare(host, batch, ctx)
            alone = self.attacks[self._norm_of(ctx)](host.net, *batch)
            assert torch.equal(crafted[0], alone)
            wrong = (host.net.eval()(alone).argmax(1) != batch[1]).sum().item()
            host.net.train()
            self.seen.append((self._norm_of(ctx), wrong, len(alone)))
            return crafted

    callback = Watch(balls(), seed=2)
    fit(Images(batch_norm=True), [callback], batches=8, data=DataLoader(images(40), batch_size=5))
    for place, error in enumerate(callback.errors):
        own = [(wrong, rows) for norm, wrong, rows in callback.seen if norm == place]
        assert own
        assert error == sum(wrong for wrong, _ in own) / sum(rows for _, rows in own)


def test_norm_without_a_batch_keeps_its_error():
    callback = ExtremeNormTraining(balls(), seed=2)
    fit(Images(), [callback], batches=1)
    assert sorted(callback.errors)[1] == 1.0 > sorted(callback.errors)[0]


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
