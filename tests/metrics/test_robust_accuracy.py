"""RobustAccuracy: by hand, samples that come twice, and the interval against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_trust.functional.adversarial import wilson_interval
from lightning_trust.metrics import RobustAccuracy


def test_union_is_at_most_the_smallest():
    generator = torch.Generator().manual_seed(0)
    metric = RobustAccuracy(["a", "b", "c"])
    clean = torch.rand(50, generator=generator) < 0.8
    held = torch.rand(50, 3, generator=generator) < 0.7
    metric.update(torch.arange(30), clean[:30], held[:30])
    metric.update(torch.arange(30, 50), clean[30:], held[30:])
    values = metric.compute()
    assert values["union"] <= min(values[name] for name in "abc")
    assert values["a"].item() == pytest.approx((clean & held[:, 0]).float().mean().item())
    assert values["union"].item() == pytest.approx((clean & held.all(dim=1)).float().mean().item())


def test_samples_that_come_twice_count_once():
    metric = RobustAccuracy(["a"])
    metric.update(torch.tensor([3, 1, 3]), torch.tensor([True, False, True]), torch.tensor([[True], [True], [True]]))
    assert metric.compute()["clean"] == 0.5
    assert metric.samples == 2


def test_bad_input():
    for names in ([], ["a", "a"], ["clean"]):
        with pytest.raises(ValueError, match="`attacks`"):
            RobustAccuracy(names)
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(2, 1\)"):
        RobustAccuracy(["a"]).update(torch.arange(2), torch.ones(2).bool(), torch.ones(2, 2).bool())


@pytest.mark.parametrize(("k", "n"), [(0, 10), (45, 50), (500, 500), (313, 1000)])
def test_wilson_interval_is_its_formula(k, n):
    z, p = 1.959963984540054, k / n
    centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(centre + sign * width) / (1 + z * z / n) for sign in (-1, 1)]
    assert wilson_interval(k, n) == pytest.approx(expected, abs=1e-9)


def test_wilson_interval_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="successes <= samples"):
        wilson_interval(3, 2)
