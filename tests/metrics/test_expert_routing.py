"""Metrics of routing against NumPy, over batches and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.attacks import PGD
from lightning_trust.metrics import ExpertUtilisation, RouterRobustness
from lightning_trust.nn import SmallCNN, convert_to_moe
from tests.two_ranks import run_on_two_ranks


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(31, 3, generator=generator) for _ in range(2))
    return clean, clean + noise, torch.randint(4, (31,), generator=generator)


def by_hand(scores, targets):
    counts = np.zeros((4, 3), dtype=int)
    for score, target in zip(scores.numpy(), targets.numpy(), strict=True):
        counts[target, score.argmax()] += 1
    share = counts.sum(0) / counts.sum()
    return counts, share, -sum(f * np.log(f) for f in share if f > 0)


def test_utilisation_over_batches_equals_a_loop():
    clean, _, targets = routed()
    metric = ExpertUtilisation(num_experts=3, num_classes=4)
    for rows in (slice(0, 10), slice(10, 10), slice(10, 31)):
        metric.update(clean[rows], targets[rows])
    counts, share, entropy = by_hand(clean, targets)
    found = metric.compute()
    assert found["classes"].tolist() == counts.tolist()
    np.testing.assert_allclose(found["share"], share, rtol=1e-6)
    assert found["entropy"].item() == pytest.approx(entropy, rel=1e-6)


def test_entropy_of_one_expert_alone_is_zero_and_of_all_alike_the_logarithm():
    alone, even = ExpertUtilisation(3, 1), ExpertUtilisation(3, 1)
    alone.update(torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1), torch.zeros(5, dtype=torch.int64))
    even.update(torch.eye(3), torch.zeros(3, dtype=torch.int64))
    assert alone.compute()["entropy"].item() == 0.0
    assert even.compute()["entropy"].item() == pytest.approx(np.log(3), rel=1e-6)


def test_robustness_equals_a_loop():
    clean, moved, _ = routed()
    metric = RouterRobustness()
    metric.update(clean[:7], moved[:7])
    metric.update(clean[7:], moved[7:])
    same = [a.argmax() == b.argmax() for a, b in zip(clean.numpy(), moved.numpy(), strict=True)]
    assert 0.0 < np.mean(same) < 1.0
    assert metric.compute().item() == pytest.approx(np.mean(same))


def test_attack_on_the_router_alone_lowers_its_robustness():
    torch.manual_seed(0)
    network, x = convert_to_moe(SmallCNN(widths=(4, 4))).eval(), torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        # the median image stands on the border
        scores = network.route(x)
        network.router.scores.bias[0] -= (scores[:, 0] - scores[:, 1]).median()
    metrics = []
    for eps in (0.0, 0.3):
        moved = PGD(eps=eps, steps=5)(network.route, x, network.route(x).argmax(1))
        metrics.append(RouterRobustness())
        metrics[-1].update(network.route(x), network.route(moved))
    assert metrics[0].compute() == 1.0
    assert metrics[1].compute() < 1.0


def test_two_ranks_count_all_images(tmp_path):
    clean, moved, targets = routed()

    def measured(rank):
        utilisation, robustness = ExpertUtilisation(3, 4), RouterRobustness()
        utilisation.update(clean[rank::2], targets[rank::2])
        robustness.update(clean[rank::2], moved[rank::2])
        return {**utilisation.compute(), "robustness": robustness.compute()}

    counts, share, _ = by_hand(clean, targets)
    whole = RouterRobustness()
    whole.update(clean, moved)
    for found in run_on_two_ranks(tmp_path, measured):
        assert found["classes"].tolist() == counts.tolist()
        np.testing.assert_allclose(found["share"], share, rtol=1e-6)
        assert found["robustness"] == whole.compute()


def test_bad_input():
    with pytest.raises(ValueError, match="`num_experts` to be a positive integer, but got 0"):
        ExpertUtilisation(num_experts=0)
    with pytest.raises(ValueError, match=r"shapes \(N, 2\) and \(N,\), but got \(4, 3\) and \(4,\)"):
        ExpertUtilisation(2, 4).update(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"classes in \[0, 4\), but got classes from 0 to 4"):
        ExpertUtilisation(2, 4).update(torch.zeros(2, 2), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"one shape \(N, E\), but got \(4, 3\) and \(4, 2\)"):
        RouterRobustness().update(torch.zeros(4, 3), torch.zeros(4, 2))
