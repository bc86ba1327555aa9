import errno
import itertools
import os
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.callbacks import FineTune, LoadWeights, WeightSaliency
from lightning_trust.core.host import named_parameters
from lightning_trust.core.masks import ParameterMask
from lightning_trust.core.step import ConstraintPhase
from lightning_trust.datamodules import ForgetIndices, ForgetRandom, ForgetSplit
from tests.conformance import CallbackConformance, Data, Host, forget_random
from tests.two_ranks import QUIET, fit_on_two_ranks


def half(host):
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in named_parameters(host).items()}
    return ParameterMask(masks)


class TestConformance(CallbackConformance):
    callback = WeightSaliency
    arguments: ClassVar = {"ratio": 0.3, "scope": "layer"}
    wrap_data = staticmethod(forget_random)


class TestConformanceOfAMaskFile(CallbackConformance):
    callback = WeightSaliency

    def arguments_in(self, folder):
        return {"mask": str(half(Host()).save(folder / "mask.safetensors"))}


class TestConformanceOfARandomMask(CallbackConformance):
    callback = WeightSaliency
    arguments: ClassVar = {"random": True}


# -- tools -------------------------------------------------------------------------------------------------------------
class Tensors(pl.LightningDataModule):
    def __init__(self, inputs, targets, batch_size):
        super().__init__()
        self.dataset, self.batch_size = TensorDataset(inputs, targets), batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)


class Linear(pl.LightningModule):
    def __init__(self, size=5):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(size, 1, bias=False)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def half_square(outputs, targets):
    return 0.5 * (outputs[:, 0] - targets).square().mean()


class Saliency(WeightSaliency):
    """Keeps the scores."""

    def saliency(self, trainer, host):
        self.scores = {name: score.clone() for name, score in super().saliency(trainer, host).items()}
        return self.scores


def saliency_of(inputs, targets, forget, batch_size, **kwargs):
    callback = Saliency(loss=half_square, **kwargs)
    host = Linear(inputs.shape[1])
    data = ForgetSplit(Tensors(inputs, targets, batch_size), ForgetIndices(forget))
    pl.Trainer(**{**QUIET, "max_epochs": 0, "callbacks": [callback]}).fit(host, datamodule=data)
    assert host.net.weight.grad is None
    return callback.scores["net.weight"].flatten(), host.net.weight.detach().flatten()


def regression(count=16):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 5, generator=generator), torch.randn(count, generator=generator)


def fitted(*callbacks, host=None, data=None, **kwargs):
    host = host or Host()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **kwargs})
    trainer.fit(host, datamodule=data or forget_random(Data()))
    return host


# -- the saliency ------------------------------------------------------------------------------------------------------
def test_linear_regression_in_closed_form():
    inputs, targets = regression()
    forget = (0, 3, 4, 9, 10, 15)
    found, weight = saliency_of(inputs, targets, forget, batch_size=2)
    X, y = inputs[list(forget)], targets[list(forget)]  # noqa: N806
    torch.testing.assert_close(found, (X.T @ (X @ weight - y)).abs(), rtol=1e-5, atol=1e-6)


def test_order_and_size_of_batches_do_not_matter():
    inputs, targets = regression()
    first, _ = saliency_of(inputs, targets, range(8), batch_size=2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist() + list(range(8, 16))
    shuffled, _ = saliency_of(inputs[order], targets[order], range(8), batch_size=2)
    torch.testing.assert_close(first, shuffled, rtol=1e-5, atol=1e-6)
    # 8 rows in batches of 3: the incomplete batch counts with its rows
    uneven, _ = saliency_of(inputs, targets, range(8), batch_size=3)
    torch.testing.assert_close(first, uneven, rtol=1e-5, atol=1e-6)


def test_opposite_gradients_cancel():
    inputs = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 1.0]])
    with torch.no_grad():
        prediction = Linear(2).net(inputs)[:, 0]
    # residuals +1 and -1 on equal inputs; the third row is retained
    targets = prediction + torch.tensor([1.0, -1.0, 5.0])
    with pytest.raises(ValueError, match="to have an entry other than zero, but got none"):
        saliency_of(inputs, targets, (0, 1), batch_size=1)
    one, _ = saliency_of(inputs, targets, (0,), batch_size=1)
    torch.testing.assert_close(one, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_counts_are_exact_and_those_of_topk(ratio):
    callback = Saliency(ratio=ratio)
    fitted(callback, max_epochs=0)
    scores = torch.cat([score.flatten() for score in callback.scores.values()])
    mask = torch.cat([kept.flatten() for kept in callback.mask.values()])
    assert list(callback.mask) == list(named_parameters(Host()))
    assert int(mask.sum()) == int(ratio * len(scores))
    expected = torch.zeros_like(mask)
    expected[scores.topk(int(ratio * len(scores))).indices] = True
    assert torch.equal(scores[mask].sort().values, scores[expected].sort().values)
    if len(scores.unique()) == len(scores):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("random", [False, True])
def test_masks_are_nested_in_the_ratio(random):
    masks = []
    for ratio in (0.1, 0.4, 0.7):
        fitted(callback := WeightSaliency(ratio, random=random, seed=1), max_epochs=0)
        masks.append(callback.mask)
    for small, large in itertools.pairwise(masks):
        assert all(bool((large[name] | ~small[name]).all()) for name in small)
        assert small.kept < large.kept


def test_scope_layer_keeps_the_share_of_each_tensor():
    callback = Saliency(0.4, scope="layer")
    fitted(callback, max_epochs=0)
    for name, score in callback.scores.items():
        assert int(callback.mask[name].sum()) == int(0.4 * score.numel())
        assert score[callback.mask[name]].min() >= score[~callback.mask[name]].max()


def test_saliency_is_taken_in_eval_mode_at_the_loaded_weights(tmp_path):
    other = Host()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.save(other.state_dict(), tmp_path / "trained.pt")
    found, expected = Saliency(), Saliency()
    fitted(LoadWeights(str(tmp_path / "trained.pt")), found, host=Host(dropout=0.5), max_epochs=0)
    fitted(expected, host=other, max_epochs=0)
    assert all(torch.equal(found.scores[name], expected.scores[name]) for name in expected.scores)


def test_parameters_that_take_no_gradient_are_left_out():
    host = Host()
    host.net[0].bias.requires_grad_(False)
    fitted(callback := WeightSaliency(), host=host, max_epochs=1)
    assert "net.0.bias" not in callback.mask


# -- the hold ----------------------------------------------------------------------------------------------------------
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=5e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=5e-4),
}


class WithOptimizer(Host):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


def moved(callback, host, **kwargs):
    """Largest move of weights with m = 0, and of weights with m = 1, after 20 steps."""
    before = {name: value.detach().clone() for name, value in named_parameters(host).items()}
    fitted(callback, FineTune(), host=host, max_epochs=-1, max_steps=20, **kwargs)
    assert host.trainer.global_step == 20
    apart = {name: (value.detach() - before[name]).abs() for name, value in named_parameters(host).items()}
    masks = callback.mask
    return (
        max(float(apart[name][~masks[name]].max()) for name in masks if not masks[name].all()),
        max(float(apart[name][masks[name]].max()) for name in masks if masks[name].any()),
    )


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]
)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_held_weights_do_not_move_at_all(optimizer, settings):
    held, free = moved(WeightSaliency(0.5), WithOptimizer(optimizer), **settings)
    assert held == 0.0
    assert free > 1e-3


class GradientOnly(WeightSaliency):
    """What the first idea would be: edit the gradient, and leave the weights to the optimizer."""

    def _hold_weights(self, optimizer):
        return


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_an_edited_gradient_alone_does_not_hold(optimizer):
    held, _ = moved(GradientOnly(0.5), WithOptimizer(optimizer))
    assert held > 1e-6


def test_clipping_by_norm_does_not_count_held_weights():
    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = {name: value.grad for name, value in named_parameters(pl_module).items()}
            self.outside = max(float(gradients[name][~mask].abs().max()) for name, mask in saliency.mask.items())

    saliency, norm = WeightSaliency(0.3), Norm()
    fitted(saliency, FineTune(), norm, max_epochs=1)
    assert norm.outside == 0.0


def test_hold_comes_before_zero():
    """A weight that is both held and pruned is zero."""

    class Zeroes(WeightSaliency):
        def attach(self, trainer, host, attachment):
            super().attach(trainer, host, attachment)
            attachment.constrain(self, ConstraintPhase.ZERO, lambda _: named_parameters(host)["net.0.bias"].zero_())

    host = fitted(Zeroes(0.0), FineTune())
    assert not host.net[0].bias.any()


# -- ranks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("random", [False, True])
def test_masks_of_ranks_whose_generators_differ(tmp_path, random):
    callback = WeightSaliency(0.4, random=random)
    first, second = fit_on_two_ranks(
        tmp_path,
        Host(),
        forget_random(Data(batch_size=4)),
        [callback, FineTune()],
        lambda *_: callback.mask.state_dict(),
        max_epochs=1,
    )
    fitted(alone := WeightSaliency(0.4, random=random), FineTune(), max_epochs=1)
    for name, mask in alone.mask.items():
        assert torch.equal(ParameterMask.from_state_dict(first)[name], mask)
        assert torch.equal(ParameterMask.from_state_dict(second)[name], mask)


def test_uneven_shards_sum_to_the_whole(tmp_path):
    callback = Saliency()
    data = ForgetSplit(Data(batch_size=4), ForgetRandom(num=7))
    ranks = fit_on_two_ranks(tmp_path, Host(), data, [callback], lambda *_: callback.scores, max_epochs=1)
    fitted(alone := Saliency(), data=ForgetSplit(Data(), ForgetRandom(num=7)), max_epochs=0)
    for name, score in alone.scores.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], score, rtol=1e-5, atol=1e-6)


def test_random_masks_by_seed():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(masks))
        fitted(callback := WeightSaliency(random=True, seed=seed), max_epochs=0)
        masks.append(callback.mask)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])


# -- mask files --------------------------------------------------------------------------------------------------------
def test_a_mask_file_gives_the_same_run(tmp_path):
    first = fitted(saliency := WeightSaliency(0.4), FineTune())
    saliency.save_mask(str(tmp_path / "mask.safetensors"))
    second = fitted(again := WeightSaliency(mask=str(tmp_path / "mask.safetensors")), FineTune())
    assert all(torch.equal(again.mask[name], saliency.mask[name]) for name in saliency.mask)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_loss_by_its_import_path_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    config = "callback: {class_path: WeightSaliency, init_args: {loss: torch.nn.functional.multi_margin_loss}}"
    callback = parser.instantiate(parser.parse_string(config)).callback
    assert callback.saliency_loss is F.multi_margin_loss
    fitted(callback, FineTune(), max_epochs=1)


def test_no_mask_to_save(tmp_path):
    with pytest.raises(RuntimeError, match=r"^Expected a run to have made a mask before it is saved, but none has\.$"):
        WeightSaliency().save_mask(str(tmp_path / "mask"))


def refused(mask, tmp_path, error=ValueError):
    host = Host()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(error) as caught:
        fitted(WeightSaliency(mask=str(mask)), host=host)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    return str(caught.value).replace(str(tmp_path), "FOLDER")


def test_missing_mask_file(tmp_path):
    assert refused(tmp_path / "none", tmp_path, FileNotFoundError) == (
        "Expected FOLDER/none to be a file of kind 'lightning_trust.mask', but there is no such file."
    )


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_truncated_mask_file(tmp_path, cut):
    path = half(Host()).save(tmp_path / "mask")
    path.write_bytes(path.read_bytes()[:cut])
    message = refused(path, tmp_path)
    assert message.startswith("Expected FOLDER/mask to be a whole file of kind 'lightning_trust.mask', but it is trunc")


def test_damaged_mask_file(tmp_path):
    path = half(Host()).save(tmp_path / "mask")
    content = bytearray(path.read_bytes())
    content[:8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    assert "is truncated or damaged" in refused(path, tmp_path)


def test_mask_of_other_shapes(tmp_path):
    mask = dict(half(Host()))
    mask["net.0.weight"] = torch.ones(6, 16, dtype=torch.bool)
    assert refused(ParameterMask(mask).save(tmp_path / "mask"), tmp_path) == (
        "Expected the mask of FOLDER/mask to have the shapes of the parameters of Host, but got 1 other(s):"
        " 'net.0.weight': (6, 16) instead of (16, 6)."
    )


def test_mask_of_other_names(tmp_path):
    mask = dict(half(Host()))
    mask["net.0.weights"] = mask.pop("net.0.weight")
    assert refused(ParameterMask(mask).save(tmp_path / "mask"), tmp_path) == (
        "Expected the mask of FOLDER/mask to name parameters of Host, but got 1 unknown name(s):"
        " 'net.0.weights' (close: 'net.0.weight', 'net.3.weight')."
    )


def test_mask_that_leaves_parameters_out(tmp_path):
    mask = dict(half(Host()))
    del mask["net.3.bias"]
    assert refused(ParameterMask(mask).save(tmp_path / "mask"), tmp_path) == (
        "Expected the mask of FOLDER/mask to name every trained parameter of Host, but got none for 1: net.3.bias."
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_or_a_kill_leaves_the_old_mask_and_nothing_else(tmp_path, monkeypatch, error):
    fitted(callback := WeightSaliency(0.4), max_epochs=0)
    path = half(Host()).save(tmp_path / "mask")
    old = path.read_bytes()

    def full(_):
        raise error

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(type(error)):
        callback.save_mask(str(path))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [-0.1, 1.1, 50, float("nan")])
def test_ratio(ratio):
    with pytest.raises(ValueError, match=rf"^Expected argument `ratio` to be .*\[0, 1\], but got {ratio}\.$"):
        WeightSaliency(ratio)


def test_scope():
    with pytest.raises(ValueError, match=r"^Expected argument `scope` to be 'global' or 'layer', but got 'erk'\.$"):
        WeightSaliency(scope="erk")


def test_two_masks():
    with pytest.raises(
        MisconfigurationException,
        match=r"^WeightSaliency\(random=True, mask='file'\) has two masks\. Give one of the two arguments\.$",
    ):
        WeightSaliency(random=True, mask="file")


def test_needs_a_split():
    with pytest.raises(MisconfigurationException, match=r"^WeightSaliency needs to know what is to be forgotten, but"):
        fitted(WeightSaliency(), data=Data())


def constant(outputs, targets):
    return 0.0 * outputs.sum()


def detached(outputs, targets):
    return outputs.detach().sum()


def infinite(outputs, targets):
    return outputs.sum() * float("inf")


@pytest.mark.parametrize("loss", [constant, detached])
def test_saliency_that_is_zero_everywhere(loss):
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected the gradient of the loss on the forget set to have an entry other than zero, but got none:"
            r" WeightSaliency cannot tell salient weights\. Is the loss constant, or the network frozen\?$"
        ),
    ):
        fitted(WeightSaliency(loss=loss))


def test_saliency_that_is_not_finite():
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected the gradient of the loss on the forget set to be finite, because WeightSaliency ranks the"
            r" weights by it, but got NaN or infinite values in 4 parameter\(s\): net\.0\.weight, net\.0\.bias,"
            r" net\.3\.weight, net\.3\.bias\. Is the loaded model sound\?$"
        ),
    ):
        fitted(WeightSaliency(loss=infinite))


def test_outputs_and_targets_that_have_no_cross_entropy():
    start = r"^Expected the network to put out logits of shape \(N, K\), and the targets to be integer class labels"
    inputs, targets = regression()
    data = ForgetSplit(Tensors(inputs, targets, 2), ForgetIndices((0, 1)))
    with pytest.raises(
        ValueError,
        match=start + r".* but got torch\.float32 of shape \(2, 1\) and torch\.float32 of shape \(2,\)\. Pass",
    ):
        fitted(WeightSaliency(), host=Linear(), data=data)

    class Dict(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    host = Host()
    host.net = Dict(6, 3)
    with pytest.raises(ValueError, match=start + r".* but got a dict and torch\.int64 of shape \(8,\)\. Pass another"):
        fitted(WeightSaliency(), host=host)
