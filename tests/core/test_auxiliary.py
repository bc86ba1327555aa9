"""The optimizer of a method's own: against a plain torch loop, on two ranks, after a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trust.core.auxiliary import AuxiliaryOptimizer
from tests.two_ranks import run_on_two_ranks


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def batch(step: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(step))


def taken(own: nn.Linear, auxiliary: AuxiliaryOptimizer, steps: range, rows: slice = slice(None)) -> None:
    for step in steps:
        auxiliary.scale_lr(1.0 / (1 + step))
        with auxiliary.training():
            auxiliary.step(own(batch(step)[rows]).square().mean())


def by_hand(steps: int) -> nn.Linear:
    own = layer()
    optimizer = sgd(own.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        own(batch(step)).square().mean().backward()
        optimizer.step()
    return own


def assert_equal_weights(own: nn.Linear, other: nn.Linear, **tolerance: float) -> None:
    for first, second in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


@pytest.mark.parametrize("flag", [True, False])
def test_steps_equal_those_of_a_plain_loop_and_leave_flags_and_gradients(flag):
    own = layer().requires_grad_(flag)
    held = torch.ones_like(own.weight)
    own.weight.grad = held
    taken(own, AuxiliaryOptimizer(list(own.parameters()), sgd), range(3))
    assert_equal_weights(own.requires_grad_(True), by_hand(3))
    assert own.weight.grad is held
    assert torch.equal(held, torch.ones_like(held))
    assert own.bias.grad is None


def test_flags_come_back_after_an_exception():
    own = layer().requires_grad_(False)
    auxiliary = AuxiliaryOptimizer(list(own.parameters()), sgd)
    seen = []

    def fail():
        with auxiliary.training():
            seen.append(own.weight.requires_grad)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True]
    assert not own.weight.requires_grad


def test_gradients_of_other_parameters_are_neither_computed_nor_cleared():
    own, other = layer(), layer()
    other.weight.grad = torch.full_like(other.weight, 2.0)
    auxiliary = AuxiliaryOptimizer(list(own.parameters()), sgd)
    auxiliary.step((own.weight * other.weight).sum())
    assert torch.equal(other.weight.grad, torch.full_like(other.weight, 2.0))


def test_parameter_without_part_in_the_loss_only_decays():
    own = layer()
    bias = own.bias.detach().clone()
    AuxiliaryOptimizer(list(own.parameters()), sgd).step(own.weight.sum())
    torch.testing.assert_close(own.bias.detach(), bias * (1.0 - 0.1 * 0.01))


def test_resumed_goes_on_as_uninterrupted(tmp_path):
    whole = layer()
    taken(whole, AuxiliaryOptimizer(list(whole.parameters()), sgd), range(4))
    own = layer()
    auxiliary = AuxiliaryOptimizer(list(own.parameters()), sgd)
    taken(own, auxiliary, range(2))
    torch.save(auxiliary.state_dict(), tmp_path / "state.pt")
    again = AuxiliaryOptimizer(list(own.parameters()), sgd)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    taken(own, again, range(2, 4))
    assert_equal_weights(own, whole)


def test_two_ranks_equal_one_with_the_whole_batch(tmp_path):
    def steps(rank):
        own = layer().requires_grad_(False)
        taken(own, AuxiliaryOptimizer(list(own.parameters()), sgd), range(3), slice(rank, None, 2))
        return own.state_dict()

    first, second = run_on_two_ranks(tmp_path, steps)
    for name, value in by_hand(3).state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0.0, atol=1e-6)


def test_ranks_of_which_one_has_no_gradient_stay_equal(tmp_path):
    def steps(rank):
        own = layer()
        loss = own.weight.sum() + (own.bias.sum() if rank else 0.0)
        AuxiliaryOptimizer(list(own.parameters()), sgd).step(loss)
        return own.state_dict()

    first, second = run_on_two_ranks(tmp_path, steps)
    for name in first:
        assert torch.equal(first[name], second[name])
    assert not torch.allclose(first["bias"], layer().bias * (1.0 - 0.1 * 0.01))


def test_no_parameters():
    with pytest.raises(ValueError, match="`parameters` to hold at least one parameter"):
        AuxiliaryOptimizer([], sgd)
