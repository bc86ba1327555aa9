"""ZerothOrderGradient: an estimate in place of the backward pass, and optimizers that ask for losses themselves."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_trust.attacks import PGD
from lightning_trust.callbacks import AdversarialTraining, ExactResume, OneShotPruning, ZerothOrderGradient
from lightning_trust.core.space import InputSpace
from lightning_trust.optim import CGE, RGE, ZOSGD, ZOSVRG, ForwardGradient, GradientEstimator, MeZO, ZOSignSGD
from tests.conformance import BATCH, CLASSES, ROWS, CallbackConformance, Data, Host, Kill, PartnerGradient, rows
from tests.two_ranks import assert_equal_states, fit_on_two_ranks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class TestCoordinates(CallbackConformance):
    callback = ZerothOrderGradient
    arguments: ClassVar = {"estimator": {"class_path": "CGE", "init_args": {"mu": 0.05}}}
    # differences of float32 losses of size 1, over mu
    tolerance: ClassVar[float] = 2e-5


class TestDirections(CallbackConformance):
    callback = ZerothOrderGradient
    arguments: ClassVar = {"estimator": {"class_path": "RGE", "init_args": {"q": 4, "mu": 0.05}}}
    tolerance: ClassVar[float] = 2e-4


class TestForwardGradients(CallbackConformance):
    callback = ZerothOrderGradient
    arguments: ClassVar = {"estimator": {"class_path": "ForwardGradient", "init_args": {"q": 2}}}
    tolerance: ClassVar[float] = 1e-5


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Metrics(Host):
    """A host with BatchNorm, dropout, metrics and logs."""

    def __init__(self, optimizer=SGD, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)
        )
        self.optimizer = optimizer
        self.accuracy, self.sum = MulticlassAccuracy(CLASSES), SumMetric()

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.sum.update(loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def trainer(*callbacks: Any, **settings: Any) -> pl.Trainer:
    return pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **settings})


def loader(batch_size: int = BATCH, count: int = ROWS) -> DataLoader:
    return DataLoader(rows(count), batch_size=batch_size)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_central_coordinates_train_as_back_propagation_does(accumulate):
    """In float64, with BatchNorm, dropout, clipping and accumulation: the same weights, logs, statistics."""
    settings = {"precision": "64-true", "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    host, plain = Metrics(), Metrics()
    run, expected = trainer(ZerothOrderGradient(CGE(mu=1e-4, central=True)), **settings), trainer(**settings)
    torch.manual_seed(0)
    run.fit(host, loader())
    drawn = torch.rand(3)
    torch.manual_seed(0)
    expected.fit(plain, loader())
    assert torch.equal(drawn, torch.rand(3))
    assert_equal_states(host.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(host.net[0].weight, Metrics().double().net[0].weight)
    assert host.net[1].num_batches_tracked == ROWS // BATCH
    assert run.callback_metrics["count"] == ROWS // BATCH
    torch.testing.assert_close(run.callback_metrics["accuracy"], expected.callback_metrics["accuracy"])
    torch.testing.assert_close(host.sum.compute(), plain.sum.compute(), rtol=1e-5, atol=1e-7)
    assert run.global_step == expected.global_step


def test_no_graph_is_built():
    class Looks(Host):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert not loss.requires_grad
            return loss

    trainer(ZerothOrderGradient(RGE())).fit(Looks(), loader())


class Differentiates(Host):
    """Asks for a derivative in the middle of its step, with gradients on or as it comes."""

    def __init__(self, how: str, enabled: bool, optimizer=None) -> None:
        super().__init__()
        self.how, self.enabled, self.optimizer = how, enabled, optimizer

    def training_step(self, batch, batch_idx):
        with torch.set_grad_enabled(self.enabled or torch.is_grad_enabled()):
            loss = super().training_step(batch, batch_idx)
            if self.how == "grad":
                torch.autograd.grad(loss, list(self.parameters()))
            elif self.how == "functional":
                torch.autograd.backward([loss])
            else:
                loss.backward()
        return loss.detach().requires_grad_() if torch.is_grad_enabled() else loss

    def configure_optimizers(self):
        return super().configure_optimizers() if self.optimizer is None else self.optimizer(self.parameters())


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("how", ["backward", "functional", "grad"])
def test_a_step_that_differentiates_is_refused(how, enabled):
    kept = torch.autograd.backward, torch.autograd.grad
    call = r"`torch\.autograd\.grad`" if how == "grad" else r"`\.backward\(\)`"
    words = rf"without back-propagation, .* Differentiates.training_step calls {call}"
    for source, optimizer in ((ZerothOrderGradient(RGE()), None), (ZerothOrderGradient(), partial(MeZO, lr=0.01))):
        host = Differentiates(how, enabled, optimizer)
        with pytest.raises(MisconfigurationException, match=words):
            trainer(source).fit(host, loader())
        assert (torch.autograd.backward, torch.autograd.grad) == kept
        assert all(parameter.grad is None for parameter in host.parameters())
    # what it does is its own affair in a run with back-propagation
    trainer().fit(Differentiates(how, enabled), loader())


def test_an_attack_around_the_step_may_differentiate():
    """Adversarial examples come from gradients of the network, the gradient of the weights from losses alone."""

    class Looks(Host):
        seen: ClassVar = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    space = InputSpace(-10.0, 10.0)
    attack = AdversarialTraining(PGD(eps=0.1, steps=2, space=space, random_start=False))
    host, plain = Looks(), Host()
    run = trainer(attack, ZerothOrderGradient(CGE(mu=1e-4, central=True)), precision="64-true", max_steps=2)
    run.fit(host, loader())
    gap = (host.seen[0] - next(iter(loader()))[0]).abs().amax()
    torch.testing.assert_close(gap, torch.full_like(gap, 0.1))
    attack = AdversarialTraining(PGD(eps=0.1, steps=2, space=space, random_start=False))
    trainer(attack, precision="64-true", max_steps=2).fit(plain, loader())
    assert_equal_states(host.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_snr_and_queries_are_logged_and_kept():
    source = ZerothOrderGradient(RGE(q=3, distribution="rademacher"))
    host = Host().double()
    run = trainer(source, precision="64-true", max_epochs=2)
    run.fit(host, loader())
    d = sum(parameter.numel() for parameter in host.parameters())
    assert source.queries == 2 * (ROWS // BATCH) * 3 * 2
    assert run.callback_metrics["trust/zo_queries"] == source.queries
    # up to rounding, which float64 has little of
    torch.testing.assert_close(run.callback_metrics["trust/zo_snr"].item(), 3 / (d - 1), rtol=1e-4, atol=0.0)
    assert source.state_dict()["queries"] == source.queries


def test_snr_is_zero_where_rounding_is_all_there_is():
    run = trainer(ZerothOrderGradient(RGE(mu=1e-9)))
    run.fit(Host(), loader())
    assert run.callback_metrics["trust/zo_snr"] == 0.0


def test_pruned_weights_stay_zero():
    host = Host()
    pruning = OneShotPruning(sparsity=0.5)
    trainer(pruning, ZerothOrderGradient(CGE()), max_epochs=2).fit(host, loader())
    mask = pruning.mask
    assert mask is not None
    for name, parameter in host.named_parameters():
        if name in mask:
            assert (parameter[~mask[name]] == 0.0).all()
            assert 0.3 < mask[name].float().mean() < 0.7


# -- optimizers that ask for losses themselves -------------------------------------------------------------------------
def by_hand(optimizer: Any, host: Host, batches: list, epochs: int = 1) -> None:
    for _ in range(epochs):
        for x, y in batches:
            optimizer.step(lambda x=x, y=y: F.cross_entropy(host.net(x), y))


OPTIMIZERS = {
    "mezo": partial(MeZO, lr=0.01, seed=5, weight_decay=0.1),
    "mezo_several": partial(MeZO, lr=0.01, q=3, seed=5),
    "zo_sgd": partial(ZOSGD, lr=0.01, estimator=RGE(q=2, central=False), momentum=0.9, seed=5),
    "zo_sign_sgd": partial(ZOSignSGD, lr=0.01, seed=5),
}


class Asking(Host):
    """A host whose optimizer asks for losses itself."""

    def __init__(self, optimizer=OPTIMIZERS["mezo"], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.named_parameters())


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_run_equals_a_plain_loop(name, clean):
    host, twin = Asking(OPTIMIZERS[name]), Asking(OPTIMIZERS[name])
    source = ZerothOrderGradient(clean_forward=clean)
    run = trainer(source, max_epochs=2)
    run.fit(host, loader())
    by_hand(OPTIMIZERS[name](twin.named_parameters()), twin, list(loader()), epochs=2)
    # two evaluations of a loss by other code differ in the last digit, over mu
    assert_equal_states(host.state_dict(), twin.state_dict(), rtol=0.0, atol=1e-5)
    assert not torch.equal(host.net[0].weight, Asking().net[0].weight)
    assert run.global_step == 2 * ROWS // BATCH
    assert source.queries > 0
    if "mezo" in name:
        assert all(parameter.grad is None for parameter in host.parameters())


@pytest.mark.parametrize(("clean", "expected"), [(True, 3), (False, 2)])
def test_evaluations_of_a_mezo_step(clean, expected):
    class Counts(Asking):
        calls = 0
        befores = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            self.befores += 1

    host = Counts()
    trainer(ZerothOrderGradient(clean_forward=clean)).fit(host, loader())
    steps = ROWS // BATCH
    # the first step sees that the loss is the same twice
    assert host.calls == expected * steps + (1 if clean else 2)
    assert host.befores == steps


@pytest.mark.parametrize("clean", [True, False])
def test_dropout_statistics_and_logs_of_an_asking_optimizer(clean):
    """Both evaluations of a pair have the same dropout; statistics and metrics count one evaluation."""
    host = Metrics(partial(MeZO, lr=0.0), dropout=0.5)
    snr = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            snr.append(trainer.optimizers[0].last.loss)

    run = trainer(ZerothOrderGradient(clean_forward=clean), Look())
    run.fit(host, loader())
    assert host.net[1].num_batches_tracked == ROWS // BATCH
    assert run.callback_metrics["count"] == ROWS // BATCH
    # with other dropout in the two, derivatives would be of the size of 1 / mu
    slopes = host.trainer.optimizers[0].last
    assert slopes.snr < 1.0
    losses = host.sum.compute() / (ROWS // BATCH)
    torch.testing.assert_close(losses, torch.stack(snr).mean(), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("after", [2, 7])
def test_an_asking_optimizer_killed_and_resumed_equals_uninterrupted(tmp_path, after):
    def run(folder, *extra, **kwargs):
        torch.manual_seed(11)
        host = Asking(partial(MeZO, lr=0.01), dropout=0.3)
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        each = trainer(
            ZerothOrderGradient(),
            ExactResume(),
            saver,
            *extra,
            max_epochs=2,
            enable_checkpointing=True,
            default_root_dir=folder,
        )
        each.fit(host, Data(shuffle=True), **kwargs)
        return host

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(after))
    torch.rand(3)
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_states(whole.state_dict(), resumed.state_dict())


def test_svrg_estimates_its_anchors_on_the_training_data():
    """With exact gradients: as SVRG by hand."""
    optimizer = partial(ZOSVRG, lr=0.05, estimator=CGE(mu=1e-4, central=True), epoch_len=2, anchor_batches=2)
    host, twin = Asking(optimizer).double(), Asking(optimizer).double()
    plain = Host()
    torch.manual_seed(0)
    trainer().fit(plain, loader())
    drawn = torch.rand(3)
    torch.manual_seed(0)
    trainer(ZerothOrderGradient(), precision="64-true").fit(host, loader())
    assert torch.equal(drawn, torch.rand(3))
    batches = [(x.double(), y) for x, y in loader()]

    def gradient(net, batch):
        return torch.autograd.grad(F.cross_entropy(net(batch[0]), batch[1]), list(net.parameters()))

    anchor = full = None
    for step, batch in enumerate(batches):
        if step % 2 == 0:
            anchor = copy.deepcopy(twin.net)
            full = [sum(each) / 2 for each in zip(*(gradient(anchor, other) for other in batches[:2]), strict=True)]
        here, there = gradient(twin.net, batch), gradient(anchor, batch)
        with torch.no_grad():
            for parameter, g, a, f in zip(twin.net.parameters(), here, there, full, strict=True):
                parameter.sub_(0.05 * (g - a + f))
    assert_equal_states(host.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-7)


# -- ranks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: ZerothOrderGradient(RGE(q=2)), id="rge"),
        pytest.param(lambda: ZerothOrderGradient(CGE()), id="cge"),
    ],
)
def test_two_ranks_with_data_of_their_own_stay_bit_identical(tmp_path, source):
    """20 steps, dropout and BatchNorm, generators that differ."""
    first, second = fit_on_two_ranks(tmp_path, Metrics(), Data(batch_size=4), [source()], max_epochs=4, max_steps=20)
    parameters = [name for name in first if "running" not in name]
    assert all(torch.equal(first[name], second[name]) for name in parameters)


@pytest.mark.parametrize("clean", [True, False])
def test_two_ranks_of_an_asking_optimizer_stay_bit_identical(tmp_path, clean):
    source = ZerothOrderGradient(clean_forward=clean)
    host = Asking(OPTIMIZERS["mezo"], dropout=0.3)
    first, second = fit_on_two_ranks(tmp_path, host, Data(batch_size=4), [source], max_epochs=4, max_steps=20)
    assert_equal_states(first, second)
    assert not torch.equal(first["net.0.weight"], Asking().net[0].weight)


class SameData(Data):
    """The same batches on all ranks."""

    def train_dataloader(self):
        return DataLoader(rows(), batch_size=self.batch_size)


@pytest.mark.parametrize("estimator", [CGE(mu=0.05), RGE(q=3, mu=0.05)], ids=["cge", "rge"])
def test_ranks_that_share_the_queries_equal_one_rank(tmp_path, estimator):
    source = ZerothOrderGradient(estimator, parallel="queries", seed=2)
    settings = {"max_epochs": 2, "use_distributed_sampler": False}

    def result(run, module):
        return module.state_dict(), run.callbacks[1].queries, run.callbacks[1].bytes_sent

    (first, asked, sent), (second, other, _) = fit_on_two_ranks(
        tmp_path, Host(dropout=0.0), SameData(), [source], result, **settings
    )
    assert_equal_states(first, second)
    host = Host(dropout=0.0)
    alone = copy.deepcopy(source)
    trainer(alone, max_epochs=2).fit(host, SameData())
    assert_equal_states(first, host.state_dict(), rtol=0.0, atol=2e-4)
    steps = 2 * ROWS // BATCH
    if isinstance(estimator, CGE):
        d = sum(parameter.numel() for parameter in host.parameters())
        # each rank has a clean pass, and about half of the coordinates
        assert asked + other == alone.queries + steps
        assert 0.2 * alone.queries < asked < 0.8 * alone.queries
        # one float32 a coordinate, and nothing else, crosses
        assert sent == steps * 4 * d


def test_ranks_that_share_the_queries_draw_the_same_dropout(tmp_path):
    source = ZerothOrderGradient(CGE(), parallel="queries")
    first, second = fit_on_two_ranks(
        tmp_path, Metrics(), SameData(), [source], max_epochs=1, use_distributed_sampler=False
    )
    assert_equal_states(first, second)


def test_ranks_that_share_the_queries_must_share_the_batch(tmp_path):
    source = ZerothOrderGradient(CGE(), parallel="queries")
    with pytest.raises(Exception, match="needs the same batch on all ranks, but their losses at equal"):
        fit_on_two_ranks(tmp_path, Host(), Data(batch_size=4), [source], max_epochs=1)


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_refused_before_training():
    with pytest.raises(ValueError, match="`parallel` to be 'data' or 'queries', but got 'rows'"):
        ZerothOrderGradient(parallel="rows")
    with pytest.raises(MisconfigurationException, match="but the optimizer MeZO estimates by itself"):
        trainer(ZerothOrderGradient(RGE())).fit(Asking(), loader())
    with pytest.raises(MisconfigurationException, match=r"without an estimator needs .* but got SGD"):
        trainer(ZerothOrderGradient()).fit(Host(), loader())
    with pytest.raises(MisconfigurationException, match="none to accumulate, but got accumulate_grad_batches=2"):
        trainer(ZerothOrderGradient(), accumulate_grad_batches=2).fit(Asking(), loader())
    with pytest.raises(MisconfigurationException, match=r"none to clip, but got gradient_clip_val=0\.5"):
        trainer(ZerothOrderGradient(), gradient_clip_val=0.5).fit(Asking(), loader())
    with pytest.raises(MisconfigurationException, match="none to edit, but PartnerGradient edits gradients"):
        trainer(ZerothOrderGradient(), PartnerGradient()).fit(Asking(), loader())
    lbfgs = Metrics(partial(torch.optim.LBFGS, lr=0.1))
    with pytest.raises(MisconfigurationException, match="LBFGS asks for many within one"):
        trainer(ZerothOrderGradient(RGE())).fit(lbfgs, loader())


def test_fp16_scaling_is_refused():
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="no backward pass whose loss could be scaled"):
        trainer(ZerothOrderGradient(RGE()), plugins=[plugin]).fit(Host(), loader())


def test_manual_optimisation_is_refused():
    class Manual(Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="Manual optimises manually"):
        trainer(ZerothOrderGradient(RGE())).fit(Manual(), loader())


class Bad(Host):
    """A host whose loss is wrong in some way."""

    def __init__(self, loss) -> None:
        super().__init__()
        self.own = loss
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return self.own(self, F.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("estimator", "loss", "words"),
    [
        (RGE(), lambda host, loss: loss + host.calls, "the same when it is evaluated twice at the same weights"),
        (CGE(), lambda host, loss: loss * torch.nan, r"got nan at coordinate 0 of 'net.0.weight' \(mu=0.005\)"),
        (RGE(q=2), lambda host, loss: loss * torch.nan, r"got nan along direction 1 of 2 \(mu=0.001\)"),
        (
            CGE(feature_reuse=False),
            lambda host, loss: loss / (host.net[3].bias[1] < 0.1 + host.net[3].bias[0]).float(),
            "at coordinate",
        ),
    ],
)
def test_losses_that_are_wrong(estimator: GradientEstimator, loss, words):
    host = Bad(loss)
    if words == "at coordinate":
        host.net[3].bias.data[:2] = torch.tensor([0.0, 0.098])
        words = r"got inf at coordinate 1 of 'net.3.bias'"
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(ValueError, match=words):
        trainer(ZerothOrderGradient(estimator)).fit(host, loader())
    assert_equal_states(host.state_dict(), before, rtol=0.0, atol=1e-6)


def test_a_budget_far_below_the_published_one_is_told():
    with pytest.warns(UserWarning, match="runs of its paper have 20,000 or more, but this one has 6"):
        trainer(ZerothOrderGradient()).fit(Asking(), loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*validation_step.*")
        trainer(ZerothOrderGradient(CGE())).fit(Host(), loader())


def test_half_precision_is_warned_of():
    with pytest.warns(UserWarning, match="differences of mu=0.001 may be below what half precision"):
        trainer(ZerothOrderGradient(RGE()), precision="bf16-mixed").fit(Host(), loader())


def test_forward_gradients_of_an_operation_without_a_derivative():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, CLASSES)

        def forward(self, x):
            return Own.apply(self.linear(x))

    host = Host()
    host.net = Net()
    with pytest.raises(MisconfigurationException, match="operations that have a forward derivative"):
        trainer(ZerothOrderGradient(ForwardGradient())).fit(host, loader())
