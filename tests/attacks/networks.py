"""Networks and samples that several tests of attacks share, and what every attack must leave alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_trust.attacks import Attack
from lightning_trust.core.randomness import SampleDraws


def small(classes: int = 6, smooth: bool = False) -> nn.Module:
    """A fixed network on images of 8 by 8 pixels."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh() if smooth else nn.ReLU(), nn.Linear(32, classes))
    return net.eval()


def images(rows: int, net: nn.Module, wrong: int = 0) -> tuple[Tensor, Tensor]:
    """Images and the classes that a network gives them; the first few get another."""
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(4)).to(next(net.parameters()).dtype)
    with torch.no_grad():
        outputs = net(x)
    y = outputs.argmax(dim=1)
    y[:wrong] = (y[:wrong] + 1) % outputs.shape[1]
    return x, y


def draws(rows: int, seed: int = 7) -> SampleDraws:
    """Draws of samples that are known by their row."""
    return SampleDraws(torch.arange(rows), seed)


def right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which samples a network gets right."""
    with torch.no_grad():
        return net(x).argmax(dim=1) == y


class Counting(nn.Module):
    """Counts the samples that it is asked about, and wants no gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the network."""
        self.rows += len(x)
        assert not torch.is_grad_enabled()
        return self.net(x)


def check_attack(attack: Attack, rows: int = 12, atol: float = 1e-6) -> None:
    """Assert what holds for every attack: box, finite values, an untouched network, results that go with the sample."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 5)
    )
    net[1].running_mean.normal_()
    net.train()
    net[3].eval()
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net = net.double()
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x[:, :, 0] = 0.0
    with torch.no_grad():
        y = copy.deepcopy(net).eval()(x).argmax(dim=1)
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    found = attack(net, x, y, draws=draws(rows))
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert not found.requires_grad
    assert torch.isfinite(found).all()
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    assert (found != x).any()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    # in another order, in parts, and under inference mode
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(8))
    again = attack(net, x[order], y[order], draws=draws(rows).rows(order))
    torch.testing.assert_close(again, found[order], rtol=0.0, atol=atol)
    parts = attack.replaced(batch_size=5)(net, x, y, draws=draws(rows))
    torch.testing.assert_close(parts, found, rtol=0.0, atol=atol)
    with torch.inference_mode():
        inside = attack(net, x.clone(), y.clone(), draws=draws(rows))
    torch.testing.assert_close(inside, found, rtol=0.0, atol=atol)
