"""AWP: the gradient is that at the perturbed weights, which come back bit for bit."""

from __future__ import annotations

import copy
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.attacks import PGD
from lightning_trust.callbacks import AWP, AdversarialTraining
from lightning_trust.core.step import HostCallback
from tests.callbacks.adversarial.test_adversarial_training import Images, fit, images
from tests.conformance import CallbackConformance


class TestAWP(CallbackConformance):
    callback = AWP
    arguments: ClassVar = {"gamma": 0.05}
    # a perturbation scaled to the layer's norm divides by the gradient's: rounding grows
    tolerance: ClassVar[float] = 1e-5


class Keep(pl.Callback):
    """What the optimizer is about to use, and the weights it will move."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def perturbed_by_hand(net, loss, gamma):
    """w + gamma |w| g / |g| for every weight of more than one dimension."""
    gradients = torch.autograd.grad(loss(net), list(net.parameters()))
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for parameter, own, gradient in zip(moved.parameters(), net.parameters(), gradients, strict=True):
            if parameter.ndim > 1:
                parameter.add_(gamma * own.norm() * gradient / gradient.norm())
    return moved


@pytest.mark.parametrize("order", ["before", "after"])
def test_gradient_is_taken_at_the_worst_weights_nearby(order):
    host, keep = Images(), Keep()
    twin = copy.deepcopy(host)
    training = AdversarialTraining(PGD(eps=0.1, steps=2), "trades", seed=3)
    callbacks = [AWP(gamma=0.02), training] if order == "before" else [training, AWP(gamma=0.02)]
    fit(host, [*callbacks, keep], batches=1)
    x, y = (column[:8] for column in images().tensors)
    adversarial = training.attack(twin.net, x, y, draws=training.random.samples(8, "attack", 0))

    def loss(net):
        p, q = net(x).log_softmax(1), net(adversarial).log_softmax(1)
        return F.cross_entropy(net(x), y) + 6.0 * (p.exp() * (p - q)).sum(1).mean()

    moved = perturbed_by_hand(twin.net, loss, 0.02)
    expected = torch.autograd.grad(loss(moved), list(moved.parameters()))
    for (name, parameter), gradient in zip(twin.named_parameters(), expected, strict=True):
        torch.testing.assert_close(keep.gradients[name], gradient, rtol=1e-3, atol=1e-5)
        # the weights are back before the optimizer moves them
        assert torch.equal(keep.weights[name], parameter)
    assert not torch.allclose(expected[0], torch.autograd.grad(loss(twin.net), twin.net[0].weight)[0], rtol=1e-2)


def test_batchnorm_statistics_move_as_without_it():
    counted = [fit(Images(batch_norm=True), callbacks)[0].net[1] for callbacks in ([], [AWP(gamma=0.0)], [AWP()])]
    assert [layer.num_batches_tracked.item() for layer in counted] == [3, 3, 3]
    first = [fit(Images(batch_norm=True), callbacks, batches=1)[0].net[1] for callbacks in ([], [AWP(gamma=1e-9)])]
    torch.testing.assert_close(first[0].running_mean, first[1].running_mean)


def test_without_gamma_or_in_warm_up_nothing_changes():
    plain, _ = fit(Images())
    for callback in (AWP(gamma=0.0), AWP(warmup_epochs=1)):
        ours, _ = fit(Images(), [callback])
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())


def test_weights_come_back_after_an_exception_between_forward_and_backward():
    class Fails(Images):
        def backward(self, loss, *args, **kwargs):
            raise ZeroDivisionError

    host = Fails()
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(ZeroDivisionError):
        fit(host, [AWP(gamma=0.1)])
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


def test_globs_choose_the_weights():
    host, keep = Images(), Keep()
    twin = copy.deepcopy(host)
    fit(host, [AWP(gamma=0.5, parameters=["net.3.*"]), keep], batches=1)
    x, y = (column[:8] for column in images().tensors)
    gradient = torch.autograd.grad(F.cross_entropy(twin.net(x), y), twin.net[3].weight)[0]
    moved = copy.deepcopy(twin.net)
    with torch.no_grad():
        moved[3].weight.add_(0.5 * twin.net[3].weight.norm() * gradient / gradient.norm())
    expected = torch.autograd.grad(F.cross_entropy(moved(x), y), moved[0].weight)[0]
    torch.testing.assert_close(keep.gradients["net.0.weight"], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"`parameters` to fit trained weights .* got \['nett.*'\]. Close names: 'net."
    ):
        fit(Images(), [AWP(parameters=["nett.*"])])


def test_bad_input():
    for arguments in ({"gamma": -0.1}, {"proxy_lr": 0.0}, {"warmup_epochs": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            AWP(**arguments)

    class Source(HostCallback):
        claims = ("gradient_source",)

    with pytest.raises(MisconfigurationException, match="AWP and Source both want to be the source of the gradient"):
        fit(Images(), [AWP(), Source()])
