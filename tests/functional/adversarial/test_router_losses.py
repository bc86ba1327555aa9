"""Losses of a router against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.functional.adversarial import balance_loss, class_mod_router_loss, expert_shares

CLEAN = np.array([[1.0, -0.5], [0.2, 0.7], [-1.0, 3.0]])
MOVED = np.array([[0.3, 0.1], [0.2, -0.4], [-1.5, 2.0]])


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("alpha", "beta"), [(6.0, 6.0), (1.0, 0.0), (0.0, 2.5)])
def test_class_mod_equals_its_formula(alpha, beta):
    targets = np.array([4, 1, 2])
    p, q = softmax(CLEAN), softmax(MOVED)
    cross_entropy = -np.log(p[np.arange(3), targets % 2]).mean()
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    found = class_mod_router_loss(*map(torch.from_numpy, (CLEAN, MOVED, targets)), alpha, beta)
    assert found.item() == pytest.approx(alpha * cross_entropy + beta * divergence, rel=1e-6)


def test_divergence_of_equal_scores_is_zero():
    scores = torch.from_numpy(CLEAN)
    assert class_mod_router_loss(scores, scores, torch.tensor([0, 1, 1]), alpha=0.0).item() == 0.0


def test_balance_equals_its_formula_and_is_smallest_where_all_are_used_alike():
    shares = expert_shares(torch.from_numpy(CLEAN))
    np.testing.assert_allclose(shares, [1 / 3, 2 / 3], rtol=1e-6)
    expected = 2 * (np.array([1 / 3, 2 / 3]) * softmax(CLEAN).mean(axis=0)).sum()
    assert balance_loss(torch.from_numpy(CLEAN), shares).item() == pytest.approx(expected, rel=1e-6)
    even = torch.tensor([[5.0, -5.0], [-5.0, 5.0]])
    assert balance_loss(even, expert_shares(even)).item() == pytest.approx(1.0, rel=1e-6)


def test_balance_pushes_away_from_an_expert_that_is_used_alone():
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.0]], requires_grad=True)
    balance_loss(scores, expert_shares(scores)).backward()
    assert (scores.grad[:, 0] > 0).all()
    assert (scores.grad[:, 1] < 0).all()
