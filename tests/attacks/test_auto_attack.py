"""AutoAttack: at least as strong as each part, verdicts of the peers, records, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trust.attacks import (
    APGD,
    FAB,
    PGD,
    APGDTargeted,
    AutoAttack,
    DeepFool,
    GradientMaskingWarning,
    Square,
)
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import check_attack, draws, images, right, small

EPS = {"linf": 0.02, "l2": 0.2, "l1": 1.0}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_invariants(norm, version):
    check_attack(AutoAttack(3 * EPS[norm], norm, version, steps=5, n_queries=10, eot_iter=2))


@pytest.mark.parametrize("norm", EPS)
def test_no_sample_survives_that_a_part_alone_breaks(norm):
    net = small()
    x, y = images(60, net, wrong=4)
    whole = AutoAttack(EPS[norm], norm, steps=20, n_queries=50)
    result = whole.evaluate(net, x, y, draws=draws(60))
    for name, part in whole.members().items():
        alone = part(net, x, y, draws=draws(60).stream(name))
        assert (result.robust <= right(net, alone, y)).all()
    assert torch.equal(result.robust, right(net, result.inputs, y))
    assert (norm_of(result.inputs - x, norm) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()


def test_record_says_who_broke_what():
    net = small()
    x, y = images(80, net, wrong=6)
    attack = AutoAttack(0.02, steps=20, n_queries=50, batch_size=30)
    result = attack.evaluate(net, x, y, draws=draws(80))
    assert list(result.broken_by) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    broken = torch.stack(list(result.broken_by.values()))
    # each by one attack, none that was wrong before
    assert torch.equal(broken.sum(dim=0), (result.clean_correct & ~result.robust).long())
    assert not result.clean_correct[:6].any()
    assert result.clean_accuracy == pytest.approx(74 / 80)
    assert result.robust_accuracy == pytest.approx(result.robust.double().mean().item())
    assert 0 < result.robust.sum() < 74
    assert torch.equal(result.inputs[~result.clean_correct], x[~result.clean_correct])
    assert torch.equal(result.inputs, attack(net, x, y, draws=draws(80)))


def test_verdict_of_a_sample_does_not_depend_on_its_batch():
    net = small().double()
    x, y = images(40, net)
    attack = AutoAttack(0.02, steps=15, n_queries=40)
    whole = attack.evaluate(net, x, y, draws=draws(40)).robust
    some = torch.tensor([30, 3, 17])
    assert torch.equal(attack.evaluate(net, x[some], y[some], draws=draws(40).rows(some)).robust, whole[some])


def test_seed_makes_it_reproducible():
    net = small()
    x, y = images(20, net)
    attack = AutoAttack(0.02, steps=5, n_queries=20, seed=3)
    assert torch.equal(attack(net, x, y), attack(net, x, y))
    assert not torch.equal(attack(net, x, y), attack.replaced(seed=4)(net, x, y))


def test_own_attacks():
    net = small()
    x, y = images(40, net)
    members = [PGD(0.02, steps=5), PGD(0.02, steps=5, loss="margin"), FAB(0.02, steps=10), DeepFool()]
    attack = AutoAttack(0.02, version="custom", attacks=members)
    result = attack.evaluate(net, x, y, draws=draws(40))
    assert list(result.broken_by) == ["PGD", "PGD-2", "FAB", "DeepFool"]
    assert (norm_of(result.inputs - x, "linf") <= 0.02 + 1e-6).all()
    # DeepFool goes as far as it needs to; what lies outside of the ball does not count
    assert 0 < result.robust.sum() < 40
    wider = attack.replaced(eps=0.05).evaluate(net, x, y, draws=draws(40))
    assert wider.robust.sum() < result.robust.sum()


def test_without_a_radius_the_clean_verdict_stands():
    net = small()
    x, y = images(20, net, wrong=2)
    result = AutoAttack(0.0).evaluate(net, x, y)
    assert torch.equal(result.robust, result.clean_correct)
    assert result.clean_correct.sum() == 18


def test_normalised_inputs():
    net = small()
    x, y = images(40, net)
    space = InputSpace(mean=(0.4,), std=(0.3,))
    wrapped = lambda z: net(z * 0.3 + 0.4)  # noqa: E731
    attack = AutoAttack(0.02, steps=10, n_queries=20)
    raw = attack.evaluate(net, x, y, draws=draws(40))
    result = attack.evaluate(wrapped, (x - 0.4) / 0.3, y, space=space, draws=draws(40))
    assert (result.robust != raw.robust).sum() <= 1
    assert torch.equal(wrapped(result.inputs).argmax(dim=1) == y, result.robust)


class Noisy(nn.Module):
    """A linear model of the sum of an image, whose first logit carries noise of standard deviation one."""

    def forward(self, x):
        score = x.flatten(1).sum(dim=1) - 6.4
        low = torch.full_like(score, -40.0)
        return torch.stack([score + torch.randn_like(score), torch.zeros_like(score), low, low - 1.0], dim=1)


def noisy_samples(worst):
    """Images of 16 pixels of class 0 whose margin is 8 on average, and ``worst`` in the least corner of a ball."""
    x = torch.full((400, 1, 4, 4), 0.9)
    return x, torch.zeros(400, dtype=torch.long), (8.0 - worst) / 16.0


@pytest.mark.parametrize(("worst", "least", "most"), [(-0.6, 0.0, 0.03), (0.6, 0.9, 1.0)])
def test_verdicts_on_a_network_that_answers_at_random_are_those_of_its_mean(worst, least, most):
    torch.manual_seed(2)
    x, y, eps = noisy_samples(worst)
    result = AutoAttack(eps, version="rand", steps=6).evaluate(Noisy(), x, y, draws=draws(400))
    # one pass would answer rightly for 27 or 73 of 100; the mean of 20 has a standard deviation of less than a quarter
    assert result.clean_accuracy == 1.0
    assert least <= result.robust_accuracy <= most
    assert ((result.inputs - x).abs() <= eps + 1e-6).all()


def test_without_means_a_random_network_is_asked_once_an_attack_and_named():
    torch.manual_seed(2)
    x, y, eps = noisy_samples(-0.6)
    attack = AutoAttack(eps, version="custom", attacks=[PGD(eps, steps=5, step_size=eps, random_start=False)])
    with pytest.warns(GradientMaskingWarning, match=r"answers at random.*version='rand'"):
        result = attack.evaluate(Noisy(), x, y, draws=draws(400))
    # a normal number exceeds 0.6 in 27 of 100 draws; asked twice, 47 samples would pass for robust
    assert result.robust_accuracy == pytest.approx(0.274, abs=0.07)


def test_a_verdict_asks_as_often_as_the_attack_that_averages_most():
    calls = []

    def model(x):
        calls.append(len(x))
        return torch.stack([x.flatten(1).sum(dim=1), torch.full_like(x[:, 0, 0, 0], 6.0)], dim=1)

    x, y, _ = noisy_samples(0.0)
    members = [PGD(0.01, steps=1), APGD(0.01, steps=1, eot_iter=3)]
    AutoAttack(0.01, version="custom", attacks=members).evaluate(model, x[:5], y[:5])
    # clean; PGD: a step and a verdict; APGD: two points and a verdict
    assert calls == [5] * (3 + (1 + 3) + (2 * 3 + 3))


def test_what_roundoff_tips_back_counts_as_robust():
    class Tips(nn.Module):
        """On the edge of the ball of half the samples, wrong in company of the others and right without them."""

        def forward(self, x):
            score = x.flatten(1).sum(dim=1) - 14.4 + 0.16 + (1e-6 if len(x) == 2 else -1e-6)
            return torch.stack([score, torch.zeros_like(score), score - 9.0, score - 9.5], dim=1)

    x, y, _ = noisy_samples(0.0)
    x = x[:4].clone().double()
    x[2:] = 0.95
    member = PGD(0.01, steps=1, step_size=0.01, random_start=False)
    result = AutoAttack(0.01, version="custom", attacks=[member]).evaluate(Tips(), x, y[:4])
    assert result.robust.all()
    assert not result.broken_by["PGD"].any()
    assert torch.equal(result.inputs, x)
    # in one company throughout, what wins has won
    assert (
        not AutoAttack(0.011, version="custom", attacks=[member.replaced(eps=0.011, step_size=0.011)])
        .evaluate(Tips(), x, y[:4])
        .robust[:2]
        .any()
    )


def test_parts_of_each_version():
    plus = AutoAttack(0.1, version="plus").members()
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [plus[name].restarts for name in plus] == [5, 5, 5, 1, 1, 1]
    rand = AutoAttack(0.1, version="rand").members()
    assert [(name, attack.eot_iter) for name, attack in rand.items()] == [("apgd-ce", 20), ("apgd-dlr", 20)]
    l1 = AutoAttack(10.0, "l1").members()
    assert isinstance(l1["apgd-ce"], APGD)
    assert (l1["apgd-ce"].restarts, l1["apgd-ce"].larger_eps) == (5, True)
    assert isinstance(l1["apgd-t"], APGDTargeted)
    assert (l1["apgd-t"].n_target_classes, l1["apgd-t"].larger_eps) == (5, True)
    assert isinstance(l1["square"], Square)
    assert (l1["square"].n_queries, l1["square"].resc_schedule) == (5000, False)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_verdicts_of_torchattacks(norm):
    torchattacks = pytest.importorskip("torchattacks")
    net = small()
    x, y = images(200, net, wrong=5)
    result = AutoAttack(EPS[norm], norm, steps=30, n_queries=200).evaluate(net, x, y, draws=draws(200))
    theirs = torchattacks.AutoAttack(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=EPS[norm], n_classes=6, seed=0)
    for attack in theirs._autoattack.attacks:
        if hasattr(attack, "steps"):
            attack.steps = 30
        if hasattr(attack, "n_queries"):
            attack.n_queries = 200
    assert (right(net, theirs(x, y), y) != result.robust).sum() <= 1
    assert 0 < result.robust.sum() < 190


@pytest.mark.parametrize("norm", EPS)
def test_verdicts_of_pyautoattack(norm):
    pyautoattack = pytest.importorskip("pyautoattack")
    net = small(classes=10)
    x, y = images(100, net, wrong=5)
    result = AutoAttack(EPS[norm], norm, steps=100, n_queries=100).evaluate(net, x, y, draws=draws(100))
    theirs = pyautoattack.AutoAttack(net, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=EPS[norm], seed=0)
    theirs.square.n_queries = 100
    found, _ = theirs.run_standard_evaluation(x, y)
    assert (right(net, found, y) != result.robust).sum() <= 1
    assert 0 < result.robust.sum() < 95


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AutoAttack(version="fast"), "`version` to be one of .*but got 'fast'"),
        (lambda: AutoAttack(steps=0), "`steps` to be at least 1"),
        (lambda: AutoAttack(n_queries=0), "`n_queries` to be at least 1"),
        (lambda: AutoAttack(eot_iter=0), "`eot_iter` to be at least 1"),
        (lambda: AutoAttack(version="custom"), "`attacks` with version='custom', and only then"),
        (lambda: AutoAttack(attacks=[PGD()]), "`attacks` with version='custom', and only then"),
        (lambda: AutoAttack(0.1, version="custom", attacks=[PGD(0.2)]), "to have eps=0.1"),
        (lambda: AutoAttack(0.1, version="custom", attacks=[PGD(0.1, norm="l2")]), "to have norm='linf'"),
        (lambda: AutoAttack(0.1, version="custom", attacks=[PGD(0.1, targeted=True)]), "to have targeted=False"),
        (lambda: AutoAttack(0.1, version="custom", attacks=[PGD(0.1, batch_norm="batch")]), "batch_norm='eval'"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("version", "classes", "least"), [("standard", 3, 4), ("plus", 2, 4), ("rand", 2, 3)])
def test_too_few_classes_are_named_before_any_attack(version, classes, least):
    calls = []

    class Seen(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.flatten(1)[:, :classes]

    with pytest.raises(ValueError, match=rf"at least {least} classes for AutoAttack.*the network has {classes}"):
        AutoAttack(0.1, version=version)(Seen(), torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    # of its clean verdict, "rand" takes the mean
    assert calls == [2] * (20 if version == "rand" else 1)
