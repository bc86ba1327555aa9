"""Kinds of hosts and Trainers: claims, late networks, compiled hosts, strategies, tuners, flags, both packages."""

from __future__ import annotations

import functools
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_trust.core.host import ATTACHMENT, find_network
from lightning_trust.core.masks import ParameterMask, WeightZeroing, select_parameters
from lightning_trust.core.step import (
    EXCLUSIVE_CLAIMS,
    Attachment,
    BuildPhase,
    ConstraintPhase,
    GradientPhase,
    HostCallback,
    StepTransform,
)
from tests.core.hosts import CLASSES, Host, loader, net, rows, trainer
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks


class Relabel(StepTransform):
    """Changes the batch."""

    def __init__(self, shift: int = 1, name: str | None = None) -> None:
        super().__init__(name=name)
        self.shift, self.prepared = shift, 0

    def prepare(self, host, batch, ctx):
        self.prepared += 1
        return self.batch_spec.replace(batch, targets=(self.batch_spec.targets_of(batch) + self.shift) % CLASSES)


class Double(StepTransform):
    """Changes the loss."""

    def loss(self, host, step, batch, ctx):
        return 2.0 * step(batch)


class Zero(HostCallback):
    """Prunes half of the weights of the linear layers."""

    def attach(self, trainer, host, attachment):
        self.calls: list[str] = []
        attachment.edit_gradients(self, GradientPhase.PROJECT, lambda _: self.zeroing.gradients())
        attachment.constrain(self, ConstraintPhase.ZERO, lambda _: self.zeroing.weights())

    def begin(self, trainer, host):
        self.calls.append("begin")
        weights = select_parameters(host, ["Linear"])
        scores = {name: value.detach().abs() for name, value in weights.items()}
        self.use(ParameterMask.with_sparsity(scores, 0.5), host)

    def resume(self, trainer, host, state):
        self.calls.append("resume")
        self.use(ParameterMask.from_state_dict(state["mask"]), host)

    def use(self, mask, host):
        self.mask, self.zeroing = mask, WeightZeroing(mask, host)
        self.zeroing.weights()

    def state(self):
        return {"mask": self.mask.state_dict()}

    def holds(self, host) -> bool:
        return all(not value[~mask].any() for value, mask in self.mask.pairs(host))


# -- claims ------------------------------------------------------------------------------------------------------------
class First(HostCallback):
    """Claims what the test says."""

    @property
    def all_claims(self):
        return ("weights", self.name)


class Second(First):
    """Another."""


@pytest.mark.parametrize("claim", EXCLUSIVE_CLAIMS)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_an_exclusive_claim_twice_names_both(tmp_path, claim, stage):
    host, relabel = Host(), Relabel()
    relabel.stages = ("fit", "validate")
    callbacks = [relabel, First(claim), Second(claim)]
    with pytest.raises(MisconfigurationException) as error:
        getattr(trainer(tmp_path, *callbacks), stage)(host, loader())
    assert str(error.value) == (
        f"First and Second both want to {EXCLUSIVE_CLAIMS[claim]}; a run can have one. Remove one of them from"
        " `callbacks`."
    )
    assert ATTACHMENT not in host.__dict__
    assert host.seen == []
    # once is fine
    relabel.stages = ("fit",)
    trainer(tmp_path, *callbacks[:2], max_steps=1).fit(host, loader())


@pytest.mark.parametrize("claim", ["loss", "weights", "gradient_edit"])
def test_a_shared_claim_passes(tmp_path, claim):
    host = Host()
    trainer(tmp_path, First(claim), Second(claim), max_steps=1).fit(host, loader())
    assert len(host.seen) == 1


def test_what_replaces_the_loss_claims_it():
    class Replace(StepTransform):
        replaces_loss = True
        claims = ("labels",)

    assert Replace().all_claims == ("labels", "replaces_loss")
    assert Relabel().all_claims == ()


def test_two_of_one_class_take_names(tmp_path):
    host, callbacks = Host(), [Relabel(1, "a"), Relabel(1, "b")]
    assert [callback.state_key for callback in callbacks] == ["Relabel[a]", "Relabel[b]"]
    assert Relabel().state_key == "Relabel"
    trainer(tmp_path, *callbacks, max_steps=1).fit(host, loader())
    assert torch.equal(host.seen[0], (torch.arange(6) + 2) % CLASSES)
    # their streams differ
    assert callbacks[0].random.sample_seed("x") != callbacks[1].random.sample_seed("x")


# -- networks that are built late --------------------------------------------------------------------------------------
class BuiltInSetup(Host):
    """Builds its network in `setup`."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage):
        torch.manual_seed(7)
        self.net = net()


class BuiltInConfigureModel(Host):
    """Builds its network in `configure_model`, as large models are."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(7)
            self.net = net()


HOSTS = [Host, BuiltInSetup, BuiltInConfigureModel]


class Doubled(nn.Module):
    """A wrapper with a parameter of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.inner(x)


class Wrap(HostCallback):
    """Wraps the network once it is there."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def attach(self, trainer, host, attachment):
        attachment.when_built(self, host, BuildPhase.WRAP, self.wrap)

    def wrap(self, host):
        self.events.append("wrap")
        assert isinstance(host.net, nn.Sequential)
        self.attachment.undo.callback(setattr, host, "net", host.net)
        host.net = Doubled(host.net)


class Load(HostCallback):
    """Sets the weights once they are there."""

    def __init__(self, events: list[str], value: float = 0.125) -> None:
        super().__init__()
        self.events, self.value = events, value

    def attach(self, trainer, host, attachment):
        attachment.when_built(self, host, BuildPhase.LOAD, self.load)

    def load(self, host):
        self.events.append("load")
        assert isinstance(host.net, nn.Sequential)
        with torch.no_grad():
            for parameter in host.net.parameters():
                parameter.fill_(self.value)


class Watch(Callback):
    """What the network is when the fit starts."""

    def on_fit_start(self, trainer, pl_module):
        self.network = pl_module.net
        self.values = {value.item() for p in pl_module.parameters() for value in p.unique()}
        self.optimized = sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"])


@pytest.mark.parametrize("make", HOSTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_weights_are_loaded_before_the_network_is_wrapped(tmp_path, make, swapped):
    events: list[str] = []
    host, watch = make(), Watch()
    callbacks = [Wrap(events), Load(events), Relabel()] if not swapped else [Load(events), Relabel(), Wrap(events)]
    trainer(tmp_path, *callbacks, watch).fit(host, loader())
    assert events == ["load", "wrap"]
    assert isinstance(watch.network, Doubled)
    assert watch.values == {0.125, 1.0}
    # the wrapper's parameter is in the optimizer, and has moved
    assert watch.optimized == sum(parameter.numel() for parameter in net().parameters()) + 1
    assert watch.network.scale.item() != 1.0
    assert isinstance(host.net, nn.Sequential)
    assert watch.network.inner is host.net
    assert not {"setup", "configure_model", ATTACHMENT} & set(host.__dict__)
    # and once more on the same host
    trainer(tmp_path, *callbacks, watch).fit(host, loader())
    assert events == ["load", "wrap"] * 2
    assert isinstance(host.net, nn.Sequential)


@pytest.mark.parametrize("make", HOSTS)
def test_a_checkpoint_that_is_resumed_wins_over_what_was_loaded(tmp_path, make):
    events: list[str] = []
    run = trainer(tmp_path, Load(events, 0.5))
    run.fit(make(), loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    expected = {name: value.clone() for name, value in run.lightning_module.state_dict().items()}
    found = {}

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            found.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    trainer(tmp_path, Load(events, 0.25), Keep(), max_epochs=2).fit(make(), loader(), ckpt_path=tmp_path / "first.ckpt")
    assert_equal_states(found, expected)


@pytest.mark.parametrize("make", HOSTS)
def test_building_comes_before_ddp(tmp_path, make):
    class ByRank(Load):
        """Ranks load different weights, which DDP makes equal; and one wraps after."""

        def attach(self, trainer, host, attachment):
            self.value = 0.25 * (1 + trainer.global_rank)
            super().attach(trainer, host, attachment)

    events: list[str] = []
    watch = Watch()
    callbacks = [Wrap(events), ByRank(events), watch]
    results = fit_on_two_ranks(
        tmp_path,
        make(),
        DataLoader(rows(), batch_size=3),
        callbacks,
        lambda _, host: (host.net.inner.state_dict(), watch.values, events),
        max_epochs=1,
    )
    for _, values, order in results:
        assert values == {0.25, 1.0}
        assert order == ["load", "wrap"]
    assert_equal_states(results[0][0], results[1][0])


@pytest.mark.parametrize("make", HOSTS)
def test_methods_on_networks_that_are_built_late(tmp_path, make):
    host, zero, relabel = make(), Zero(), Relabel()
    trainer(tmp_path, relabel, Double(), zero).fit(host, loader())
    assert zero.holds(host)
    assert torch.equal(host.seen[0], (torch.arange(6) + 1) % CLASSES)
    assert find_network(host) is host.net
    expected = Host()
    trainer(tmp_path, Relabel(), Double(), Zero()).fit(expected, loader())
    assert_equal_states(host.state_dict(), expected.state_dict())


# -- manual optimisation -----------------------------------------------------------------------------------------------
class Manual(Host):
    """Two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def test_manual_hosts_take_changes_of_the_batch(tmp_path):
    host, zero, edits = Manual(), Zero(), []

    class Edit(HostCallback):
        def attach(self, trainer, host, attachment):
            attachment.edit_gradients(self, GradientPhase.SCALE, edits.append)

    run = trainer(tmp_path, Relabel(), zero, Edit())
    run.fit(host, loader())
    assert [found.tolist() for found in host.seen] == [((torch.arange(6) + 1) % CLASSES).tolist()] * 4
    assert zero.holds(host)
    assert [run.optimizers.index(optimizer) for optimizer in edits] == [0, 1] * 4


def test_manual_hosts_keep_their_loss_to_themselves(tmp_path):
    host = Manual()
    with pytest.raises(MisconfigurationException) as error:
        trainer(tmp_path, Relabel(), Double()).fit(host, loader())
    assert str(error.value) == (
        "Double changes the loss, but Manual optimises manually and keeps its loss to itself."
        " Set `automatic_optimization = True`, or use a callback that changes the batch only."
    )
    assert host.seen == []
    assert ATTACHMENT not in host.__dict__
    assert "training_step" not in host.__dict__


# -- compiled hosts ----------------------------------------------------------------------------------------------------
def compiled_whole(host: Host) -> Any:
    return torch.compile(host, backend="eager")


def compiled_network(host: Host) -> Host:
    host.net = torch.compile(host.net, backend="eager")
    return host


def compiled_in_place(host: Host) -> Host:
    host.compile(backend="eager")
    return host


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_network, compiled_in_place])
def test_compiled_hosts(tmp_path, compiled):
    host, zero, relabel = Host(), Zero(), Relabel()
    model = compiled(host)
    before = {name: id(value) for name, value in host.__dict__.items() if callable(value)}
    callbacks = [relabel, Double(), zero]
    trainer(tmp_path, *callbacks).fit(model, loader(), loader(6))
    plain = Host()
    trainer(tmp_path, Relabel(), Double(), Zero()).fit(plain, loader(), loader(6))
    own = {name.replace("_orig_mod.", ""): value for name, value in host.state_dict().items()}
    assert_equal_states(own, plain.state_dict(), rtol=1e-5, atol=1e-6)
    assert list(zero.mask) == ["net.0.weight", "net.2.weight"]
    assert relabel.prepared == 4
    # a second fit of the same compiled object, and what the user had set is there still
    trainer(tmp_path, *callbacks).fit(model, loader())
    assert relabel.prepared == 8
    assert zero.holds(host)
    assert ATTACHMENT not in host.__dict__
    if compiled is not compiled_whole:  # Lightning itself sets the steps of such a host anew
        assert before == {name: id(value) for name, value in host.__dict__.items() if callable(value)}
    host.seen.clear()
    trainer(tmp_path).fit(model, loader())
    assert [found.tolist() for found in host.seen] == [(torch.arange(6) % CLASSES).tolist()] * 4
    assert relabel.prepared == 8


# -- strategies --------------------------------------------------------------------------------------------------------
class FSDPStrategy(SingleDeviceStrategy):
    """A strategy that was not tested, by its name."""


def test_unsupported_strategies_are_refused_in_words(tmp_path):
    host = Host()
    with pytest.raises(MisconfigurationException, match="Relabel supports the strategies SingleDevice or DDP, but"):
        trainer(tmp_path, Relabel(), strategy=FSDPStrategy(torch.device("cpu"))).fit(host, loader())
    assert host.seen == []
    assert ATTACHMENT not in host.__dict__

    class Supports(Relabel):
        strategies = ("FSDPStrategy",)

    trainer(tmp_path, Supports(), strategy=FSDPStrategy(torch.device("cpu"))).fit(host, loader())
    assert len(host.seen) == 4


# -- tuners and flags --------------------------------------------------------------------------------------------------
class Tunable(Host):
    """Has a learning rate and a batch size to find."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 2

    def train_dataloader(self):
        return DataLoader(rows(), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(rows(), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.1)


def test_a_search_for_a_learning_rate_is_one_of_the_plain_host(tmp_path):
    # Lightning sets all callbacks aside for the search
    host, zero, relabel = Tunable(), Zero(), Relabel()
    found = Tuner(trainer(tmp_path, relabel, Double(), zero)).lr_find(host, num_training=10)
    plain = Tunable()
    expected = Tuner(trainer(tmp_path)).lr_find(plain, num_training=10)
    assert found.results == expected.results
    assert relabel.prepared == 0
    assert ATTACHMENT not in host.__dict__
    assert "training_step" not in host.__dict__
    assert_equal_states(host.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "finder", [lambda: LearningRateFinder(num_training_steps=8), lambda: BatchSizeFinder("power", 1, 2, 2)]
)
@pytest.mark.parametrize("last", [False, True])
def test_a_search_within_the_fit(tmp_path, finder, last):
    host, zero, relabel = Tunable(), Zero(), Relabel()
    callbacks = [relabel, Double(), zero]
    callbacks.insert(3 if last else 0, finder())
    trainer(tmp_path, *callbacks, max_epochs=2).fit(host)
    assert zero.calls == ["begin"]
    assert zero.holds(host)
    assert relabel.prepared == 2 * len(host.train_dataloader())
    assert list(tmp_path.glob("**/*.ckpt")) == []


def test_weights_that_are_averaged(tmp_path):
    states = []
    for order in (1, -1):
        host = Host()
        callbacks = [Relabel(), Double(), EMAWeightAveraging(decay=0.8)][::order]
        trainer(tmp_path, *callbacks, max_epochs=2).fit(host, loader(), loader(6))
        assert all(torch.equal(found, (torch.arange(6) + 1) % CLASSES) for found in host.seen)
        states.append(host.state_dict())

    class Expected(Host):
        def training_step(self, batch, batch_idx):
            return 2.0 * F.cross_entropy(self(batch[0]), (batch[1] + 1) % CLASSES)

    plain = Expected()
    trainer(tmp_path, EMAWeightAveraging(decay=0.8), max_epochs=2).fit(plain, loader(), loader(6))
    for state in states:
        assert_equal_states(state, plain.state_dict(), rtol=1e-5, atol=1e-6)


FLAGS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": True},
    "no validation": {"limit_val_batches": 0},
    "no training": {"limit_train_batches": 0},
    "no epochs": {"max_epochs": 0},
    "barebones": {"barebones": True},
    "anomaly": {"detect_anomaly": True},
    "no inference mode": {"inference_mode": False},
    "profiler": {"profiler": "simple"},
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_the_trainer(tmp_path, flags):
    host, zero, relabel = Host(), Zero(), Relabel()
    relabel.stages = ("fit", "validate")
    settings = {**QUIET, "max_epochs": 1, "default_root_dir": tmp_path, **FLAGS[flags]}
    run = pl.Trainer(callbacks=[relabel, Double(), zero], **settings)
    run.fit(host, loader(), loader(12))
    assert zero.calls == ["begin"]
    assert zero.holds(host)
    # 4 batches of fit and 2 of validation, 2 more of the sanity check where there is one
    expected = {"fast_dev_run": 2, "no validation": 4, "no training": 2, "no epochs": 2, "barebones": 6}.get(flags, 8)
    assert relabel.prepared == expected
    assert ATTACHMENT not in host.__dict__
    run.validate(host, loader(12), verbose=False)
    assert ATTACHMENT not in host.__dict__


# -- state -------------------------------------------------------------------------------------------------------------
def test_state_that_was_loaded_and_not_yet_taken_up_is_saved_again(tmp_path):
    host, zero = Host(), Zero()
    run = trainer(tmp_path, zero)
    run.fit(host, loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    again = Zero()
    other = trainer(tmp_path, again)
    other.validate(host, loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    other.save_checkpoint(tmp_path / "second.ckpt")
    first, second = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("first", "second"))
    assert str(first["callbacks"]["Zero"]) == str(second["callbacks"]["Zero"])
    # a fit that is no resume begins anew
    other.fit(host, loader())
    assert again.calls == ["begin"]


def test_nothing_is_saved_of_a_callback_that_has_not_started(tmp_path):
    saved = []

    class Early(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")
            saved.append(torch.load(tmp_path / "early.ckpt", weights_only=True)["callbacks"])

    zero = Zero()
    trainer(tmp_path, Early(), zero).fit(Host(), loader())
    assert zero.state_dict().keys() == {"mask"}
    # not even of an earlier fit's
    trainer(tmp_path, Early(), zero).fit(Host(), loader())
    assert saved == [{}, {}]


def test_observe_comes_before_any_begin(tmp_path):
    order = []

    class Observer(HostCallback):
        def observe(self, trainer, host):
            order.append(("observe", self.name, float(host.net[0].bias[0])))

        def begin(self, trainer, host):
            order.append(("begin", self.name, float(host.net[0].bias[0])))
            with torch.no_grad():
                host.net[0].bias.add_(1.0)

        def resume(self, trainer, host, state):
            order.append(("resume", self.name, 0.0))

        def state(self):
            return {"state": 1}

    host = Host()
    nn.init.zeros_(host.net[0].bias)
    run = trainer(tmp_path, Observer("a"), Observer("b"))
    run.fit(host, loader())
    assert order == [("observe", "a", 0.0), ("observe", "b", 0.0), ("begin", "a", 0.0), ("begin", "b", 1.0)]
    run.save_checkpoint(tmp_path / "first.ckpt")
    order.clear()
    trainer(tmp_path, Observer("a"), Observer("b"), max_epochs=2).fit(host, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert order == [("resume", "a", 0.0), ("resume", "b", 0.0)]


# -- the other package -------------------------------------------------------------------------------------------------
class PytorchLightningHost(pytorch_lightning.LightningModule):
    """A host of `import pytorch_lightning as pl`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = net()
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1])
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def test_hosts_and_trainers_of_pytorch_lightning(tmp_path):
    host, zero, relabel = PytorchLightningHost(), Zero(), Relabel()
    relabel.stages = ("fit", "validate")
    settings = {**QUIET, "max_epochs": 2, "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
    run = pytorch_lightning.Trainer(callbacks=[relabel, Double(), zero], **settings)
    run.fit(host, loader(), loader(6))
    plain = Host()
    trainer(tmp_path, Relabel(), Double(), Zero(), max_epochs=2).fit(plain, loader(), loader(6))
    assert_equal_states(host.state_dict(), plain.state_dict())
    assert relabel.prepared == 10
    assert ATTACHMENT not in host.__dict__
    assert "training_step" not in host.__dict__
    assert not run.optimizers[0]._optimizer_step_post_hooks
    # state is saved, and a run is resumed
    run.save_checkpoint(tmp_path / "first.ckpt")
    again = Zero()
    run = pytorch_lightning.Trainer(callbacks=[Relabel(), again], **{**settings, "max_epochs": 3})
    run.fit(host, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert again.calls == ["resume"]
    assert again.holds(host)

    class Broken(pytorch_lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("in the step")

    run = pytorch_lightning.Trainer(callbacks=[Relabel(), Zero(), Broken()], **settings)
    with pytest.raises(RuntimeError, match="in the step"):
        run.fit(host, loader())
    assert ATTACHMENT not in host.__dict__


# -- cost --------------------------------------------------------------------------------------------------------------
class Nothing(StepTransform):
    """Changes nothing, with all that a transform can have."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0, 0]

    def prepare(self, host, batch, ctx):
        self.calls[0] += 1
        return batch

    def loss(self, host, step, batch, ctx):
        self.calls[1] += 1
        return step(batch)


def test_the_chain_costs_microseconds(tmp_path, capsys):
    """A report, with a bound far above what it costs: the machine of a test is busy."""
    loss = torch.zeros((), requires_grad=True)

    class Bare(Host):
        def training_step(self, batch, batch_idx):
            return loss

    found = []

    class Time(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            chain = Attachment.on(pl_module).chain()
            plain = functools.partial(Bare.training_step, pl_module)
            for step in (pl_module.training_step, plain):
                seconds = []
                for _ in range(300):
                    chain.forget()
                    start = time.perf_counter()
                    step(batch, 0)
                    seconds.append(time.perf_counter() - start)
                found.append(sorted(seconds)[150])

    transform = Nothing()
    trainer(tmp_path, transform, Time(), max_steps=1).fit(Bare(), loader())
    assert transform.calls == [301, 301]
    with capsys.disabled():
        print(f"\nchain and one transform: {1e6 * (found[0] - found[1]):.1f} microseconds a step")
    assert found[0] - found[1] < 500e-6
