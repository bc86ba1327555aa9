"""Each context restores exactly what it found, also after an exception."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from lightning_trust.core.modes import (
    eval_mode,
    frozen_parameters,
    untouched_batchnorm,
    unused_running_statistics,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.InstanceNorm1d(4, track_running_stats=True)
    )
    net[1].eval()  # the user froze this one
    net[0].weight.requires_grad_(False)
    return net


def modes(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode_restores_mixed_modes(fails):
    net = network()
    before = modes(net)
    assert before == [True, True, False, True, True]
    with suppress(RuntimeError), eval_mode(net):
        assert not any(modes(net))
        if fails:
            raise RuntimeError
    assert modes(net) == before
    with suppress(RuntimeError), eval_mode(net, only=(nn.Dropout,)):
        assert modes(net) == [True, True, False, False, True]
        if fails:
            raise RuntimeError
    assert modes(net) == before


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_parameters_restore_mixed_flags(fails):
    net = network()
    before = [parameter.requires_grad for parameter in net.parameters()]
    assert before == [False, True, True, True]
    # a generator, with a parameter that comes twice
    every = (parameter for parameter in [*net.parameters(), net[0].bias])
    with suppress(RuntimeError), frozen_parameters(every):
        assert not any(parameter.requires_grad for parameter in net.parameters())
        if fails:
            raise RuntimeError
    assert [parameter.requires_grad for parameter in net.parameters()] == before


@pytest.mark.parametrize("fails", [False, True])
def test_untouched_batchnorm_computes_as_ever_and_leaves_no_trace(fails):
    net, twin = network().train(), network().train()
    x = torch.randn(8, 2, 5)
    torch.manual_seed(1)
    expected = twin(x)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    pointers = [buffer.data_ptr() for buffer in net.buffers()]
    torch.manual_seed(1)
    with suppress(RuntimeError), untouched_batchnorm(net):
        assert torch.equal(net(x), expected)
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
        if fails:
            raise RuntimeError
    assert len(before) == 6
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    # in place: DDP and optimizers hold on to the tensors
    assert [buffer.data_ptr() for buffer in net.buffers()] == pointers


def test_untouched_batchnorm_does_not_disturb_a_graph():
    net = network().train()
    x = torch.randn(8, 2, 5)
    with untouched_batchnorm(net):
        loss = net(x).square().sum()
    loss.backward()
    assert net[1].weight.grad is not None


@pytest.mark.parametrize("fails", [False, True])
def test_unused_running_statistics_compute_as_ever_and_touch_no_buffer(fails):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    net[1].momentum = None
    x = torch.randn(5, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with suppress(ZeroDivisionError), unused_running_statistics(net):
        found = net(x)
        # what carries a derivative can be normalised
        torch.func.jvp(net, (x,), (torch.ones_like(x),))
        if fails:
            raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [net[1].track_running_stats, net[2].track_running_stats] == [True, False]
    torch.testing.assert_close(found, net(x))
    assert net[1].num_batches_tracked == 1
    net.eval()
    with unused_running_statistics(net[:2]):
        inside = net[:2](x)
    assert torch.equal(inside, net[:2](x))
