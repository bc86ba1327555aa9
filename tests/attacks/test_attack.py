"""All attacks: budgets, what they leave alone, closed forms on linear models, randomness by sample, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_trust.attacks import APGD, FAB, FGSM, MIFGSM, PGD, RFGSM, APGDTargeted, AutoAttack, FastFGSM, Square
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial import norm_of

EPS = {"linf": 0.1, "l2": 0.8, "l1": 4.0}
GRADIENT = [
    FGSM(eps=0.1),
    FGSM(eps=0.8, norm="l2"),
    RFGSM(eps=0.1, steps=2),
    FastFGSM(eps=0.1),
    MIFGSM(eps=0.1, steps=3),
    *(PGD(eps=EPS[norm], steps=4, norm=norm) for norm in EPS),
    PGD(eps=4.0, steps=4, norm="l1", l1_step="apgd"),
    PGD(eps=0.1, steps=3, restarts=3),
    PGD(eps=0.1, steps=3, loss="kl", random_start="gaussian"),
    PGD(eps=0.1, steps=3, loss="dlr"),
    PGD(eps=0.1, steps=3, loss="margin", batch_size=3),
    *(APGD(eps=EPS[norm], steps=8, norm=norm) for norm in EPS),
    APGDTargeted(eps=0.1, steps=6, n_target_classes=2),
    *(FAB(eps=EPS[norm], steps=6, norm=norm) for norm in EPS),
]
SEARCH = [*(Square(eps=EPS[norm], n_queries=40, norm=norm) for norm in EPS)]
name_of = lambda attack: f"{type(attack).__name__}-{attack.norm}"  # noqa: E731


def network(batch_norm: bool = True) -> nn.Module:
    torch.manual_seed(2)
    norm = [nn.BatchNorm2d(6)] if batch_norm else []
    net = nn.Sequential(nn.Conv2d(1, 6, 3), *norm, nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(216, 5))
    return net.train()


def batch(rows: int = 8):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 5


def draws(rows: int = 8) -> SampleDraws:
    return SampleDraws(torch.arange(rows), seed=7)


@pytest.mark.parametrize("attack", [*GRADIENT, *SEARCH], ids=name_of)
def test_budget_and_box_hold_and_nothing_else_changes(attack):
    net, (x, y) = network(), batch()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[-1].bias.requires_grad_(False)
    net[3].eval()
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    random = torch.get_rng_state()
    kept = x.clone()
    found = attack(net, x, y, draws=draws())
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert found.shape == x.shape
    assert not found.requires_grad
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    if not isinstance(attack, FAB):  # looks for the smallest perturbation
        assert (norm_of(found - x, attack.norm) <= attack.eps + 1e-5).all()
    assert (found != x).any()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == [True] * 5 + [False]
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in list(net.parameters())[1:])


@pytest.mark.parametrize("attack", [*GRADIENT, *SEARCH], ids=name_of)
def test_permuting_the_batch_permutes_the_result(attack):
    net, (x, y) = network().double(), batch()
    x, order = x.double(), torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    found = attack(net, x, y, draws=draws())
    again = attack(net, x[order], y[order], draws=draws().rows(order))
    torch.testing.assert_close(again, found[order], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("attack", GRADIENT[:6], ids=name_of)
def test_normalised_inputs_give_the_raw_result(attack):
    net, (x, y) = network(), batch()
    mean, std = 0.4, 0.3

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, raw):
            return self.net((raw - mean) / std)

    space = InputSpace(mean=(mean,), std=(std,))
    raw = attack(Raw(), x, y, draws=draws())
    normalised = attack(net, (x - mean) / std, y, space=space, draws=draws())
    torch.testing.assert_close(space.to_raw(normalised), raw, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("attack", GRADIENT[:6], ids=name_of)
def test_inference_mode_autocast_and_half_precision(attack):
    net, (x, y) = network(), batch()
    expected = attack(net, x, y, draws=draws())
    with torch.inference_mode():
        torch.testing.assert_close(attack(net, x.clone(), y.clone(), draws=draws()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = attack(net, x, y, draws=draws())
    assert found.dtype == torch.float32
    assert ((found - expected).abs() < 1e-3).float().mean() > 0.5
    half = attack(copy.deepcopy(net).bfloat16(), x.bfloat16(), y, draws=draws())
    assert half.dtype == torch.bfloat16


def test_without_budget_the_inputs_come_back():
    net, (x, y) = network(), batch()
    for attack in (FGSM(eps=0.0), PGD(eps=0.0), APGD(eps=0.0), Square(eps=0.0)):
        assert torch.equal(attack(net, x, y), x)


def test_parts_of_a_batch_give_the_whole():
    net, (x, y) = network(), batch()
    whole = PGD(eps=0.1, steps=3)(net, x, y, draws=draws())
    parts = PGD(eps=0.1, steps=3, batch_size=3)(net, x, y, draws=draws())
    torch.testing.assert_close(parts, whole)


# -- linear models -----------------------------------------------------------------------------------------------------
class Linear(nn.Module):
    """Logits (w x + b, 0, -100, -100): two classes that matter."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        score = x.flatten(1) @ self.w
        return torch.stack([score, 0 * score, 0 * score - 100, 0 * score - 100], dim=1)


@pytest.mark.parametrize(
    ("attack", "dual", "tolerance"),
    [
        (FGSM(eps=0.1), "l1", 1e-5),
        (PGD(eps=0.1, steps=20), "l1", 1e-5),
        (APGD(eps=0.1, steps=20), "l1", 1e-5),
        (FGSM(eps=0.1, norm="l2"), "l2", 1e-4),
        (PGD(eps=0.1, step_size=0.1, steps=20, norm="l2"), "l2", 1e-3),
        (APGD(eps=0.1, steps=20, norm="l2"), "l2", 1e-3),
    ],
    ids=["FGSM", "PGD", "APGD", "FGSM-l2", "PGD-l2", "APGD-l2"],
)
def test_margin_of_a_linear_model_falls_by_the_dual_norm(attack, dual, tolerance):
    w = torch.randn(16, generator=torch.Generator().manual_seed(3))
    # a margin that no attack in the ball overcomes: one that wins may stop short
    net = Linear(w)
    x = torch.full((4, 16), 0.5)
    y = torch.zeros(4, dtype=torch.long) if (x[0] @ w) > 0 else torch.ones(4, dtype=torch.long)
    sign = 1.0 if y[0] == 0 else -1.0
    with torch.no_grad():
        net.w.add_(sign * 0.3 * torch.ones(16))
    found = attack(net, x, y)
    fall = sign * ((x - found) @ net.w)
    expected = 0.1 * norm_of(net.w[None].detach(), dual)
    torch.testing.assert_close(fall, expected.expand(4), rtol=tolerance, atol=1e-5)


def test_auto_attack_is_at_least_as_strong_as_its_parts():
    net, (x, y) = network(), batch(24)
    y = net.eval()(x).argmax(1)
    held = lambda found: (net(found).argmax(1) == y).sum()  # noqa: E731
    whole = held(AutoAttack(eps=0.02, steps=10, n_queries=50)(net, x, y))
    for part in (APGD(eps=0.02, steps=10), APGDTargeted(eps=0.02, steps=10, n_target_classes=4)):
        assert whole <= held(part(net, x, y))
    assert whole < 24


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net, x, y: PGD(eps=8)(net, x, y), r"`eps` to be in the units of the inputs.*Did you mean 8/255"),
        (lambda net, x, y: PGD()(net, 3 * x, y), r"lie in \[0.0, 1.0\] in raw units.*InputSpace"),
        (lambda net, x, y: PGD()(net, x.long(), y), "`inputs` of PGD to be a floating tensor, but got torch.int64"),
        (lambda net, x, y: PGD()(net, x, y.float()), "`targets` of PGD to be int64 classes of shape"),
        (lambda net, x, y: PGD()(net, x, y[:3]), r"`targets` of PGD to be int64 classes of shape \(8,\)"),
        (lambda net, x, y: PGD(targeted=True)(net, x, y), "`target` for PGD"),
        (lambda net, x, y: PGD()(net, x, y, target=y), "`target` only with targeted=True"),
        (lambda net, x, y: PGD(targeted=True)(net, x, y, target=y), "`target` to differ from `targets`"),
        (lambda net, x, y: PGD(loss="dlr")(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), x, y % 2), "at least 3 cl"),
        (lambda net, x, y: PGD()(nn.Conv2d(1, 2, 3), x, y), r"logits of shape \(N, K\)"),
        (lambda net, x, y: PGD(loss=lambda o, t: o.sum())(net, x, y), r"one value a sample, shape \(8,\)"),
    ],
)
def test_calls_that_cannot_be_meant(call, words):
    with pytest.raises(ValueError, match=words):
        call(network(), *batch())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PGD(eps=-0.1), "`eps` to be at least 0"),
        (lambda: PGD(steps=0), "`steps` to be at least 1, but got 0"),
        (lambda: PGD(step_size=0.0), "`step_size` to be positive"),
        (lambda: PGD(norm="l3"), "`norm` to be 'linf', 'l2' or 'l1', but got 'l3'"),
        (lambda: PGD(loss="cross"), "`loss` to be one of"),
        (lambda: PGD(restarts=0), "`restarts`"),
        (lambda: PGD(random_start="somewhere"), "`random_start`"),
        (lambda: PGD(batch_size=0), "`batch_size`"),
        (lambda: MIFGSM(decay=-1.0), "`decay`"),
        (lambda: FGSM().replaced(steps=3), "FGSM has no argument `steps`"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_gradient_that_is_not_finite_names_the_step():
    class Breaks(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            logits = x.flatten(1)[:, :3]
            return logits * (float("nan") if self.calls == 3 else 1.0)

    x, y = batch()
    with pytest.raises(RuntimeError, match="PGD got a gradient with NaN or infinite values in step 2"):
        PGD(eps=0.1, steps=4)(Breaks(), x, y % 3)
    watch: list[torch.Tensor] = []
    PGD(eps=0.1, steps=4)(Breaks(), x, y % 3, check=False, watch=watch)
    assert torch.stack(watch).tolist() == [True, True, False, True]


@pytest.mark.parametrize("attack", GRADIENT, ids=name_of)
def test_gradient_that_holds_one_number_for_all_entries(attack):
    # the gradient of a sum is a view without memory of its own
    def net(x):
        score = x.flatten(1).sum(dim=1) - 32.0
        return torch.stack([score, -score, score - 1.0, -score - 1.0, 0.0 * score], dim=1)

    x, y = batch()
    found = attack(net, x, y, draws=draws())
    assert torch.isfinite(found).all()
    assert (norm_of(found - x, attack.norm) <= attack.eps + 1e-5).all()


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_samples_that_are_won_take_no_further_start(batch_norm):
    net, (x, y) = network(), batch()
    sizes = []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    attack = PGD(eps=0.03, steps=2, restarts=4, batch_norm=batch_norm)
    found = attack(net, x, y, draws=draws())
    # two steps and a look a start
    looks = sizes[2::3]
    assert sizes[0] == 8
    if batch_norm == "batch":
        # whose statistics are those of the whole batch
        assert sizes == [8] * 12
        return
    assert looks == sorted(looks, reverse=True)
    assert looks[-1] < 8
    # each start by itself, and of these the first that wins, else the one with the largest loss
    own = draws()
    starts = [attack.replaced(restarts=1)(net, x, y, draws=own) for _ in range(4)]
    expected, largest, won = x.clone(), torch.full((8,), -torch.inf), torch.zeros(8, dtype=torch.bool)
    for start in starts:
        outputs = net.eval()(start).detach()
        values = nn.functional.cross_entropy(outputs, y, reduction="none")
        fooled = outputs.argmax(dim=1) != y
        take = ~won & (fooled | (values > largest))
        expected[take], largest[take] = start[take], values[take]
        won |= fooled
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
