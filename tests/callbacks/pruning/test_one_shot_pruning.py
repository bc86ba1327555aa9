import copy
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn.utils import prune

from lightning_trust.callbacks import ExactResume, FineTune, L1Sparse, OneShotPruning, RandomLabel, SalUn
from lightning_trust.core.host import named_parameters
from lightning_trust.core.masks import ParameterMask, erk_densities
from tests.conformance import CallbackConformance, Data, Host, Kill, forget_random
from tests.two_ranks import QUIET, fit_on_two_ranks


class TestConformance(CallbackConformance):
    callback = OneShotPruning
    arguments: ClassVar = {"sparsity": 0.5, "method": "random", "scope": "erk"}


# -- tools -------------------------------------------------------------------------------------------------------------
class ConvNet(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            nn.Flatten(),
            nn.Linear(24, 3),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def fitted(*callbacks, host=None, data=None, ckpt_path=None, **kwargs):
    host = Host() if host is None else host
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **kwargs})
    trainer.fit(host, datamodule=data or Data(), ckpt_path=ckpt_path)
    return host


def assert_pruned(host, mask):
    parameters = named_parameters(host)
    for name, kept in mask.items():
        assert not parameters[name][~kept].any(), name
        assert parameters[name][kept].all(), name


# -- which weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_global_magnitude_equals_torch(sparsity):
    reference = ConvNet()
    convs = [(reference.net[1], "weight"), (reference.net[4], "weight")]
    prune.global_unstructured(convs, prune.L1Unstructured, amount=sparsity)
    fitted(pruning := OneShotPruning(sparsity, include=["Conv2d"]), host=ConvNet(), max_epochs=0)
    assert list(pruning.mask) == ["net.1.weight", "net.4.weight"]
    for name, (layer, _) in zip(pruning.mask, convs, strict=True):
        assert torch.equal(pruning.mask[name], layer.weight_mask.bool())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_magnitude_by_layer_equals_torch(sparsity):
    reference = ConvNet()
    fitted(pruning := OneShotPruning(sparsity, scope="layer"), host=ConvNet(), max_epochs=0)
    assert list(pruning.mask) == ["net.1.weight", "net.4.weight", "net.6.weight"]
    for name in pruning.mask:
        layer = reference.get_submodule(name.removesuffix(".weight"))
        prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(pruning.mask[name], layer.weight_mask.bool())


def test_erk_densities_are_those_of_the_formula():
    fitted(pruning := OneShotPruning(0.5, scope="erk"), host=ConvNet(), max_epochs=0)
    densities = erk_densities({name: mask.shape for name, mask in pruning.mask.items()}, 0.5)
    for name, mask in pruning.mask.items():
        assert int(mask.sum()) == mask.numel() - round((1 - densities[name]) * mask.numel())
    # two layers have fewer weights than sum of dimensions asks for, and stay dense
    assert pruning.mask.sparsity == pytest.approx(0.5, abs=0.02)
    assert len(set(densities.values())) > 1


def test_random_by_seed_and_not_by_the_global_generator():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(10 + len(masks))
        fitted(pruning := OneShotPruning(0.5, method="random", seed=seed), max_epochs=0)
        masks.append(torch.cat([mask.flatten() for mask in pruning.mask.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert abs(float((masks[0] == masks[2]).float().mean()) - 0.5) < 0.2


def test_random_follows_seed_everything_and_the_name():
    masks = []
    for seed, name in ((3, None), (3, None), (4, None), (3, "other")):
        pl.seed_everything(seed, verbose=False)
        fitted(pruning := OneShotPruning(0.5, method="random", name=name), max_epochs=0)
        masks.append(torch.cat([mask.flatten() for mask in pruning.mask.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, (), ["net.1.weight", "net.4.weight", "net.6.weight"]),
        (["Conv2d"], (), ["net.1.weight", "net.4.weight"]),
        (["Conv2d", "Linear"], ["net.1.*"], ["net.4.weight", "net.6.weight"]),
        (["*.weight"], ["BatchNorm2d"], ["net.1.weight", "net.4.weight", "net.6.weight"]),
        (["net.[16].weight"], (), ["net.1.weight", "net.6.weight"]),
        (None, ["Linear"], ["net.1.weight", "net.4.weight"]),
        (["net.6.bias"], (), ["net.6.bias"]),
    ],
)
def test_globs_and_layer_names(include, exclude, names):
    fitted(pruning := OneShotPruning(0.2, include=include, exclude=exclude), host=ConvNet(), max_epochs=0)
    assert list(pruning.mask) == names


class Tied(Host):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        self.net[2].weight = self.net[0].weight


def test_tied_weights_count_once():
    host = fitted(pruning := OneShotPruning(0.5), host=Tied())
    assert list(pruning.mask) == ["net.0.weight", "net.3.weight"]
    assert host.net[2].weight is host.net[0].weight
    assert_pruned(host, pruning.mask)


def test_names_of_compiled_hosts_are_the_plain_ones():
    host = ConvNet()
    host.net = torch.compile(host.net, backend="eager")
    fitted(pruning := OneShotPruning(0.5, include=["net.1.weight", "Linear"]), host=host)
    assert list(pruning.mask) == ["net.1.weight", "net.6.weight"]
    assert_pruned(host, pruning.mask)
    fitted(again := OneShotPruning(0.5), host=torch.compile(ConvNet(), backend="eager"), max_epochs=0)
    assert list(again.mask) == ["net.1.weight", "net.4.weight", "net.6.weight"]


# -- how it holds ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unlearner", [FineTune, RandomLabel, L1Sparse, SalUn, lambda: RandomLabel(mode="sequential")])
def test_the_zero_set_is_that_of_the_start_after_every_unlearner(unlearner):
    start = ParameterMask.with_sparsity(OneShotPruning(0.6).scores(Host()), 0.6)
    host = fitted(OneShotPruning(0.6), unlearner(), data=forget_random(Data()), max_epochs=3)
    assert_pruned(host, start)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weights_are_zero_in_every_forward_pass(optimizer):
    class Watched(Host):
        def configure_optimizers(self):
            make = {
                "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
                "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
                "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
            }[optimizer]
            return make(self.parameters())

        def training_step(self, batch, batch_idx):
            assert_pruned(self, pruning.mask)
            return super().training_step(batch, batch_idx)

    pruning = OneShotPruning(0.5)
    assert_pruned(fitted(pruning, host=Watched(), accumulate_grad_batches=2), pruning.mask)


def test_clipping_by_norm_does_not_count_pruned_gradients():
    """With a bound, the step is that of a run whose pruned weights do not exist."""

    class OneStep(Host):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    bound, before = 0.05, Host()
    host = fitted(
        pruning := OneShotPruning(0.8), host=OneStep(), gradient_clip_val=bound, max_epochs=1, limit_train_batches=1
    )
    parameters, start = named_parameters(host), named_parameters(before)
    kept = {name: pruning.mask.get(name, torch.ones_like(value).bool()) for name, value in parameters.items()}
    step = sum(float(((parameters[name] - start[name])[kept[name]] ** 2).sum()) for name in parameters) ** 0.5
    assert step == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)],
)
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights_keep_the_zeros(averaging, first):
    pruning = OneShotPruning(0.5)
    callbacks = [pruning, averaging()] if first else [averaging(), pruning]
    host = fitted(*callbacks, max_epochs=4)
    assert_pruned(host, pruning.mask)


def test_make_permanent():
    fitted(pruning := OneShotPruning(0.5))
    mask, other = pruning.mask, Host()
    pruning.make_permanent(other)
    assert_pruned(other, mask)
    assert pruning.mask is None
    assert pruning.table() == []
    with pytest.raises(
        RuntimeError, match=r"^Expected a run to have made a mask before it is made permanent, but none"
    ):
        pruning.make_permanent(other)


def test_make_permanent_of_another_network():
    fitted(pruning := OneShotPruning(0.5))
    with pytest.raises(
        ValueError, match=r"^Expected the mask to name parameters of ConvNet, but got 2 unknown name\(s\)"
    ):
        pruning.make_permanent(ConvNet())
    assert pruning.mask is not None


def test_table(capsys):
    fitted(pruning := OneShotPruning(0.5, scope="layer", verbose=True), host=ConvNet(), max_epochs=0)
    assert pruning.table() == [
        ("net.1.weight", (8, 1, 3, 3), 36, 72, 0.5),
        ("net.4.weight", (4, 8, 1, 1), 16, 32, 0.5),
        ("net.6.weight", (3, 24), 36, 72, 0.5),
    ]
    printed = capsys.readouterr().out
    assert "OneShotPruning: magnitude, layer, sparsity 0.5000" in printed
    assert "8x1x3x3" in printed


# -- what is logged ----------------------------------------------------------------------------------------------------
class Recorded(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged += [value for name, value in metrics.items() if name == "trust/sparsity"]


def test_sparsity_is_logged_once(tmp_path):
    logger = Recorded()
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fitted(OneShotPruning(0.5), saver, logger=logger, enable_checkpointing=True, max_epochs=3, log_every_n_steps=1)
    assert logger.logged == [pytest.approx(0.5, abs=0.01)]
    # resumed after the epoch in which it was logged, it has not changed; before the end of that epoch, nobody has it
    for step, times in ((8, 0), (3, 1)):
        again = Recorded()
        path = tmp_path / f"step={step}.ckpt"
        fitted(OneShotPruning(0.5), ExactResume(), logger=again, max_epochs=3, ckpt_path=path)
        assert len(again.logged) == times, step


# -- resume: complaint 1 -----------------------------------------------------------------------------------------------
def interrupted(folder, pruning, **kwargs):
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
    with pytest.raises(RuntimeError, match="killed"):
        fitted(pruning, saver, Kill(3), enable_checkpointing=True, **kwargs)
    return folder / "last.ckpt"


def sparsity(weight):
    return float((weight == 0).float().mean())


def test_the_mask_comes_back_where_lightnings_own_is_lost(tmp_path):
    class Before(Callback):
        """The sparsity with which a resumed run starts, and with which it ends."""

        def on_train_start(self, trainer, pl_module):
            self.start = sparsity(pl_module.net[0].weight)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.end = sparsity(pl_module.net[0].weight)

    # Lightning's
    def lightnings():
        host = Host()
        return host, ModelPruning("l1_unstructured", [(host.net[0], "weight")], amount=0.5, make_pruning_permanent=True)

    host, theirs = lightnings()
    saver = ModelCheckpoint(dirpath=tmp_path / "theirs", every_n_epochs=1, save_last=True, save_top_k=0)
    first = Before()
    fitted(theirs, first, saver, host=host, enable_checkpointing=True, max_epochs=2)
    assert first.end == pytest.approx(0.5, abs=0.01)
    host, theirs = lightnings()
    theirs._apply_pruning = False  # what was pruned once is not pruned again
    lost = Before()
    fitted(theirs, lost, host=host, ckpt_path=tmp_path / "theirs" / "last.ckpt", max_epochs=3)
    assert lost.end < 0.1

    # ours
    path = interrupted(tmp_path / "ours", OneShotPruning(0.5, scope="layer"))
    kept = Before()
    fitted(pruning := OneShotPruning(0.5, scope="layer"), ExactResume(), kept, ckpt_path=path, max_epochs=3)
    assert kept.start == kept.end == pytest.approx(0.5, abs=0.01)
    saved = torch.load(path, weights_only=True)["callbacks"]["OneShotPruning"]["mask"]
    assert all(torch.equal(ParameterMask.from_state_dict(saved)[name], mask) for name, mask in pruning.mask.items())


def test_the_checkpoint_is_the_hosts_own(tmp_path):
    path = interrupted(tmp_path, pruning := OneShotPruning(0.5))
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Host().state_dict())
    plain = Host()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    mask = ParameterMask.from_state_dict(checkpoint["callbacks"][pruning.state_key]["mask"])
    assert_pruned(plain, mask)
    assert Host.load_from_checkpoint(path).net[0].weight.shape == (16, 6)


def test_the_mask_of_a_resumed_run_is_that_of_its_start(tmp_path):
    """Trained weights would give another mask: it is not made anew."""
    path = interrupted(tmp_path, OneShotPruning(0.5), accumulate_grad_batches=2, max_epochs=3)
    start = ParameterMask.with_sparsity(OneShotPruning(0.5).scores(Host()), 0.5)
    host = fitted(
        pruning := OneShotPruning(0.9), ExactResume(), ckpt_path=path, accumulate_grad_batches=2, max_epochs=3
    )
    assert all(torch.equal(start[name], mask) for name, mask in pruning.mask.items())
    assert_pruned(host, start)


def test_a_mask_of_another_network_is_refused_on_resume(tmp_path):
    path = interrupted(tmp_path, OneShotPruning(0.5))
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["OneShotPruning"]["mask"]
    state["net.0.weight"]["shape"] = [6, 16]
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected the mask of the checkpoint to have the shapes of the parameters of Host, but got 1 other\(s\):"
            r" 'net\.0\.weight': \(6, 16\) instead of \(16, 6\)\.$"
        ),
    ):
        fitted(OneShotPruning(0.5), ExactResume(), ckpt_path=path)


def test_two_of_the_class(tmp_path):
    first, second = OneShotPruning(0.5, include=["net.0.*"]), OneShotPruning(0.2, include=["net.3.weight"], name="head")
    host = fitted(first, second)
    assert_pruned(host, first.mask)
    assert_pruned(host, second.mask)


# -- ranks: complaint 2 ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_ranks_whose_generators_differ_have_equal_masks_and_weights(tmp_path, method):
    pruning = OneShotPruning(0.5, method=method)
    first, second = fit_on_two_ranks(
        tmp_path,
        Host(),
        Data(batch_size=4),
        [pruning],
        lambda _, module: (pruning.mask.state_dict(), module.state_dict()),
        max_epochs=1,
    )
    for name, entry in first[0].items():
        assert torch.equal(entry["bits"], second[0][name]["bits"])
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    host = Host()
    host.load_state_dict(first[1])
    assert_pruned(host, ParameterMask.from_state_dict(first[0]))


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [1.0, -0.1, 95, float("nan")])
def test_sparsity(wrong):
    with pytest.raises(
        ValueError, match=rf"^Expected argument `sparsity` to be a share of zeros in \[0, 1\), but got {wrong}\.$"
    ):
        OneShotPruning(wrong)


def test_words():
    with pytest.raises(
        ValueError, match=r"^Expected argument `method` to be 'magnitude' or 'random', but got 'omp'\.$"
    ):
        OneShotPruning(0.5, method="omp")
    with pytest.raises(
        ValueError, match=r"^Expected argument `scope` to be 'global', 'layer' or 'erk', but got 'per_tensor'\.$"
    ):
        OneShotPruning(0.5, scope="per_tensor")


def test_patterns_that_match_nothing_list_close_names():
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected argument `include` to match parameters of ConvNet, but got 'net\.1\.weigth', which matches"
            r" none\. Close names: 'net\.1\.weight', "
        ),
    ):
        fitted(OneShotPruning(0.5, include=["net.1.weigth"]), host=ConvNet())
    with pytest.raises(ValueError, match=r"`exclude` to match .* but got 'Conv2D', .* Close names: 'Conv2d'"):
        fitted(OneShotPruning(0.5, exclude=["Conv2D"]), host=ConvNet())
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected arguments `include` and `exclude` to leave a parameter of ConvNet, but got \['Linear'\] without"
            r" \['net\.6\.\*'\], which leaves none\.$"
        ),
    ):
        fitted(OneShotPruning(0.5, include=["Linear"], exclude=["net.6.*"]), host=ConvNet())


def test_a_host_without_linear_or_convolution_layers():
    class Norms(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))

    with pytest.raises(
        ValueError,
        match=(
            r"^Expected Norms to have linear or convolution layers, but got none\. Pass `include=\[\.\.\.\]` with name"
            r" globs of parameters\.$"
        ),
    ):
        fitted(OneShotPruning(0.5), host=Norms())
    fitted(OneShotPruning(0.5, include=["net.*"]), host=Norms(), max_epochs=0)


def test_weights_that_are_not_finite():
    host = Host()
    with torch.no_grad():
        host.net[0].weight[0, 0] = float("nan")
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(
        ValueError, match=r"^Expected the scores of 'net\.0\.weight' to be finite, but got NaN or infinite values\.$"
    ):
        fitted(OneShotPruning(0.5), host=host)
    assert torch.equal(host.net[3].weight, before["net.3.weight"])


def test_an_optimizer_that_moves_weights_several_times_a_step():
    class WithLBFGS(Host):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(
        MisconfigurationException,
        match=r"^OneShotPruning constrains weights after each optimizer step, but LBFGS moves them several times",
    ):
        fitted(OneShotPruning(0.5), host=WithLBFGS())
