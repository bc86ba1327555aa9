"""Attacks of other libraries: stand-ins that follow the two protocols, and the libraries where they are installed."""

from __future__ import annotations

import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.attacks import FGSM, PGD, DeepFool, ExternalAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import check_attack, draws, images, right, small


def fgsm(model, inputs, labels, eps, sign=1.0):
    """One step in the box of width one, with whatever it finds about the model written down."""
    x = inputs.detach().requires_grad_()
    outputs = model(x)
    SEEN.append(
        {
            "training": model.training,
            "inputs": (x.dtype, float(x.detach().min()), float(x.detach().max())),
            "outputs": outputs.dtype,
            "device": next(model.parameters()).device,
            "network": [type(module).__name__ for module in model.modules()],
        }
    )
    model.train()
    model.zero_grad()
    sign *= torch.autograd.grad(F.cross_entropy(outputs, labels, reduction="sum"), x)[0].sign()
    return x.detach() + eps * sign


SEEN: list[dict[str, object]] = []


class Torchattack:
    """Follows the protocol of torchattacks: made with a model, called with inputs and labels."""

    def __init__(self, model, eps=8 / 255):
        self.set_model(model)
        self.eps = eps
        self.sign = 1.0

    def set_model(self, model):
        self.model = model

    def set_device(self, device):
        self.device = torch.device(device)

    def set_mode_targeted_by_label(self, quiet=False):
        self.sign = -1.0

    def __call__(self, inputs, labels):
        return fgsm(self.model, inputs, labels, self.eps, self.sign).clamp(0.0, 1.0)


class Criterion:
    def __init__(self, goal):
        self.goal = goal


class PyTorchModel:
    def __init__(self, model, bounds, device):
        self.model, self.bounds = model, bounds
        assert not model.training


class Foolbox:
    """Follows the protocol of foolbox: made without a model, called with one, a criterion and radii."""

    def __init__(self, rel_stepsize=1.0):
        self.rel_stepsize = rel_stepsize

    def __call__(self, model, inputs, criterion, *, epsilons):
        low, high = model.bounds
        labels, sign = (criterion.goal, -1.0) if isinstance(criterion, Criterion) else (criterion, 1.0)
        found = fgsm(model.model, inputs, labels, epsilons * self.rel_stepsize, sign)
        return found, found.clamp(low, high), None


@pytest.fixture(autouse=True)
def foolbox(monkeypatch, request):
    """A stand-in for the module, where the test is not about the real one."""
    SEEN.clear()
    if "live" not in request.node.name:
        module, criteria = ModuleType("foolbox"), ModuleType("foolbox.criteria")
        module.PyTorchModel, criteria.TargetedMisclassification = PyTorchModel, Criterion
        monkeypatch.setitem(sys.modules, "foolbox", module)
        monkeypatch.setitem(sys.modules, "foolbox.criteria", criteria)


WAYS = {
    "path": lambda eps: ExternalAttack(f"{__name__}.Torchattack", eps=eps),
    "class": lambda eps: ExternalAttack(Torchattack, eps=eps),
    "made": lambda eps: ExternalAttack(Torchattack(nn.Identity()), eps=eps),
    "foolbox-path": lambda eps: ExternalAttack(f"{__name__}.Foolbox", eps=eps),
    "foolbox-class": lambda eps: ExternalAttack(Foolbox, {"rel_stepsize": 1.0}, eps=eps),
    "foolbox-made": lambda eps: ExternalAttack(Foolbox(), eps=eps),
}


@pytest.mark.parametrize("way", WAYS)
def test_invariants(way):
    check_attack(WAYS[way](0.05), atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_same_step_as_here(way):
    net = small()
    x, y = images(12, net)
    torch.testing.assert_close(WAYS[way](0.07)(net, x, y), FGSM(0.07)(net, x, y), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("space", [InputSpace(-1.0, 3.0), InputSpace(0.0, 1.0, mean=(0.4,), std=(0.3,))])
def test_other_boxes_and_normalised_inputs(way, space):
    net = small()
    x, y = images(12, net)
    x = space.from_raw(space.low + (space.high - space.low) * x)
    found = WAYS[way](0.07)(net, x, y, space=space)
    torch.testing.assert_close(found, FGSM(0.07)(net, x, y, space=space), rtol=0.0, atol=2e-6)
    (seen,) = SEEN
    # torchattacks works in a box of width one, foolbox is told the bounds
    low, high = (space.low, space.high) if "foolbox" in way else (0.0, 1.0)
    assert low <= seen["inputs"][1] < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < seen["inputs"][2] <= high


@pytest.mark.parametrize("way", WAYS)
def test_targeted(way):
    net = small()
    x, y = images(12, net)
    goal = (y + 1) % 6
    found = WAYS[way](0.07).replaced(targeted=True)(net, x, y, target=goal)
    torch.testing.assert_close(found, FGSM(0.07, targeted=True)(net, x, y, target=goal), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_attack_sees(way):
    net = small().double().train()
    x, y = images(4, net)
    WAYS[way](0.05)(net, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        WAYS[way](0.05)(net.float(), x.float(), y)
    assert len(SEEN) == 2
    for seen in SEEN:
        assert seen["training"] is False
        assert seen["inputs"][0] == torch.float32
        assert seen["outputs"] == torch.float32
        assert seen["device"] == x.device
        # the network is out of reach
        assert len(seen["network"]) == 1
    assert net.training


def test_an_attack_that_is_made_is_not_changed():
    model = nn.Identity()
    made = Torchattack(model, eps=0.3)
    net = small()
    ExternalAttack(made, eps=0.05, targeted=True)(net, *images(4, net), target=torch.full((4,), 5))
    assert (made.model, made.eps, made.sign) == (model, 0.3, 1.0)
    # without a radius, its own holds
    x, y = images(4, net)
    torch.testing.assert_close(ExternalAttack(made)(net, x, y), FGSM(0.3)(net, x, y), rtol=0.0, atol=1e-6)


class Random(Torchattack):
    """Draws from all three global generators."""

    def __call__(self, inputs, labels):
        number = random.random() + np.random.rand()
        return (inputs + self.eps * (torch.rand_like(inputs) + number) / 3.0).clamp(0.0, 1.0)


def test_random_numbers_come_from_the_draws_and_leave_the_global_ones():
    net = small()
    x, y = images(4, net)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attack = ExternalAttack(Random, eps=0.1)
    first = attack(net, x, y, draws=draws(4, 1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    assert torch.equal(attack(net, x, y, draws=draws(4, 1)), first)
    assert not torch.equal(attack(net, x, y, draws=draws(4, 2)), first)


class Returns(Torchattack):
    """Returns what a test wants."""

    def __call__(self, inputs, labels):
        return self.eps(inputs)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: x[:1], r"inputs of shape \(3, 1, 8, 8\), but got shape \(1, 1, 8, 8\)"),
        (lambda x: None, "inputs of shape .* but got NoneType"),
        (lambda x: x / 0.0 - x / 0.0, "finite inputs, but got NaN"),
        (lambda x: x * 0.0 + 1.1, r"inputs in \[0, 1\], but some lie 0.1 outside"),
    ],
)
def test_results_that_break_a_rule_are_refused(result, words):
    net = small()
    with pytest.raises(ValueError, match=words):
        ExternalAttack(Returns(net, result))(net, *images(3, net))


def test_norm_of_the_result_is_that_of_the_radius():
    net = small()
    with pytest.raises(ValueError, match=r"to stay within eps=0.1 in l2, but it went 0\.\d+ far. Is `norm`"):
        ExternalAttack(Torchattack, eps=0.1, norm="l2")(net, *images(3, net))


class Nested(Torchattack):
    """Made of another attack, which keeps its radius."""

    def __init__(self, model, eps=0.1):
        super().__init__(model, eps)
        self.part = Torchattack(model, eps)


def test_radius_of_a_made_attack_of_attacks_cannot_be_changed():
    net = small()
    x, y = images(3, net)
    with pytest.raises(ValueError, match="Nested is made of attacks that have their radii already"):
        ExternalAttack(Nested(net), eps=0.2)(net, x, y)
    assert ExternalAttack(Nested, eps=0.2)(net, x, y).shape == x.shape


class NoRadius(Torchattack):
    def __init__(self, model):
        self.set_model(model)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ExternalAttack("PGD"), ValueError, "`attack` to be a class path .* but got 'PGD'"),
        (lambda: ExternalAttack(3), ValueError, "`attack` to be a class path .* but got 3"),
        (lambda: ExternalAttack(Foolbox(), {"a": 1}), ValueError, "`arguments` only with a class or its path"),
        (lambda: ExternalAttack(Foolbox, {"eps": 1}, eps=0.1), ValueError, "either as `eps`.* but got both: 0.1 and 1"),
        (lambda: ExternalAttack("no_such_library.PGD"), MisconfigurationException, "Is no_such_library installed"),
        (lambda: ExternalAttack("torch.NoSuchAttack"), MisconfigurationException, "but got 'torch.NoSuchAttack'"),
        (lambda: ExternalAttack(nn.Linear), MisconfigurationException, "`set_model`.*`epsilons`.*but got .*Linear"),
        (lambda: ExternalAttack(NoRadius(None), eps=0.1), ValueError, "NoRadius has no `eps`: expected `eps=None`"),
    ],
)
def test_bad_input(make, error, words):
    net = small()
    with pytest.raises(error, match=words):
        make()(net, *images(2, net))


def test_no_library_is_imported_before_it_is_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    attack = ExternalAttack("torchattacks.PGD", eps=0.1)
    net = small()
    with pytest.raises(MisconfigurationException, match="Is torchattacks installed"):
        attack(net, *images(2, net))


def test_live_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    net = small()
    x, y = images(20, net)
    x = 4.0 * x - 1.0
    y = net(x).argmax(dim=1)
    space = InputSpace(-1.0, 3.0)
    ours = PGD(0.2, step_size=0.08, steps=5, random_start=False)(net, x, y, space=space)
    arguments = {"alpha": 0.02, "steps": 5, "random_start": False}
    by_path = ExternalAttack("torchattacks.PGD", arguments, eps=0.2)
    made = ExternalAttack(torchattacks.PGD(nn.Identity(), **arguments), eps=0.2)
    for attack in (by_path, made):
        found = attack(net, x, y, space=space)
        # a sign of a gradient that vanishes to rounding may go either way
        assert ((found - ours).abs() > 1e-5).float().mean() < 0.01
    result = ExternalAttack("torchattacks.AutoAttack", {"n_classes": 6}, eps=0.02)(net, *images(20, net))
    assert norm_of(result - images(20, net)[0], "linf").max() <= 0.02 + 1e-6
    goal = (y + 1) % 6
    found = ExternalAttack("torchattacks.PGD", {"steps": 40}, eps=2.0, targeted=True)(
        net, x, y, target=goal, space=space
    )
    assert (net(found).argmax(dim=1) == goal).all()


def test_live_foolbox():
    foolbox = pytest.importorskip("foolbox")
    net = small()
    x, y = images(20, net)
    ours = PGD(0.05, step_size=0.02, steps=5, random_start=False)(net, x, y)
    arguments = {"abs_stepsize": 0.02, "steps": 5, "random_start": False}
    for attack in ("foolbox.attacks.LinfPGD", foolbox.attacks.LinfPGD):
        found = ExternalAttack(attack, arguments, eps=0.05)(net, x, y)
        assert ((found - ours).abs() > 1e-5).float().mean() < 0.01
    goal = (y + 1) % 6
    made = ExternalAttack(foolbox.attacks.LinfPGD(steps=40), eps=0.4, targeted=True)
    assert (net(made(net, x, y, target=goal)).argmax(dim=1) == goal).all()
    # one that looks for the smallest perturbation
    smallest = ExternalAttack("foolbox.attacks.L2DeepFoolAttack", norm="l2")(net, x, y)
    assert not right(net, smallest, y).any()
    ratio = norm_of(smallest - x, "l2") / norm_of(DeepFool()(net, x, y) - x, "l2")
    assert ratio.median().item() == pytest.approx(1.0, abs=0.1)
