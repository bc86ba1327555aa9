"""APGD and its targeted variant: progress, checkpoints, verdicts beside those of torchattacks and of ART."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_trust.attacks import APGD, PGD, APGDTargeted
from lightning_trust.attacks.apgd import ranked_classes
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import check_attack, draws, images, right, small

EPS = {"linf": 0.03, "l2": 0.25, "l1": 1.5}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("kind", [APGD, APGDTargeted])
def test_invariants(kind, norm):
    check_attack(kind(4 * EPS[norm], norm, steps=12))
    if norm == "l1":
        check_attack(kind(4 * EPS[norm], norm, steps=12, larger_eps=True))


@pytest.mark.parametrize("norm", EPS)
def test_points_lie_in_the_ball_and_the_loss_is_at_least_that_of_the_start(norm):
    net = small(smooth=True)
    x, y = images(30, net)
    attack = APGD(EPS[norm], norm, steps=20, early_stop=False)
    start = APGD(EPS[norm], norm, steps=1, early_stop=False)
    loss = lambda point: nn.functional.cross_entropy(net(point), y, reduction="none")  # noqa: E731
    found, first = attack(net, x, y, draws=draws(30)), start(net, x, y, draws=draws(30))
    assert (norm_of(found - x, norm) <= EPS[norm] * (1 + 1e-6) + 1e-6).all()
    assert (loss(found) >= loss(first) - 1e-6).all()
    assert (loss(found) > loss(x)).all()


@pytest.mark.parametrize("norm", EPS)
def test_what_is_broken_is_not_attacked_and_leaves_at_once(norm):
    net = small()
    x, y = images(40, net, wrong=4)
    sizes = []

    class Seen(nn.Module):
        def forward(self, z):
            sizes.append(len(z))
            return net(z)

    found = APGD(4 * EPS[norm], norm, steps=30)(Seen(), x, y, draws=draws(40))
    assert torch.equal(found[:4], x[:4])
    assert sizes[:2] == [40, 36]
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < 20
    assert not right(net, found, y)[4:].all()


@pytest.mark.parametrize("norm", EPS)
def test_letting_samples_go_changes_no_verdict(norm):
    net = small()
    x, y = images(60, net)
    whole = APGD(EPS[norm], norm, steps=25)(net, x, y, draws=draws(60))
    alone = torch.cat(
        [
            APGD(EPS[norm], norm, steps=25)(net, x[row : row + 1], y[row : row + 1], draws=draws(60).rows([row]))
            for row in range(60)
        ]
    )
    assert torch.equal(right(net, whole, y), right(net, alone, y))
    assert 0 < right(net, whole, y).sum() < 60


def test_restarts_keep_successes():
    net = small()
    x, y = images(60, net)
    broken = [~right(net, APGD(0.025, steps=5, restarts=count)(net, x, y, draws=draws(60)), y) for count in (1, 4)]
    assert (broken[0] <= broken[1]).all()


def test_averaged_passes_tame_a_network_that_answers_at_random():
    class Noisy(nn.Module):
        def forward(self, x):
            return (x + 0.3 * torch.randn_like(x)).flatten(1) @ torch.linspace(-1, 1, 320).view(64, 5)

    x = torch.full((3, 1, 8, 8), 0.5)
    clean = x.flatten(1) @ torch.linspace(-1, 1, 320).view(64, 5)
    y = clean.argmax(dim=1)
    gain = []
    for passes in (1, 20):
        torch.manual_seed(0)
        found = APGD(0.1, steps=10, eot_iter=passes, early_stop=False)(Noisy(), x, y, draws=draws(3))
        logits = found.flatten(1) @ torch.linspace(-1, 1, 320).view(64, 5)
        gain.append(nn.functional.cross_entropy(logits, y).item())
    assert gain[1] >= gain[0]
    assert gain[1] > nn.functional.cross_entropy(clean, y).item()


def test_targeted_apgd_beats_plain_apgd_on_many_classes():
    net = small()
    x, y = images(100, net)
    one, many = (APGDTargeted(0.025, steps=30, n_target_classes=count)(net, x, y, draws=draws(100)) for count in (1, 5))
    assert right(net, many, y).sum() <= right(net, one, y).sum()


def test_ranks_come_from_the_logits_without_the_true_class():
    outputs = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert ranked_classes(outputs, torch.tensor([1])).tolist() == [[3, 2, 0]]


def test_a_targeted_call_reaches_its_class():
    net = small()
    x, y = images(30, net)
    goal = (y + 1) % 6
    found = APGD(0.15, loss="ce", steps=40, targeted=True)(net, x, y, target=goal, draws=draws(30))
    assert (net(found).argmax(dim=1) == goal).float().mean() > 0.7


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_robust_accuracy_of_torchattacks(norm, loss):
    torchattacks = pytest.importorskip("torchattacks")
    net = small()
    x, y = images(200, net)
    eps = EPS[norm]
    found = APGD(eps, norm, loss, steps=50)(net, x, y, draws=draws(200))
    theirs = torchattacks.APGD(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=50, loss=loss)(x, y)
    assert abs(int(right(net, found, y).sum()) - int(right(net, theirs, y).sum())) <= 1


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "order"), [("linf", np.inf), ("l2", 2)])
def test_robust_accuracy_of_art(norm, order, loss):
    # the Adversarial Robustness Toolbox
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    net = small()
    x, y = images(200, net)
    eps = EPS[norm]
    classifier = PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 8, 8), 6, clip_values=(0.0, 1.0), device_type="cpu")
    theirs = evasion.AutoProjectedGradientDescent(
        classifier,
        norm=order,
        eps=eps,
        eps_step=2 * eps,
        max_iter=50,
        nb_random_init=1,
        batch_size=200,
        loss_type={"ce": "cross_entropy", "dlr": "difference_logits_ratio"}[loss],
        verbose=False,
    )
    state = np.random.get_state()
    np.random.seed(0)
    try:
        expected = right(net, torch.from_numpy(theirs.generate(x.numpy(), y.numpy())), y).sum()
    finally:
        np.random.set_state(state)
    found = right(net, APGD(eps, norm, loss, steps=50)(net, x, y, draws=draws(200)), y).sum()
    assert 20 < expected < 180
    assert abs(found - expected) <= 1


def test_apgd_is_stronger_than_pgd_of_the_same_steps():
    net = small(smooth=True)
    x, y = images(100, net)
    loss = lambda point: nn.functional.cross_entropy(net(point), y).item()  # noqa: E731
    auto = APGD(0.1, steps=40, early_stop=False)(net, x, y, draws=draws(100))
    assert loss(auto) >= 0.999 * loss(PGD(0.1, step_size=0.05, steps=40)(net, x, y, draws=draws(100)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: APGD(steps=0), "`steps` to be at least 1, but got 0"),
        (lambda: APGD(restarts=0), "`restarts` to be at least 1, but got 0"),
        (lambda: APGD(rho=0.0), r"`rho` to be in \(0, 1\], but got 0.0"),
        (lambda: APGD(eot_iter=0), "`eot_iter` to be at least 1, but got 0"),
        (lambda: APGD(larger_eps=True), "`larger_eps` only with norm='l1', but got norm='linf'"),
        (lambda: APGDTargeted(n_target_classes=0), "`n_target_classes` to be at least 1, but got 0"),
        (lambda: APGDTargeted(loss="kl"), "`loss` to be 'dlr', 'ce' or 'margin', but got 'kl'"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_too_few_classes_are_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = images(4, net)
    with pytest.raises(ValueError, match="at least 4 classes for loss 'targeted dlr', but got logits of 3"):
        APGDTargeted(0.1)(net, x, y)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    with pytest.raises(ValueError, match="at least 3 classes for loss 'dlr', but got logits of 2"):
        APGD(0.1, loss="dlr")(two, *images(4, two))
    assert APGDTargeted(0.1, loss="ce", steps=2)(net, x, y).shape == x.shape


def test_labels_out_of_range_are_named():
    net = small()
    x, y = images(4, net)
    with pytest.raises(ValueError, match=r"`targets` of APGD to hold classes in \[0, 6\).*from \d to 9"):
        APGD(0.1)(net, x, torch.where(y == y[0], 9, y))
