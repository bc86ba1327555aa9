"""LAMB: against Adam by hand, against timm's where the two are one, and what the formula promises."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.optim import Lamb
from torch import nn

from lightning_trust.optim import LAMB
from tests.core.hosts import Host, loader, trainer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def train(net, optimizer, steps=6, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(9, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (scale * net(inputs).square().mean()).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("bias_correction", [False, True])
def test_adam_is_adam(bias_correction):
    net = network()
    by_hand = copy.deepcopy(net)
    made = train(net, LAMB(net.parameters(), lr=0.01, weight_decay=0.1, adam=True, bias_correction=bias_correction))
    mean = [torch.zeros_like(parameter) for parameter in by_hand.parameters()]
    square = copy.deepcopy(mean)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 7):
        inputs = torch.randn(9, 5, generator=generator, dtype=torch.float64)
        gradients = torch.autograd.grad(by_hand(inputs).square().mean(), list(by_hand.parameters()))
        c1, c2 = (1 - 0.9**t, 1 - 0.999**t) if bias_correction else (1.0, 1.0)
        for m, v, g, w in zip(mean, square, gradients, by_hand.parameters(), strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g**2)
            w.data -= 0.01 * (m / c1 / ((v / c2).sqrt() + 1e-6) + 0.1 * w.data)
    for one, other in zip(made, by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_equals_timm_while_the_weights_are_small(weight_decay, bias_correction):
    net = network()
    other = copy.deepcopy(net)
    ours = LAMB(net.parameters(), lr=0.01, weight_decay=weight_decay, bias_correction=bias_correction)
    theirs = Lamb(
        other.parameters(),
        lr=0.01,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        trust_clip=False,
        max_grad_norm=None,
        always_adapt=True,
    )
    assert all(parameter.norm() < 10 for parameter in net.parameters())
    for one, two in zip(train(net, ours), train(other, theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_step_is_the_same_for_a_gradient_a_thousand_times_as_large():
    net = network()
    other = copy.deepcopy(net)
    plain = train(net, LAMB(net.parameters(), eps=0.0, weight_decay=0.0))
    large = train(other, LAMB(other.parameters(), eps=0.0, weight_decay=0.0), scale=1000.0)
    for one, two in zip(plain, large, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("norm", "length"), [(0.5, 0.5), (10.0, 10.0), (37.0, 10.0), (0.01, 0.2)])
def test_length_of_a_step_is_that_of_the_weights_clamped(norm, length):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(weight * norm / weight.norm())
    before = weight.detach().clone()
    weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    LAMB([weight], lr=0.3, trust_clip=(0.2, 10.0)).step()
    assert (weight - before).norm().item() == pytest.approx(0.3 * length, rel=1e-5)


def test_zero_norms_take_the_plain_step():
    weight, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    weight.grad, still.grad = torch.ones(3), torch.zeros(3)
    LAMB([weight, still], lr=0.1, eps=0.0, weight_decay=0.0).step()
    # m / sqrt(v) = 0.1 / sqrt(0.001)
    torch.testing.assert_close(weight.data, torch.full((3,), -0.1 * 0.1 / 0.001**0.5))
    assert torch.equal(still.data, torch.ones(3))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_nan_gradient_is_not_hidden(eps):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, torch.nan, 1.0])
    LAMB([weight], lr=0.1, eps=eps).step()
    assert weight.isnan().any()


def test_sparse_gradient_moves_nothing():
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 3, sparse=True)
    dense.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"LAMB needs dense gradients.*shape \(4, 3\) has a sparse one"):
        LAMB([dense, table.weight]).step()
    assert torch.equal(dense.data, torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"`lr` to be a number in \[0, inf\), but got -1.0"),
        ({"lr": float("nan")}, "`lr`"),
        ({"betas": (1.0, 0.9)}, r"`betas\[0\]` to be a number in \[0, 1\), but got 1.0"),
        ({"betas": (0.9, -0.1)}, r"`betas\[1\]`"),
        ({"eps": -1e-8}, "`eps`"),
        ({"weight_decay": -0.1}, "`weight_decay`"),
        ({"trust_clip": (10.0, 0.0)}, r"`trust_clip` .* but got \(10.0, 0.0\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        LAMB([nn.Parameter(torch.ones(1))], **arguments)


def test_run_of_lightning_resumed_equals_uninterrupted(tmp_path):
    def run(folder, epochs, **kwargs):
        host = Host(optimizer=lambda parameters: LAMB(parameters, lr=0.05, bias_correction=True))
        saver = ModelCheckpoint(dirpath=folder, filename="last")
        made = trainer(folder, saver, max_epochs=epochs, enable_checkpointing=True, gradient_clip_val=0.5)
        made.fit(host, loader(), **kwargs)
        return host, made

    whole, _ = run(tmp_path / "whole", 2)
    run(tmp_path / "half", 1)
    resumed, made = run(tmp_path / "half", 2, ckpt_path=str(tmp_path / "half" / "last.ckpt"))
    assert made.optimizers[0].param_groups[0]["trust_clip"] == (0.0, 10.0)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_command_line_builds_it_by_its_short_name(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    arguments = ["--optimizer=LAMB", "--optimizer.lr=0.2", "--optimizer.trust_clip=[0.0, 5.0]"]
    cli = LightningCLI(
        Plain, pl.LightningDataModule, run=False, args=[*arguments, f"--trainer.default_root_dir={tmp_path}"]
    )
    optimizer = cli.model.configure_optimizers()
    assert isinstance(optimizer, LAMB)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.param_groups[0]["trust_clip"] == (0.0, 5.0)


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
