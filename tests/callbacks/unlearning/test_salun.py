from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.callbacks import OneShotPruning, RandomLabel, SalUn, WeightSaliency
from lightning_trust.core.host import named_parameters
from lightning_trust.datamodules import ForgetClass, ForgetSplit
from tests.conformance import CallbackConformance, Data, Host, assert_equal, forget_random
from tests.two_ranks import QUIET


class TestConformance(CallbackConformance):
    callback = SalUn
    arguments: ClassVar = {"ratio": 0.5}
    wrap_data = staticmethod(forget_random)


def fitted(*callbacks, host=None, data=None, **kwargs):
    host = host or Host(dropout=0.2)
    torch.manual_seed(5)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **kwargs})
    trainer.fit(host, datamodule=data or forget_random(Data()))
    return host


@pytest.mark.parametrize("arguments", [{}, {"mode": "sequential", "alpha": 0.5}, {"exclude_true_label": True}])
def test_ratio_one_is_random_label(arguments):
    first = fitted(RandomLabel(seed=3, **arguments)).state_dict()
    second = fitted(SalUn(1.0, seed=3, **arguments)).state_dict()
    assert_equal(dict(first), dict(second), "weights")
    assert not torch.equal(fitted(SalUn(0.5, seed=3, **arguments)).state_dict()["net.0.weight"], first["net.0.weight"])


def test_it_is_random_label_and_weight_saliency():
    first = fitted(SalUn(0.3, seed=3)).state_dict()
    second = fitted(WeightSaliency(0.3, seed=3), RandomLabel(seed=3)).state_dict()
    assert_equal(dict(first), dict(second), "weights")


class WithBatchNorm(Host):
    def __init__(self):
        super().__init__()
        self.net[2] = torch.nn.BatchNorm1d(16)


@pytest.mark.parametrize("mode", ["mixed", "sequential"])
def test_ratio_zero_leaves_every_weight_bit_for_bit(mode):
    host, before = WithBatchNorm(), WithBatchNorm()
    fitted(SalUn(0.0, mode=mode), host=host)
    for name, value in named_parameters(before).items():
        assert torch.equal(value.view(torch.int32), named_parameters(host)[name].view(torch.int32)), name
    # the running statistics are no weights
    assert not torch.equal(host.net[2].running_mean, before.net[2].running_mean)


def test_pruned_then_saliency():
    """The mask is made of the pruned network, and neither mask gives way."""
    host, before = Host(), Host()
    fitted(pruning := OneShotPruning(0.4), salun := SalUn(0.5), host=host)
    for name, value in named_parameters(host).items():
        start = named_parameters(before)[name]
        if name in pruning.mask:
            assert not value[~pruning.mask[name]].any()
            start = start * pruning.mask[name]
        held = ~salun.mask[name]
        assert torch.equal(value[held], start[held])
    moved = torch.cat([(value != named_parameters(before)[name]).flatten() for name, value in host.named_parameters()])
    assert int(moved.sum()) > 20


def test_a_class_is_forgotten():
    """Of separable classes, one: its accuracy falls, that of the others does not."""
    trained = Host(lr=0.1)
    pl.Trainer(**{**QUIET, "max_epochs": 8}).fit(trained, datamodule=Data())
    split = ForgetSplit(Data(), ForgetClass(1))
    split.setup("fit")

    def accuracy(part):
        hits = [
            (trained(inputs).argmax(1) == targets).float() for inputs, targets in getattr(split, f"{part}_dataloader")()
        ]
        return float(torch.cat(hits).mean())

    assert min(accuracy("forget"), accuracy("retain")) > 0.75
    fitted(SalUn(0.5, exclude_true_label=True), host=trained, data=split, max_epochs=8)
    assert accuracy("forget") < 0.3
    assert accuracy("retain") > 0.75


def test_two_unlearners_and_bad_arguments():
    with pytest.raises(
        MisconfigurationException, match=r"^SalUn and RandomLabel both .*; a run can have one\. Remove one of them from"
    ):
        fitted(SalUn(), RandomLabel())
    with pytest.raises(ValueError, match=r"^Expected argument `ratio` to be .*, but got 1\.5\.$"):
        SalUn(1.5)
    with pytest.raises(ValueError, match=r"^Expected argument `mode` to be 'mixed' or 'sequential', but got 'both'\.$"):
        SalUn(mode="both")
    with pytest.raises(MisconfigurationException, match=r"^SalUn\(alpha=0\.5\) weights the batches of the retain set"):
        SalUn(alpha=0.5)
    with pytest.raises(MisconfigurationException, match=r"^SalUn\(random=True, mask='file'\) has two masks"):
        SalUn(random=True, mask="file")


@pytest.mark.parametrize("network", ["head", "net.9"])
def test_a_network_that_is_not_there(network):
    with pytest.raises(
        ValueError,
        match=rf"^Expected argument `network` to name a sub-module of Host, but got '{network}'\. Close names: 'net",
    ):
        fitted(SalUn(network=network))
