"""Frozen copies stay as they were, and nobody finds them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_trust.core.frozen import FrozenCopy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_a_copy_computes_in_eval_mode_without_a_graph_and_does_not_follow():
    net = network()
    x = torch.randn(6, 3)
    net(x).sum().backward()
    frozen = FrozenCopy(net)
    expected = net.eval()(x).detach()
    net.train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    outputs = frozen(x)
    assert torch.equal(outputs, expected)
    assert not outputs.requires_grad
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.network.parameters())
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in net.parameters())
    assert net.training
    assert torch.equal(frozen(x), expected)


def test_nobody_finds_a_copy_that_a_host_holds():
    class Host(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.teacher = FrozenCopy(self.net)

    host = Host()
    assert all(name.startswith("net.") for name in host.state_dict())
    assert len(list(host.parameters())) == len(list(host.net.parameters()))
    host.train()
    assert not any(module.training for module in host.teacher.network.modules())


def test_weights_come_back_from_a_checkpoint(tmp_path):
    frozen = FrozenCopy(network())
    torch.save(frozen.state_dict(), tmp_path / "teacher.pt")
    other = network()
    nn.init.zeros_(other[0].weight)
    again = FrozenCopy(other)
    again.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    x = torch.randn(6, 3)
    assert torch.equal(again(x), frozen(x))


def test_the_copy_follows_its_inputs_to_their_device():
    frozen = FrozenCopy(network())
    out = frozen(torch.zeros(2, 3, device="meta"))
    assert out.device.type == "meta"
    assert {parameter.device.type for parameter in frozen.network.parameters()} == {"meta"}
    # a network without tensors, and inputs that are no tensors
    assert FrozenCopy(nn.Identity())(3) == 3
