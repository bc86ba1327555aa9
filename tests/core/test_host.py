"""Finding the network of a host, and wrapping its methods so that nothing is left."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import types
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import MeanMetric

from lightning_trust.core.host import (
    ATTACHMENT,
    close_names,
    find_network,
    named_parameters,
    overrides,
    plain_name,
)
from lightning_trust.core.step import Attachment
from tests.core.hosts import Host, net


class LightningModule(pl.LightningModule):
    """Users have bases of this name too."""

    def training_step(self, batch, batch_idx):
        return batch.sum()


class Derived(LightningModule):
    """A host of such a base."""


class PytorchLightningHost(pytorch_lightning.LightningModule):
    """A host of the other package."""

    def training_step(self, batch, batch_idx):
        return batch.sum()


def test_overrides():
    assert overrides(Host(), "training_step")
    assert not overrides(Host(), "configure_model")
    assert overrides(Derived(), "training_step")
    assert not overrides(Derived(), "forward")
    assert overrides(PytorchLightningHost(), "training_step")
    assert not overrides(PytorchLightningHost(), "configure_model")
    patched = pl.LightningModule()
    assert not overrides(patched, "training_step")
    patched.training_step = lambda batch, batch_idx: None
    assert overrides(patched, "training_step")


def test_names():
    assert close_names("layer.wieght", ["layer.weight", "layer.bias", "zzz"]).startswith("'layer.weight'")
    assert close_names("qqqq", {"a": 1, "b": 2}) == "'a', 'b'"
    assert close_names("a", []) == "none"
    assert plain_name("net._orig_mod.0._orig_mod.weight") == "net.0.weight"
    assert plain_name("net._orig_mod") == "net"
    host = Host()
    host.net = torch.compile(host.net, backend="eager")
    host.again = host.net
    assert list(named_parameters(host)) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]


# -- the network -------------------------------------------------------------------------------------------------------
class NoForward(pl.LightningModule):
    """A host that is only asked for steps."""


def test_find_network():
    host = Host()
    host.metric, host.criterion = MeanMetric(), nn.CrossEntropyLoss()
    assert find_network(host) is host.net
    assert find_network(host, "net") is host.net
    assert find_network(host, "net.2") is host.net[2]
    assert find_network(host, "") is host
    host.head = nn.Linear(3, 2)
    assert find_network(host) is host  # no child holds all; the host has a forward
    bare = NoForward()
    bare.model = torch.compile(net(), backend="eager")
    assert find_network(bare) is bare.model
    assert find_network(bare, "model.0") is bare.model._orig_mod[0]
    bare.forward = types.MethodType(lambda self, x: x, bare)
    assert find_network(bare, "") is bare


def test_a_network_that_is_not_there():
    with pytest.raises(ValueError, match=r"Expected argument `network` to name a sub-module of Host, but got 'nte'\."):
        find_network(Host(), "nte")
    bare = NoForward()
    bare.body, bare.head = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Expected NoForward to have one child .*network='<name>'.*'body', 'head'"):
        find_network(bare)
    with pytest.raises(ValueError, match="Expected NoForward to have one child"):
        find_network(bare, "")
    with pytest.raises(ValueError, match="Expected NoForward to have one child"):
        find_network(NoForward())


# -- wrapped methods ---------------------------------------------------------------------------------------------------
def attached(host: pl.LightningModule) -> Attachment:
    """What is attached in a run under way."""
    callback = SimpleNamespace()
    trainer = SimpleNamespace(callbacks=[callback])
    host._trainer = trainer
    attachment = Attachment(trainer, host)
    attachment.callbacks.append(callback)
    host.__dict__[ATTACHMENT] = attachment
    return attachment


class Counter(pl.LightningModule):
    """A step that tells who ran it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def training_step(self, batch, batch_idx=3, *, extra="none"):
        self.calls += 1
        return ["host", batch, batch_idx, extra]


def tagged(tag: str):
    def wrapper(host, call, *args, **kwargs):
        return [tag, *call(*args, **kwargs)]

    return wrapper


def test_wrappers_nest_by_order_and_then_as_they_came():
    host = Counter()
    attachment = attached(host)
    for tag, order in (("first", 0), ("second", 0), ("source", -1), ("inside", 1)):
        attachment.wrap(host, "training_step", tagged(tag), order)
    assert host.training_step(1, extra="x") == ["source", "first", "second", "inside", "host", 1, 3, "x"]
    assert host.training_step(batch=1, batch_idx=2)[-3:] == [1, 2, "none"]
    attachment.close()
    assert "training_step" not in host.__dict__
    assert ATTACHMENT not in host.__dict__
    assert host.training_step(1) == ["host", 1, 3, "none"]


def test_lightning_sees_the_method_that_it_would_see():
    host = Host()
    attachment = attached(host)
    for name in ("training_step", "configure_model", "setup"):
        attachment.wrap(host, name, lambda host, call, *args, **kwargs: call(*args, **kwargs))
    assert host.training_step.__name__ == "training_step"
    assert list(inspect.signature(host.training_step).parameters) == ["batch", "batch_idx"]
    assert is_overridden("training_step", host)
    assert not is_overridden("configure_model", host)
    assert not is_overridden("setup", host)


def test_a_patch_of_the_user_is_called_and_put_back():
    def patch(self, batch, batch_idx=0):
        return ["patch of", self, batch]

    for user in (
        types.MethodType(patch, Counter()),
        functools.partial(patch, "nobody"),
        lambda batch: ["plain", batch],
    ):
        host = Counter()
        host.training_step = user
        attachment = attached(host)
        attachment.wrap(host, "training_step", tagged("ours"))
        assert host.training_step(5) == ["ours", *user(5)]
        attachment.close()
        assert host.__dict__["training_step"] is user
    host = Counter()
    host.training_step = types.MethodType(patch, host)
    attachment = attached(host)
    attachment.wrap(host, "training_step", tagged("ours"))
    assert host.training_step(5) == ["ours", "patch of", host, 5]
    twin = copy.deepcopy(host)
    assert twin.training_step(5) == ["patch of", twin, 5]
    Attachment.on(twin).close()
    assert twin.training_step(5) == ["patch of", twin, 5]
    assert twin.__dict__["training_step"].__self__ is twin
    user = attachment.methods["training_step"].instance
    attachment.close()
    assert host.__dict__["training_step"] is user
    assert user.__self__ is host


def test_a_copy_runs_itself_and_is_plain():
    host = Counter()
    attachment = attached(host)
    attachment.wrap(host, "training_step", tagged("ours"))
    twin = copy.deepcopy(host)
    again = copy.deepcopy(twin)
    for module in (twin, again):
        assert module.training_step(1) == ["host", 1, 3, "none"]
        assert (module.calls, host.calls) == (1, 0)
    assert host.training_step(1)[0] == "ours"
    for module in (twin, again):
        Attachment.on(module).close()
        assert "training_step" not in module.__dict__
        assert ATTACHMENT not in module.__dict__
        assert module.training_step(1) == ["host", 1, 3, "none"]
    assert host.training_step(1)[0] == "ours"


def test_a_pickle_is_plain():
    host = Counter()
    attachment = attached(host)
    attachment.wrap(host, "training_step", tagged("ours"))
    host._trainer = None
    twin = pickle.loads(pickle.dumps(host))
    assert twin.training_step(1) == ["host", 1, 3, "none"]
    assert (twin.calls, host.calls) == (1, 0)
    assert Attachment.on(twin).callbacks == []


def test_links_of_a_run_that_is_over_do_nothing():
    host = Counter()
    attachment = attached(host)
    attachment.wrap(host, "training_step", tagged("ours"))
    run = host._trainer
    assert host.training_step(1)[0] == "ours"
    host._trainer = SimpleNamespace(callbacks=run.callbacks)
    assert host.training_step(1)[0] == "host"
    host._trainer = run
    assert host.training_step(1)[0] == "ours"
    run.callbacks = []  # as Lightning does while it searches for a learning rate
    assert host.training_step(1)[0] == "host"


def test_undo_comes_before_the_methods_whatever_fails():
    host = Counter()
    attachment = attached(host)
    order = []

    def undo() -> None:
        order.append("undone")
        assert "training_step" in host.__dict__

    def fail() -> None:
        order.append("failed")
        raise RuntimeError("undo")

    attachment.undo.callback(undo)
    attachment.undo.callback(fail)
    attachment.wrap(host, "training_step", tagged("ours"))
    with pytest.raises(RuntimeError, match="undo"):
        attachment.close()
    assert order == ["failed", "undone"]
    assert "training_step" not in host.__dict__
    assert ATTACHMENT not in host.__dict__
