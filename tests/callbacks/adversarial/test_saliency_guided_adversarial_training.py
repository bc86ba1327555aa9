"""SaliencyGuidedAdversarialTraining: limit cases, masks, divergences, finite differences, bad input."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.attacks import PGD
from lightning_trust.attacks.preparation import prepared
from lightning_trust.callbacks import AdversarialTraining, SaliencyGuidedAdversarialTraining
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.functional.adversarial import bernoulli_kl, masked_inputs, saliency_map
from tests.callbacks.adversarial.test_adversarial_training import Images, fit, gradients_of, images, in_a_box
from tests.conformance import CallbackConformance


def saliency_mask(net, x, y, fraction=0.5, draws=None):
    """What the callback masks: the map in eval mode, the network as it was afterwards."""
    with prepared(net):
        saliency = saliency_map(net, x, y)
    noise = (draws or SampleDraws(torch.arange(len(x)), 0)).uniform(*x.shape[1:])
    return masked_inputs(x, saliency, fraction, "random", noise)


SGA = SaliencyGuidedAdversarialTraining


class TestSaliencyGuided(CallbackConformance):
    callback = SaliencyGuidedAdversarialTraining
    arguments: ClassVar = {
        "attack": {"class_path": "PGD", "init_args": {"eps": 0.3, "steps": 2}},
        "mask_fraction": 0.5,
        "feature_dims": 1,
    }
    wrap_data = staticmethod(in_a_box)


# -- limit cases -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments", [{"mask_fraction": 0.0}, {"kl_weight": 0.0}, {"attack": PGD(eps=0.0), "kl_weight": 0.0}]
)
def test_without_attack_and_mask_it_is_plain_training(arguments):
    plain, _ = fit(Images())
    ours, _ = fit(Images(), [SGA(**arguments)])
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())


def test_without_mask_it_is_adversarial_training():
    one, _ = fit(Images(), [SGA(PGD(eps=0.1, steps=2), mask_fraction=0.0, name="same", seed=3)])
    two, _ = fit(Images(), [AdversarialTraining(PGD(eps=0.1, steps=2), name="same", seed=3)])
    moved = max((one.state_dict()[k] - two.state_dict()[k]).abs().max().item() for k in one.state_dict())
    # the streams are named after the classes, so the starts differ; the training is of one kind
    assert 0.0 < moved < 0.05


# -- saliency and masks ------------------------------------------------------------------------------------------------
def test_saliency_of_a_linear_network_is_its_row():
    weight = torch.randn(3, 2 * 16)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3, bias=False))
    net[1].weight.data.copy_(weight)
    x, y = torch.rand(4, 2, 4, 4), torch.tensor([0, 1, 2, 1])
    rows = weight[y].view(4, 2, 4, 4)
    torch.testing.assert_close(saliency_map(net, x, y), rows.mean(dim=1))
    torch.testing.assert_close(saliency_map(net, x, y, "abs_grad"), rows.abs().mean(dim=1))
    torch.testing.assert_close(saliency_map(net, x, y, "integrated"), (rows * x).mean(dim=1), rtol=1e-4, atol=1e-6)
    filled, mask = saliency_mask(net, x, y, 0.4)
    count = int(0.4 * 16)
    for row in range(4):
        lowest = set(rows.mean(dim=1)[row].flatten().argsort()[:count].tolist())
        assert set(mask[row].flatten().nonzero().flatten().tolist()) == lowest
    changed = (filled != x).any(dim=1)
    assert (changed <= mask).all()
    assert (filled.flatten(1).amin(1) >= x.flatten(1).amin(1)).all()
    assert (filled.flatten(1).amax(1) <= x.flatten(1).amax(1)).all()


def test_saliency_equals_captums():
    captum = pytest.importorskip("captum.attr")
    net, (x, y) = Images(batch_norm=True).net.eval(), images(6).tensors
    expected = captum.Saliency(net).attribute(x.clone(), target=y, abs=False).mean(dim=1)
    torch.testing.assert_close(saliency_map(net, x, y), expected, rtol=0.0, atol=1e-6)


def test_mask_is_the_draws_and_leaves_everything_alone():
    net, (x, y) = Images(batch_norm=True).net.train(), images(6).tensors
    state, kept = copy.deepcopy(net.state_dict()), x.clone()
    one, two, other = (saliency_mask(net, x, y, draws=SampleDraws(torch.arange(6), seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_fills():
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    saliency = torch.tensor([[0.0, 1.0, 0.5, 2.0]])
    for fill, expected in (("mean", 4.0), ("zero", 0.0)):
        filled, mask = masked_inputs(x, saliency, 0.5, fill)
        assert filled.tolist() == [[expected, 3.0, expected, 7.0]]
        assert mask.tolist() == [[True, False, True, False]]
    with pytest.raises(ValueError, match="`fill`"):
        masked_inputs(x, saliency, 0.5, "noise", torch.rand(1, 4))
    with pytest.raises(ValueError, match=r"`fraction` to be in \[0, 1\), but got 1.0"):
        masked_inputs(x, saliency, 1.0)


def test_network_that_ignores_a_half_loses_nothing_with_it():
    class TopHalf(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(32, 3)

        def forward(self, x):
            return self.head(x[:, :, :4].flatten(1))

    net, (x, y) = TopHalf(), images(6).tensors
    with torch.no_grad():
        net.head.weight.copy_(torch.randn(3, 32) + 3.0)
    saliency = saliency_map(net, x, y, "abs_grad")
    filled, mask = masked_inputs(x, saliency, 0.5, "random", torch.rand_like(x))
    assert mask[:, 4:].all()
    assert not mask[:, :4].any()
    assert torch.equal(net(filled), net(x))


def test_bernoulli_divergence_is_the_sum_of_two_class_ones():
    q, p = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for label in range(4):
        two = [torch.stack([torch.zeros(5, dtype=torch.float64), each[:, label]], dim=1) for each in (q, p)]
        expected += F.kl_div(two[0].log_softmax(1), two[1].softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(bernoulli_kl(q, p), expected)
    assert (bernoulli_kl(q, p) >= 0).all()
    torch.testing.assert_close(bernoulli_kl(p, p), torch.zeros(5, dtype=torch.float64))


# -- the loss ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kl_on", ["adv", "clean"])
def test_gradient_is_that_of_the_formula(kl_on):
    host = Images()
    callback = SGA(
        PGD(eps=0.1, steps=2), kl_weight=0.7, kl_on=kl_on, adv_kl_weight=0.4, clean_weight=0.3, fill="mean", seed=5
    )
    twin = copy.deepcopy(host).double()
    found, (x, y) = gradients_of(host, callback)
    net = twin.net
    adversarial = callback.attack(net, x, y, draws=callback.random.samples(8, "attack", 0))
    z = adversarial if kl_on == "adv" else x
    filled, _ = masked_inputs(z, saliency_map(net, z, y), 0.5, "mean")
    kl = lambda p, q: (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()  # noqa: E731
    loss = F.cross_entropy(net(adversarial), y) + 0.3 * F.cross_entropy(net(x), y)
    loss = loss + 0.7 * kl(net(z), net(filled)) + 0.4 * kl(net(x), net(adversarial))
    for (name, _), value in zip(
        twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
    ):
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("which", "moves"), [("both", 2), ("adv", 1)])
def test_masked_inputs_need_not_move_batchnorm(which, moves):
    host, _ = fit(Images(batch_norm=True), [SGA(PGD(eps=0.1, steps=2), bn_update=which)])
    assert host.net[1].num_batches_tracked == 3 * moves


def test_random_ranks_are_a_baseline_of_the_same_share():
    seen = []

    class Watches(Images):
        def __init__(self):
            super().__init__()
            self.net.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().clone()))

    fit(Watches(), [SGA(saliency="random", fill="zero")], batches=1)
    plain, masked = seen[-2:]
    changed = (plain != masked).flatten(1).float().mean(dim=1)
    assert changed.tolist() == pytest.approx([0.5] * 8, abs=0.02)
    assert not torch.equal(masked[0] == 0, masked[1] == 0)


class Findings(Images):
    """Several labels an image, or none."""

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1])


def test_gradient_with_several_labels_is_that_of_the_formula():
    x = images(8).tensors[0].double()
    y = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]] * 2, dtype=torch.float64)
    host = Findings()
    twin = copy.deepcopy(host).double()
    net = twin.net
    callback = SGA(
        PGD(eps=0.1, steps=2), fill="mean", loss="bce", kl_weight=0.7, adv_kl_weight=0.4, clean_weight=0.3, seed=5
    )
    found = {}

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.update({name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()})

    data = DataLoader(TensorDataset(x, y), batch_size=8)
    fit(host, [callback, Keep()], batches=1, data=data, precision="64-true")

    def bce(inputs):
        p = net(inputs).sigmoid()
        return -torch.where(y == 1, p.log(), (1 - p).log()).mean()

    def kl(first, second):
        """Every label a coin of its own."""
        p, q = net(first).sigmoid(), net(second).sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()

    adversarial = callback.attack(net, x, y, draws=callback.random.samples(8, "attack", 0))
    assert bce(adversarial) > bce(x)
    # the positive labels; without any the predicted ones, and without those the largest
    saliency = []
    for row, labels in zip(adversarial, y, strict=True):
        row = row.clone().requires_grad_()
        logits = net(row[None])[0]
        chosen = labels > 0 if labels.any() else logits > 0
        score = logits[chosen].sum() if chosen.any() else logits.max()
        saliency.append(torch.autograd.grad(score, row)[0].mean(0))
    filled = adversarial.clone()
    for row, ranks in zip(filled, saliency, strict=True):
        mean = row.mean().item()
        row.flatten(1)[:, ranks.flatten().argsort()[: ranks.numel() // 2]] = mean
    loss = bce(adversarial) + 0.3 * bce(x) + 0.7 * kl(adversarial, filled) + 0.4 * kl(x, adversarial)
    for (name, _), value in zip(
        twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
    ):
        # the map is kept in float32
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        {"mask_fraction": 1.0},
        {"fill": "noise"},
        {"kl_on": "both"},
        {"saliency": "cam"},
        {"kl_weight": -1.0},
        {"loss": "mse"},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        SGA(**arguments)


def test_targets_and_inputs_that_do_not_fit():
    def run(callback: Any, data: Any) -> None:
        fit(Images(), [callback], data=DataLoader(data, batch_size=8))

    x, y = images().tensors
    with pytest.raises(ValueError, match=r"classes of shape \(N,\), because loss='ce', but got shape \(8, 3\)"):
        run(SGA(), TensorDataset(x, F.one_hot(y, 3)))
    with pytest.raises(ValueError, match=r"multi-hot of shape \(N, K\), because loss='bce', but got shape \(8,\)"):
        run(SGA(loss="bce"), TensorDataset(x, y))
    with pytest.raises(ValueError, match=r"Expected images of shape \(N, C, H, W\), or argument `feature_dims`"):
        run(SGA(), TensorDataset(x.flatten(1), y))


def test_probabilities_are_noticed():
    host = Images()
    host.net = nn.Sequential(host.net, nn.Softmax(dim=1))
    with pytest.warns(UserWarning, match="look like probabilities"):
        pl.Trainer(max_epochs=1, callbacks=[SGA()], logger=False, enable_checkpointing=False, accelerator="cpu").fit(
            host, DataLoader(images(), batch_size=8)
        )
