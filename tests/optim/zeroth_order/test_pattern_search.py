"""PatternSearch: its rule written out, what it costs, and where it comes to rest."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trust.optim import PatternSearch

D = 6
_HALF = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
A = _HALF @ _HALF.T / D + 0.5 * torch.eye(D, dtype=torch.float64)
B = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def quadratic(x):
    return 0.5 * x @ A @ x + B @ x


def test_it_converges_on_a_quadratic():
    x = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    optimizer = PatternSearch([x], lr=1.0)
    losses = []
    # not below what rounding of the loss leaves to be told apart
    while optimizer.lengths()[0] > 1e-6:
        assert optimizer.steps_taken < 400
        losses.append(float(optimizer.step(lambda: quadratic(x))))
        assert float(optimizer.last.loss) == losses[-1]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    torch.testing.assert_close(x.detach(), torch.linalg.solve(A, -B), rtol=0.0, atol=1e-5)
    (length,) = optimizer.lengths()
    # where none helped, at twice the length of now, the slope along each is at most half the curvature times it
    assert ((A @ x.detach() + B).abs() <= A.diagonal() * length + 1e-9).all()


def test_the_rule_written_out_and_its_queries():
    x = torch.ones(D, dtype=torch.float64, requires_grad=True)
    optimizer, theta, length = PatternSearch([x], lr=0.5), torch.ones(D, dtype=torch.float64), 0.5
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        return quadratic(x)

    halvings = 0
    for step in range(12):
        calls = 0
        optimizer.step(loss)
        here, queries, improved = quadratic(theta), 1, False
        for i in range(D):
            old = theta[i].clone()
            for sign in (1.0, -1.0):
                theta[i] = old + sign * length
                queries += 1
                trial = quadratic(theta)
                if trial < here:
                    here, improved = trial, True
                    break
                theta[i] = old
        if not improved:
            length, halvings = length / 2.0, halvings + 1
        torch.testing.assert_close(x.detach(), theta, rtol=0.0, atol=1e-12)
        assert optimizer.last.queries == queries
        assert 1 + D <= queries <= 1 + 2 * D
        # the first step asks twice more: whether the loss repeats itself
        assert calls == queries + (2 if step == 0 else 0)
        assert optimizer.lengths() == [length]
    assert halvings > 2


def test_a_network_learns_and_its_loss_never_rises():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    optimizer = PatternSearch(net.parameters(), lr=0.2)
    losses = [float(optimizer.step(lambda: F.cross_entropy(net(x), y))) for _ in range(20)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]


def test_groups_have_lengths_and_the_state_dict_keeps_the_halvings():
    first, second = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss():
        return (first.square() + second.square()).sum()

    optimizer = PatternSearch([{"params": [first]}, {"params": [second], "lr": 4.0}], lr=1.0)
    optimizer.step(loss)
    assert optimizer.lengths() == [0.5, 2.0]
    other = PatternSearch([{"params": [first]}, {"params": [second], "lr": 4.0}], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.lengths() == [0.5, 2.0]


def test_a_length_of_zero_and_a_bad_one():
    x = torch.ones(2, requires_grad=True)
    PatternSearch([x], lr=0.0).step(lambda: x.square().sum())
    assert torch.equal(x.detach(), torch.ones(2))
    with pytest.raises(ValueError, match=r"`lr` .* -1"):
        PatternSearch([x], lr=-1.0)
    with pytest.raises(ValueError, match="Expected the loss to be finite, but got nan at coordinate 0"):
        PatternSearch([x], lr=1.0).step(lambda: torch.where(x == 1.0, x, torch.nan).sum())
    assert torch.equal(x.detach(), torch.ones(2))
