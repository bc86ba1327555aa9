"""However a run ends, the host is what it was, and the next run works."""

from __future__ import annotations

import copy
import pickle
import signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_trust.core.host import ATTACHMENT
from lightning_trust.core.modes import eval_mode, frozen_parameters
from lightning_trust.core.step import (
    Attachment,
    BuildPhase,
    ConstraintPhase,
    GradientPhase,
    HostCallback,
    StepTransform,
)
from tests.core.hosts import CLASSES, Host, loader, trainer
from tests.two_ranks import assert_equal_states

STAGES = ("fit", "validate", "test", "predict")


class Relabel(StepTransform):
    """Changes the batch in every stage."""

    stages = STAGES

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name)
        self.prepared = 0

    def prepare(self, host, batch, ctx):
        self.prepared += 1
        return self.batch_spec.replace(batch, targets=(batch[1] + 1) % CLASSES)


class Replayed(StepTransform):
    """Asks twice, and is replayed once more in backward."""

    def attach(self, trainer, host, attachment):
        attachment.chain().replayable = True
        attachment.wrap(host, "backward", self.backward, order=-1)

    def backward(self, host, call, loss, *args, **kwargs):
        with torch.no_grad():
            self.attachment.chain().replay()
        return call(loss, *args, **kwargs)

    def loss(self, host, step, batch, ctx):
        return 0.5 * (step(batch) + step(batch))


class Everything(HostCallback):
    """Uses all that an attachment offers."""

    stages = STAGES

    def attach(self, trainer, host, attachment):
        attachment.wrap(host, "forward", lambda host, call, *args: call(*args))
        attachment.wrap(host, "configure_optimizers", lambda host, call: call())
        attachment.when_built(self, host, BuildPhase.WRAP, self.built)
        attachment.edit_gradients(self, GradientPhase.SCALE, lambda _: None)
        attachment.constrain(self, ConstraintPhase.CLAMP, lambda _: None)

    def built(self, host):
        self.attachment.undo.enter_context(frozen_parameters([host.net[0].bias]))
        self.attachment.undo.enter_context(eval_mode(host.dropout))
        net = host.net
        self.attachment.undo.callback(setattr, host, "net", net)
        host.net = nn.Sequential(*net, nn.Identity())


class Full(Host):
    """Has dropout, keeps its optimizer, and was patched by its user."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.kept = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def patched(batch, batch_idx):
            return Host.training_step(self, batch, batch_idx)

        self.training_step = patched

    def configure_optimizers(self):
        return [self.kept], [torch.optim.lr_scheduler.StepLR(self.kept, 1)]


# -- a bomb in every hook ----------------------------------------------------------------------------------------------
class Bomb:
    """Raises at its first chance, once it is armed."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        self.armed = False
        self.went_off = False

    def tick(self) -> None:
        if self.armed:
            self.armed, self.went_off = False, True
            raise self.kind("boom")


class Explosive(Callback):
    """A callback of the user's, with a bomb in one hook."""

    def __init__(self, hook: str, bomb: Bomb) -> None:
        def explode(*args: Any, **kwargs: Any) -> Any:
            bomb.tick()
            return {"state": 1} if hook == "state_dict" else None

        setattr(self, hook, explode)

    def state_dict(self):
        return {"state": 1}


def explosive_host(hook: str, bomb: Bomb) -> Full:
    original = getattr(Full, hook)

    def explode(self, *args: Any, **kwargs: Any) -> Any:
        bomb.tick()
        return original(self, *args, **kwargs)

    explode.__name__ = hook
    return type("Full", (Full,), {hook: explode})()


class Save(Callback):
    """Saves in mid-fit, so that the hooks of saving are called."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/saved.ckpt")


def in_fit(name: str) -> bool:
    return name.startswith("on_") and "_test_" not in name and "_predict_" not in name


CALLBACK_HOOKS = {
    "fit": [
        *(name for name in dir(Callback) if in_fit(name) and name != "on_exception"),
        *("setup", "teardown", "state_dict", "load_state_dict"),
    ],
    "test": [name for name in dir(Callback) if "_test_" in name],
    "predict": [name for name in dir(Callback) if "_predict_" in name],
}
MODULE_HOOKS = [
    *(name for name in dir(pl.LightningModule) if in_fit(name) and name != "on_gpu"),
    *("setup", "teardown", "configure_model", "configure_optimizers", "configure_callbacks", "prepare_data"),
    *("forward", "validation_step", "backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "log"),
    *("configure_gradient_clipping", "transfer_batch_to_device", "load_state_dict"),
]
OF_LOADING = ("on_load_checkpoint", "load_state_dict")
# Lightning's own marks on a module, and what the hosts of this file write down themselves
OTHERS = {"_trainer", "_current_fx_name", "_device", "_dtype", "seen", "training", "_fabric"}


def state_of(host: Full) -> dict[str, Any]:
    """All of a host that a run of ours may not change."""
    return {
        "attributes": {name: id(value) for name, value in host.__dict__.items() if name not in OTHERS},
        "modules": [(name, id(module)) for name, module in host.named_modules()],
        "children": [sorted(module.__dict__) for module in host.modules() if module is not host],
        "parameters": [(name, id(value), value.requires_grad) for name, value in host.named_parameters()],
        "names": list(host.state_dict()),
        "step hooks": [len(host.kept._optimizer_step_post_hooks), len(host.kept._optimizer_step_pre_hooks)],
        "module hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in host.modules()],
    }


def modes_of(host: Full) -> list[bool]:
    # where Lightning is stopped in mid-validation, what we had replaced or set is in the mode that it had when we came
    return [module.training for module in host.modules() if not isinstance(module, nn.Dropout | nn.Sequential)]


@pytest.fixture(autouse=True)
def _signals():
    # Lightning ignores Ctrl-C from the first one on, and keeps its own handlers where a run ends badly
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Where a run with an explosive callback was saved after its first epoch."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run = trainer(folder, *ours(), Explosive("state_dict", Bomb(RuntimeError)))
    run.fit(Full(), loader(12))
    run.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def ours() -> list[Callback]:
    return [Relabel(), Everything(), Replayed()]


def explode(folder, host: Full, callbacks: list[Callback], bomb: Bomb, stage: str = "fit", path: Any = None) -> None:
    bomb.armed, bomb.went_off = True, False
    run = trainer(folder, *callbacks, Save(), max_epochs=2, num_sanity_val_steps=1, gradient_clip_val=1.0)
    data = (
        {"train_dataloaders": loader(12), "val_dataloaders": loader(6)}
        if stage == "fit"
        else {"dataloaders": loader(6)}
    )
    with pytest.raises(SystemExit if bomb.kind is KeyboardInterrupt else bomb.kind):
        getattr(run, stage)(host, **data, ckpt_path=path)
    assert bomb.went_off


def fit_again(folder, host: Full, callbacks: list[Callback], before: dict[str, Any] | None = None) -> None:
    """The same callbacks attach to the same host, and leave it."""
    relabel = next(callback for callback in callbacks if isinstance(callback, Relabel))
    relabel.prepared = 0
    host.seen.clear()
    before = before or state_of(host)
    trainer(folder, *callbacks).fit(host, loader(12))
    assert relabel.prepared == 2
    assert len(host.seen) == 8  # for each batch, twice in the step and twice in the replay
    assert all(torch.equal(found, (torch.arange(6) + 1) % CLASSES) for found in host.seen)
    assert state_of(host) == before
    # and a run without them is a plain one
    host.seen.clear()
    trainer(folder).fit(host, loader(12))
    assert len(host.seen) == 2
    assert all(torch.equal(found, torch.arange(6) % CLASSES) for found in host.seen)


def assert_host_survives(folder, make, callbacks, bomb: Bomb, stage: str = "fit", path: Any = None) -> None:
    host, plain = make(), make()
    for module in (host, plain):
        # what Lightning leaves on a module is there from a run before
        trainer(folder).fit(module, loader(6), loader(6))
    explode(folder, plain, [callback for callback in callbacks if isinstance(callback, Explosive)], bomb, stage, path)
    before = state_of(host)
    explode(folder, host, callbacks, bomb, stage, path)
    assert state_of(host) == before
    assert modes_of(host) == modes_of(plain)
    assert ATTACHMENT not in host.__dict__
    assert host.__dict__["training_step"].__name__ == "patched"
    fit_again(folder, host, callbacks)


PLACES = [(RuntimeError, 0), (RuntimeError, 3), (KeyboardInterrupt, 0)]
PLACE_NAMES = ["exception-before", "exception-after", "interrupt-before"]


@pytest.mark.parametrize(("kind", "place"), PLACES, ids=PLACE_NAMES)
@pytest.mark.parametrize(
    ("stage", "hook"), [(stage, hook) for stage, hooks in CALLBACK_HOOKS.items() for hook in hooks]
)
def test_failure_in_any_hook_of_another_callback(tmp_path, checkpoint, stage, hook, kind, place):
    bomb = Bomb(kind)
    callbacks = ours()
    callbacks.insert(place, Explosive(hook, bomb))
    path = checkpoint if hook in OF_LOADING else None
    assert_host_survives(tmp_path, Full, callbacks, bomb, stage, path)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", MODULE_HOOKS)
def test_failure_in_any_hook_of_the_host(tmp_path, checkpoint, hook, kind):
    bomb = Bomb(kind)
    path = checkpoint if hook in OF_LOADING else None
    callbacks = [*ours(), Explosive("state_dict", Bomb(kind))] if path else ours()
    assert_host_survives(tmp_path, lambda: explosive_host(hook, bomb), callbacks, bomb, path=path)


OWN = ["attach", "observe", "begin", "resume", "state", "prepare", "loss", "setup", "teardown"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("place", [0, 2])
def test_failure_in_any_method_of_a_callback_of_ours(tmp_path, checkpoint, method, kind, place):
    bomb = Bomb(kind)

    class Failing(StepTransform):
        stages = STAGES

        def state(self):
            return {"state": 1}

    original = getattr(Failing, method)

    def explode(self, *args: Any, **kwargs: Any) -> Any:
        bomb.tick()
        return original(self, *args, **kwargs)

    setattr(Failing, method, explode)
    failing = Failing()
    callbacks = ours()
    callbacks.insert(place, failing)
    host = Full()
    trainer(tmp_path).fit(host, loader(6), loader(6))
    path = None
    if method == "resume":
        run = trainer(tmp_path, *callbacks)
        run.fit(host, loader(12))
        run.save_checkpoint(tmp_path / "first.ckpt")
        path = tmp_path / "first.ckpt"
    before = state_of(host)
    bomb.armed = True
    run = trainer(tmp_path, *callbacks, Save(), max_epochs=2)
    with pytest.raises(SystemExit if kind is KeyboardInterrupt else kind):
        run.fit(host, loader(12), loader(6), ckpt_path=path)
    assert bomb.went_off
    assert state_of(host) == before
    assert ATTACHMENT not in host.__dict__
    fit_again(tmp_path, host, callbacks)


# -- callbacks that fail on the way out --------------------------------------------------------------------------------
class FailsOnTheWayOut(Callback):
    """Keeps those behind it from leaving."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("in the step")

    def on_exception(self, *_: Any) -> None:
        raise ValueError("on the way out")


def stale(folder, host: Full, callbacks: list[Callback]) -> None:
    with pytest.raises(ValueError, match="on the way out"):
        trainer(folder, FailsOnTheWayOut(), *callbacks).fit(host, loader(12))
    assert ATTACHMENT in host.__dict__
    assert host.net[0].bias.requires_grad is False


def plain_fit(folder, host: Full) -> dict[str, torch.Tensor]:
    host.seen.clear()
    trainer(folder).fit(host, loader(12))
    assert len(host.seen) == 2
    assert all(torch.equal(found, torch.arange(6) % CLASSES) for found in host.seen)
    return host.state_dict()


@pytest.mark.parametrize("second", ["same", "others", "some", "evaluation"])
def test_stale_links_are_dropped(tmp_path, second):
    host = Full()
    trainer(tmp_path).fit(host, loader(6))
    before = state_of(host)
    callbacks = ours()
    stale(tmp_path, host, callbacks)
    # a run with none of our callbacks is a plain one
    plain_fit(tmp_path, host)
    if second == "same":
        fit_again(tmp_path, host, callbacks, before)
    elif second == "others":
        fit_again(tmp_path, host, ours(), before)
    elif second == "some":
        relabel = Relabel()
        trainer(tmp_path, relabel, callbacks[1]).fit(host, loader(12))
        assert relabel.prepared == 2
        assert callbacks[0].prepared == 1
        assert callbacks[0].attachment is None
    else:
        trainer(tmp_path, Relabel("other")).validate(host, loader(6))
    assert state_of(host) == before
    assert ATTACHMENT not in host.__dict__


def test_a_stale_callback_on_another_host(tmp_path):
    first, second = Full(), Full()
    for host in (first, second):
        trainer(tmp_path).fit(host, loader(6))
    before = [state_of(first), state_of(second)]
    callbacks = ours()
    stale(tmp_path, first, callbacks)
    fit_again(tmp_path, second, callbacks)
    assert [state_of(first), state_of(second)] == before
    plain_fit(tmp_path, first)


def test_the_same_trainer_without_the_callbacks(tmp_path):
    host, callbacks = Full(), ours()
    failing = FailsOnTheWayOut()
    run = trainer(tmp_path, failing, *callbacks)
    with pytest.raises(ValueError, match="on the way out"):
        run.fit(host, loader(12))
    for callback in (failing, *callbacks):
        run.callbacks.remove(callback)
    host.seen.clear()
    run.fit_loop.epoch_progress.reset()
    run.fit(host, loader(12))
    assert all(torch.equal(found, torch.arange(6) % CLASSES) for found in host.seen)
    assert host.seen


def test_the_same_callbacks_under_several_trainers_and_stages(tmp_path):
    host, callbacks = Full(), ours()
    trainer(tmp_path).fit(host, loader(6))
    before = state_of(host)
    for _ in range(2):
        run = trainer(tmp_path, *callbacks)
        run.fit(host, loader(12), loader(6))
        run.validate(host, loader(6), verbose=False)
        run.test(host, loader(6), verbose=False)
        run.predict(host, loader(6))
        run.fit_loop.max_epochs += 1
        run.fit(host, loader(12))
        assert state_of(host) == before
    assert callbacks[0].prepared == 2 * (2 + 1 + 1 + 1 + 1 + 2)


# -- copies in mid-fit -------------------------------------------------------------------------------------------------
class Copies(Callback):
    """Copies the host in mid-fit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.deep = copy.deepcopy(pl_module)
            self.pickled = pickle.loads(pickle.dumps(pl_module))
            self.callbacks = pickle.loads(pickle.dumps([c for c in trainer.callbacks if isinstance(c, HostCallback)]))
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_copies_in_mid_fit_run_themselves_and_are_plain(tmp_path):
    host, copies = Host(), Copies()
    trainer(tmp_path, Relabel(), Replayed(), copies).fit(host, loader(12))
    after = {name: value.clone() for name, value in host.state_dict().items()}
    calls = len(host.seen)
    for twin in (copies.deep, copies.pickled):
        assert_equal_states(twin.state_dict(), copies.weights)
        twin.seen.clear()
        reference = Host()
        reference.load_state_dict(copies.weights)
        trainer(tmp_path).fit(reference, loader(12))
        trainer(tmp_path).fit(twin, loader(12))
        assert_equal_states(twin.state_dict(), reference.state_dict())
        assert all(torch.equal(found, torch.arange(6) % CLASSES) for found in twin.seen)
        # the original was not touched
        assert_equal_states(host.state_dict(), after)
        assert len(host.seen) == calls
        # and ours attach to a copy as to any host
        relabel = Relabel()
        twin.seen.clear()
        trainer(tmp_path, relabel).fit(twin, loader(12))
        assert relabel.prepared == 2
        assert torch.equal(twin.seen[0], (torch.arange(6) + 1) % CLASSES)
        assert ATTACHMENT not in twin.__dict__
        assert "training_step" not in twin.__dict__ or twin is copies.pickled
    # callbacks come along without what they were attached to
    assert [callback.attachment for callback in copies.callbacks] == [None, None]
    fresh = Host()
    trainer(tmp_path, *copies.callbacks).fit(fresh, loader(12))
    assert torch.equal(fresh.seen[0], (torch.arange(6) + 1) % CLASSES)


def test_a_copy_is_fitted_while_the_original_is(tmp_path):
    class Inner(Callback):
        def on_train_batch_end(self, trainer_, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                self.twin = copy.deepcopy(pl_module)
                self.twin.seen.clear()
                trainer(tmp_path, Relabel(), Relabel("again")).fit(self.twin, loader(12))

    host, inner, relabel = Host(), Inner(), Relabel()
    trainer(tmp_path, relabel, inner).fit(host, loader(12))
    assert all(torch.equal(found, (torch.arange(6) + 2) % CLASSES) for found in inner.twin.seen)
    assert all(torch.equal(found, (torch.arange(6) + 1) % CLASSES) for found in host.seen)
    assert (len(host.seen), len(inner.twin.seen), relabel.prepared) == (2, 2, 2)
    assert Attachment.on(host) is Attachment.on(inner.twin) is None
