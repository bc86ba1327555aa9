"""DynamicSparseGradient: the layers' ratios, the masks, and the queries that they save."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.callbacks import DynamicSparseGradient, ZerothOrderGradient
from lightning_trust.optim import CGE, RGE
from tests.callbacks.zeroth_order.test_zeroth_order_gradient import loader, trainer
from tests.conformance import BATCH, ROWS, CallbackConformance, Data, Host
from tests.two_ranks import fit_on_two_ranks


class TestDynamicSparseGradient(CallbackConformance):
    callback = DynamicSparseGradient
    arguments: ClassVar = {"sparsity": 0.5, "redraw_every_n_epochs": 1, "q": 8, "samples_per_class": 4, "mu": 0.05}
    # each rank takes its own samples for the layers' ratios
    equal_to_one_rank: ClassVar[bool] = False

    def trainer(self, folder, callbacks, **kwargs):
        source: list[Any] = (
            []
            if any(isinstance(each, ZerothOrderGradient) for each in callbacks)
            else [ZerothOrderGradient(CGE(mu=0.05))]
        )
        # a rival for the gradient takes the place of the source
        if any("gradient_source" in getattr(each, "claims", ()) for each in callbacks):
            source = []
        return super().trainer(folder, [*callbacks, *source], **kwargs)

    def test_exclusive_claims_refuse_a_second(self, tmp_path):
        """It claims nothing; what it needs is tested below."""
        assert self.make(tmp_path).all_claims == ()


class Look(pl.Callback):
    """Gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


def weights(host) -> dict[str, torch.Tensor]:
    return {name: value for name, value in host.named_parameters() if name.endswith("weight")}


def test_exactly_so_many_entries_of_each_layer_are_asked():
    host, look = Host(), Look()
    ratios = {"net.0.weight": 0.9, "net.3.weight": 0.25}
    source = ZerothOrderGradient(CGE())
    sparse = DynamicSparseGradient(ratios=ratios, redraw_every_n_epochs=2, seed=3)
    trainer(sparse, source, look, max_epochs=4).fit(host, loader())
    steps = ROWS // BATCH
    active = {"net.0.weight": round(0.1 * 96), "net.3.weight": round(0.75 * 48)}
    biases = 16 + 3
    assert source.queries == 4 * steps * (1 + sum(active.values()) + biases)
    seen = {name: [grads[name] != 0 for grads in look.steps] for name in active}
    for name, count in active.items():
        first, second = seen[name][: 2 * steps], seen[name][2 * steps :]
        for half in (first, second):
            assert torch.stack(half).any(dim=0).sum() == count
        # a new draw
        assert not torch.equal(torch.stack(first).any(dim=0), torch.stack(second).any(dim=0))
    assert all((grads["net.0.bias"] != 0).all() for grads in look.steps)


def test_every_step_may_have_its_own_mask():
    host, look = Host(), Look()
    sparse = DynamicSparseGradient(0.5, "uniform", redraw_every_n_epochs=None, redraw_every_n_steps=1)
    trainer(sparse, ZerothOrderGradient(CGE()), look).fit(host, loader())
    masks = [grads["net.0.weight"] != 0 for grads in look.steps]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)
    assert all(mask.sum() == 48 for mask in masks)


def test_weights_that_are_not_asked_decay_and_drift():
    """The gradient is sparse, the weights are not."""
    host = Host()
    before = host.net[0].weight.detach().clone()
    sparse = DynamicSparseGradient(0.9, "uniform", redraw_every_n_epochs=None)
    look = Look()
    trainer(sparse, ZerothOrderGradient(CGE()), look).fit(host, loader())
    still = look.steps[0]["net.0.weight"] == 0
    moved = host.net[0].weight.detach()[still]
    assert (moved.abs() < before[still].abs()).all()
    assert (moved != 0).all()


@pytest.mark.parametrize("score", ["abs", "signed"])
def test_ratios_are_those_of_grasp_with_exact_gradients(score):
    """With many directions the ranking of the layers is that of GraSP by autograd."""

    def uneven() -> Host:
        host = Host().double()
        host.net[0].weight.data *= 0.05
        return host

    host = uneven()
    source = ZerothOrderGradient(RGE(q=1, exact_restore=True))
    sparse = DynamicSparseGradient(0.8, q=2000, mu=1e-3, samples_per_class=4, score=score, seed=1)
    before = {name: value.detach().clone() for name, value in weights(host).items()}

    class Stop(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 0:
                assert all(torch.equal(value, before[name]) for name, value in weights(pl_module).items())

    trainer(sparse, source, Stop(), precision="64-true").fit(host, loader())
    twin = uneven()
    own = weights(twin)
    rows = [torch.cat(column) for column in zip(*loader(), strict=True)]
    chosen = torch.cat([(rows[1] == label).nonzero().flatten()[:4] for label in range(3)])

    def gradients():
        loss = F.cross_entropy(twin.net(rows[0][chosen].double()), rows[1][chosen])
        return torch.autograd.grad(loss, list(own.values()))

    here = gradients()
    with torch.no_grad():
        for parameter, gradient in zip(own.values(), here, strict=True):
            parameter.add_(1e-3 * gradient)
    scores = [-before[name] * (after - first) / 1e-3 for name, after, first in zip(own, gradients(), here, strict=True)]
    every = torch.cat([each.flatten() for each in scores])
    order = every.abs() if score == "abs" else -every
    pruned = torch.zeros(len(every), dtype=torch.bool)
    pruned[order.argsort()[: round(0.8 * len(every))]] = True
    expected = [part.double().mean().item() for part in pruned.split([each.numel() for each in scores])]
    found = [sparse.pruning_ratios[name] for name in own]
    assert found == pytest.approx(expected, abs=0.12)
    # the two layers differ, and by more than the error
    assert abs(expected[0] - expected[1]) > 0.15
    sizes = [each.numel() for each in scores]
    assert sum(ratio * size for ratio, size in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(
        0.8, abs=0.004
    )
    assert source.queries == 2 * 2001 + 2 * ROWS // BATCH


def test_normalised_directions_rank_the_layers_by_the_gradient_over_their_size():
    """In the mean an estimate from them is each layer's gradient over its number of weights."""
    host = Host().double()
    source = ZerothOrderGradient(RGE(q=1, exact_restore=True))
    sparse = DynamicSparseGradient(0.8, q=4000, mu=1e-3, samples_per_class=4, normalize="per_tensor", seed=1)
    trainer(sparse, source, precision="64-true", max_steps=1).fit(host, loader())
    twin = Host().double()
    own = weights(twin)
    rows = [torch.cat(column) for column in zip(*loader(), strict=True)]
    chosen = torch.cat([(rows[1] == label).nonzero().flatten()[:4] for label in range(3)])

    def estimate():
        loss = F.cross_entropy(twin.net(rows[0][chosen].double()), rows[1][chosen])
        found = torch.autograd.grad(loss, list(own.values()))
        return [gradient / gradient.numel() for gradient in found]

    before, here = [value.detach().clone() for value in own.values()], estimate()
    with torch.no_grad():
        for parameter, gradient in zip(own.values(), here, strict=True):
            parameter.add_(1e-3 * gradient)
    scores = [value * (after - first) for value, after, first in zip(before, estimate(), here, strict=True)]
    every = torch.cat([each.flatten() for each in scores]).abs()
    pruned = torch.zeros(len(every), dtype=torch.bool)
    pruned[every.argsort()[: round(0.8 * len(every))]] = True
    expected = [part.double().mean().item() for part in pruned.split([each.numel() for each in scores])]
    assert list(sparse.pruning_ratios.values()) == pytest.approx(expected, abs=0.12)
    plain = DynamicSparseGradient(0.8, q=4000, mu=1e-3, samples_per_class=4, seed=1)
    host = Host().double()
    trainer(plain, ZerothOrderGradient(RGE(exact_restore=True)), precision="64-true", max_steps=1).fit(host, loader())
    # not the ranking of the gradient itself
    assert abs(plain.pruning_ratios["net.0.weight"] - sparse.pruning_ratios["net.0.weight"]) > 0.02


def test_two_ranks_have_the_same_masks(tmp_path):
    def result(run, module):
        sparse = next(each for each in run.callbacks if isinstance(each, DynamicSparseGradient))
        return sparse.pruning_ratios, sparse._masks, module.state_dict()

    callbacks = [DynamicSparseGradient(0.5, q=4, samples_per_class=2), ZerothOrderGradient(CGE())]
    first, second = fit_on_two_ranks(tmp_path, Host(), Data(batch_size=4), callbacks, result, max_epochs=1)
    assert first[0] == second[0]
    for one, other in zip(first[1:], second[1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_random_directions_can_be_sparse_too():
    host, look = Host(), Look()
    trainer(DynamicSparseGradient(0.75, "uniform"), ZerothOrderGradient(RGE(q=2)), look).fit(host, loader())
    assert all((grads["net.0.weight"] != 0).sum() == 24 for grads in look.steps)


def test_a_dead_layer_is_told_and_keeps_one_weight():
    host, look = Host(), Look()
    run = trainer(DynamicSparseGradient(ratios={"net.0.weight": 1.0}), ZerothOrderGradient(CGE()), look)
    with pytest.warns(UserWarning, match=r"the pruning ratio of \['net.0.weight'\] is 1"):
        run.fit(host, loader())
    assert all((grads["net.0.weight"] != 0).sum() == 1 for grads in look.steps)
    assert all((grads["net.3.weight"] != 0).all() for grads in look.steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0}, r"`sparsity` to be a share of zeros in \[0, 1\), but got 1.0"),
        ({"ratios": "random"}, "`ratios` to be 'zo_grasp', 'uniform' or ratios by name, but got 'random'"),
        ({"ratios": {"w": 1.5}}, r"ratio of 'w' to lie in \[0, 1\], but got 1.5"),
        ({"redraw_every_n_epochs": 0}, "`redraw_every_n_epochs` to be an integer of at least 1, but got 0"),
        ({"q": 0}, "`q` to be an integer of at least 1, but got 0"),
        ({"normalize": "jointly"}, "`normalize` to be 'per_tensor' or None, but got 'jointly'"),
        ({"score": "squared"}, "`score` to be 'abs' or 'signed', but got 'squared'"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        DynamicSparseGradient(**arguments)


def test_bad_runs():
    with pytest.raises(MisconfigurationException, match="Add ZerothOrderGradient"):
        trainer(DynamicSparseGradient()).fit(Host(), loader())
    with pytest.raises(ValueError, match="to choose weights of convolutions or linear layers that are trained"):
        trainer(DynamicSparseGradient(parameters=["*.bias"]), ZerothOrderGradient(CGE())).fit(Host(), loader())
    with pytest.raises(ValueError, match=r"`ratios` to name weights that have a mask, .* but got \['other'\]"):
        trainer(DynamicSparseGradient(ratios={"other": 0.5}), ZerothOrderGradient(CGE())).fit(Host(), loader())
