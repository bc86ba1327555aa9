"""Schedules: their values, the edges of their pieces, and what they refuse."""

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_trust.core.schedules import Cosine, LinearWarmup, Product, Schedule, Steps


@pytest.mark.parametrize(
    ("epochs", "value"), [(-1.0, 2.0), (0.0, 2.0), (1.0, 3.0), (3.999, 5.999), (4.0, 6.0), (9.0, 6.0)]
)
def test_warm_up_is_a_line_and_then_constant(epochs, value):
    assert LinearWarmup(2.0, 6.0, epochs=4).value_at(epochs) == pytest.approx(value)


@pytest.mark.parametrize(
    ("epochs", "value"), [(0.0, 1.0), (1.999, 1.0), (2.0, 0.1), (4.999, 0.1), (5.0, 0.01), (99.0, 0.01)]
)
def test_steps_change_at_their_milestones(epochs, value):
    assert Steps([1.0, 0.1, 0.01], milestones=[2, 5]).value_at(epochs) == value


def test_product_of_a_warm_up_and_steps():
    rate = Product([LinearWarmup(0.0, 1.0, epochs=4), Steps([0.2, 0.02], milestones=[6])])
    assert [rate.value_at(epoch) for epoch in (0, 2, 4, 6)] == pytest.approx([0.0, 0.1, 0.2, 0.02])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearWarmup(0.0, 1.0, epochs=0.0), "`epochs` to be positive, but got 0"),
        (lambda: LinearWarmup(0.0, 1.0, epochs=float("nan")), "`epochs` to be positive, but got nan"),
        (lambda: Steps([1.0], milestones=[1]), "one value more than there are milestones, but got 1 and 1"),
        (lambda: Steps([1.0, 2.0, 3.0], milestones=[2, 2]), r"`milestones` to ascend, but got \[2, 2\]"),
        (lambda: Product([]), "`schedules` to hold at least one schedule, but got none"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_yaml_builds_them_by_their_short_names():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rate", type=Schedule)
    parts = [
        {"class_path": "LinearWarmup", "init_args": {"start": 0.0, "end": 1.0, "epochs": 5}},
        {"class_path": "Steps", "init_args": {"values": [1.0, 0.1], "milestones": [75]}},
    ]
    config = parser.parse_object({"rate": {"class_path": "Product", "init_args": {"schedules": parts}}})
    rate = parser.instantiate(config).rate
    assert rate == Product([LinearWarmup(0.0, 1.0, 5), Steps([1.0, 0.1], [75])])


def test_cosine_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.1)
    for epoch in range(8):
        assert Cosine(0.5, 0.1, epochs=7).value_at(epoch) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()
    with pytest.raises(ValueError, match="`epochs` to be positive, but got 0"):
        Cosine(1.0, 0.0, epochs=0)
