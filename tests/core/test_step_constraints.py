"""Weights stay where they belong: masks and held weights under every optimizer, precision and accumulation."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from lightning_trust.core.host import named_parameters
from lightning_trust.core.masks import ParameterMask, WeightHolding, WeightZeroing
from lightning_trust.core.step import Attachment, ConstraintPhase, GradientPhase, HostCallback
from tests.core.hosts import CLASSES, FEATURES, Host, loader, rows, trainer
from tests.two_ranks import assert_equal_states, fit_on_two_ranks


class Zero(HostCallback):
    """Prunes half of the weights, drawn from the shared stream."""

    claims = ("weights",)

    def attach(self, trainer, host, attachment):
        self.zeroing = None
        attachment.edit_gradients(self, GradientPhase.PROJECT, lambda _: self.zeroing.gradients())
        attachment.constrain(self, ConstraintPhase.ZERO, lambda _: self.zeroing.weights())

    def begin(self, trainer, host):
        generator = self.random.shared("mask")
        scores = {name: torch.rand(value.shape, generator=generator) for name, value in named_parameters(host).items()}
        self.use(ParameterMask.with_sparsity(scores, 0.5), host)

    def resume(self, trainer, host, state):
        self.use(ParameterMask.from_state_dict(state["mask"]), host)

    def use(self, mask, host):
        self.mask, self.zeroing = mask, WeightZeroing(mask, host)
        self.zeroing.weights()

    def state(self):
        return {"mask": self.mask.state_dict()}


class Hold(HostCallback):
    """Lets a third of the weights move."""

    claims = ("weights",)

    def begin(self, trainer, host):
        generator = self.random.shared("mask")
        scores = {name: torch.rand(value.shape, generator=generator) for name, value in named_parameters(host).items()}
        self.use(ParameterMask.with_sparsity(scores, 0.66), host, None)

    def resume(self, trainer, host, state):
        self.use(ParameterMask.from_state_dict(state["mask"]), host, state["held"])

    def use(self, mask, host, held):
        self.mask = mask
        self.holding = WeightHolding(mask, host) if held is None else WeightHolding.from_state_dict(mask, host, held)
        # registered as late as may be
        self.attachment.edit_gradients(self, GradientPhase.PROJECT, self.holding.gradients)
        self.attachment.constrain(self, ConstraintPhase.HOLD, self.holding.weights)

    def state(self):
        return {"mask": self.mask.state_dict(), "held": self.holding.state_dict()}


class Violations(Callback):
    """Looks at the weights in every forward pass, and at the end; last in the list."""

    def __init__(self, zero: Zero, hold: Hold) -> None:
        self.zero, self.hold = zero, hold
        self.forwards = self.found = 0
        self.moved = False

    def on_fit_start(self, trainer, pl_module):
        self.parameters = named_parameters(pl_module)
        self.reference = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.handle = pl_module.net.register_forward_pre_hook(lambda *_: self.look())

    def look(self) -> None:
        self.forwards += 1
        for name, value in self.parameters.items():
            pruned, held = ~self.zero.mask[name], ~self.hold.mask[name]
            expected = torch.where(pruned, 0.0, self.reference[name])
            self.found += int((value[pruned | held] != expected[pruned | held]).sum())
            free = ~(pruned | held)
            self.moved |= bool((value[free] != self.reference[name][free]).any())

    def on_fit_end(self, trainer, pl_module):
        self.look()
        self.handle.remove()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip": {"gradient_clip_val": 0.05},
    "clip-value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
    "all": {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "double": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
}


def watched(folder, host, *callbacks, order: int = 1, **settings) -> Violations:
    zero, hold = Zero(), Hold()
    watch = Violations(zero, hold)
    run = trainer(folder, *[zero, hold][::order], *callbacks, watch, **{"max_epochs": 2, **settings})
    run.fit(host, loader())
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    return watch


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_weight_is_ever_where_it_does_not_belong(tmp_path, optimizer, setting):
    # a pruned weight that is held as well stays pruned, in whichever order they come
    order = -1 if optimizer.startswith("sgd") else 1
    settings = dict(SETTINGS[setting])
    if "fused" in optimizer and setting == "all":
        del settings["gradient_clip_val"]  # Lightning refuses to clip for fused optimizers under mixed precision
    watch = watched(tmp_path, Host(optimizer=OPTIMIZERS[optimizer]), order=order, **settings)
    assert watch.found == 0
    assert watch.moved
    assert watch.forwards == 9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_the_hook_weights_move(tmp_path, optimizer, monkeypatch):
    """Zeroed gradients alone hold nothing: weight decay (and what momentum was) moves the weights."""
    monkeypatch.setattr(Attachment, "arm", lambda self: None)
    host = Host(optimizer=OPTIMIZERS[optimizer])
    zero, hold = Zero(), Hold()
    watch = Violations(zero, hold)
    trainer(tmp_path, zero, hold, watch, max_epochs=2).fit(host, loader())
    assert watch.found > 100


class InfiniteStep(Host):
    """Its scaled loss overflows in one batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_with_a_step_that_is_skipped(tmp_path, accumulate):
    steps = []

    class Count(HostCallback):
        def attach(self, trainer, host, attachment):
            attachment.constrain(self, ConstraintPhase.PROXIMAL, steps.append)

    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))
    watch = watched(tmp_path, InfiniteStep(), Count(), plugins=[precision], accumulate_grad_batches=accumulate)
    assert watch.found == 0
    assert watch.moved
    # no hook where there was no step
    assert len(steps) == (6 if accumulate == 1 else 2)


class Add(HostCallback):
    """Adds to every gradient."""

    def attach(self, trainer, host, attachment):
        attachment.edit_gradients(self, GradientPhase.ADD, lambda _: [p.grad.add_(0.1) for p in host.parameters()])


def test_fused_optimizers_that_unscale_within_their_step(tmp_path):
    """Lightning leaves their gradients scaled: masks do not mind, sums would be lost."""
    precision = lambda: MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))  # noqa: E731
    fused = lambda: InfiniteStep(optimizer=OPTIMIZERS["adamw-fused"])  # noqa: E731
    watch = watched(tmp_path, fused(), plugins=[precision()])
    assert watch.found == 0
    assert watch.moved
    host = fused()
    with pytest.raises(MisconfigurationException, match="Add edits gradients, but a fused optimizer under precision"):
        trainer(tmp_path, Add(), plugins=[precision()]).fit(host, loader())
    assert host.seen == []
    trainer(tmp_path, Add(), plugins=[precision()]).fit(InfiniteStep(), loader())
    trainer(tmp_path, Add(), precision="bf16-mixed").fit(fused(), loader())


def test_edits_see_unscaled_gradients_before_clipping_in_order_of_phase(tmp_path):
    found: dict[str, list[Any]] = {}

    class Edits(HostCallback):
        def __init__(self, key):
            super().__init__()
            self.key = key

        def attach(self, trainer, host, attachment):
            order = found.setdefault(self.key, [])

            def write(phase):
                return lambda optimizer: order.append((phase, [p.grad.clone() for p in host.parameters()]))

            def shrink(optimizer):
                order.append("add")
                for parameter in host.parameters():
                    parameter.grad.mul_(1e-3)

            attachment.edit_gradients(self, GradientPhase.PROJECT, write("project"))
            attachment.edit_gradients(self, GradientPhase.ADD, shrink)
            attachment.edit_gradients(self, GradientPhase.SCALE, write("scale"))

    host, plain = Host(), Host()
    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))
    trainer(tmp_path, Edits("fp16"), plugins=[precision], max_steps=1, gradient_clip_val=0.1).fit(host, loader())
    trainer(tmp_path, Edits("fp32"), max_steps=1, gradient_clip_val=0.1).fit(plain, loader())
    for key in found:
        assert [entry if isinstance(entry, str) else entry[0] for entry in found[key]] == ["scale", "add", "project"]
    for half, single in zip(found["fp16"][0][1], found["fp32"][0][1], strict=True):
        torch.testing.assert_close(half, single, rtol=0.02, atol=1e-3)
    norm = torch.stack([gradient.norm() for gradient in found["fp32"][0][1]]).norm()
    assert norm > 0.2
    # clipping comes after: what was edited down to below the limit is not scaled
    for edited, parameter in zip(found["fp32"][2][1], plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, edited)


def test_constraints_run_by_phase_and_of_one_phase_in_list_order(tmp_path):
    order: list[Any] = []

    class Constraints(HostCallback):
        def attach(self, trainer, host, attachment):
            for phase in reversed(ConstraintPhase):
                attachment.constrain(self, phase, lambda _, phase=phase: order.append((phase.name, self.name)))

    trainer(tmp_path, Constraints("a"), Constraints("b"), max_steps=1).fit(Host(), loader())
    assert order == [(phase, name) for phase in ("PROXIMAL", "CLAMP", "HOLD", "ZERO") for name in ("a", "b")]


def test_constraints_build_no_graph(tmp_path):
    class Clamp(HostCallback):
        def attach(self, trainer, host, attachment):
            attachment.constrain(
                self, ConstraintPhase.CLAMP, lambda _: [p.clamp_(-0.01, 0.01) for p in host.parameters()]
            )

    host = Host()
    trainer(tmp_path, Clamp()).fit(host, loader())
    assert all(parameter.abs().max() <= 0.01 and parameter.is_leaf for parameter in host.parameters())


# -- optimizers that come and go ---------------------------------------------------------------------------------------
class NewOptimizers(Callback):
    """Makes the optimizers anew, after the hooks of callbacks before it."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.renew)

    def renew(self, trainer, *_: Any) -> None:
        trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_optimizers_that_are_made_anew(tmp_path, hook):
    watch = watched(tmp_path, Host(), NewOptimizers(hook))
    assert watch.found == 0
    assert watch.forwards == 9


class KeptOptimizer(Host):
    """Keeps its optimizer, so that hooks on it would outlive a run."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)

    def configure_optimizers(self):
        return self.kept


def test_hooks_of_a_run_that_failed_on_the_way_out_do_nothing(tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("in the step")

        def on_exception(self, *_: Any) -> None:
            raise RuntimeError("on the way out")

    host, zero = KeptOptimizer(), Zero()
    run = trainer(tmp_path, Broken(), zero)
    with pytest.raises(RuntimeError, match="on the way out"):
        run.fit(host, loader())
    run._signal_connector.teardown()  # Lightning does not come to it
    assert len(host.kept._optimizer_step_post_hooks) == 1
    trainer(tmp_path).fit(host, loader())
    assert all((value != 0.0).all() for value in host.parameters())
    # the next run of ours drops what was left
    zero = Zero()
    trainer(tmp_path, zero).fit(host, loader())
    assert len(host.kept._optimizer_step_post_hooks) == 0
    assert all((value[~zero.mask[name]] == 0.0).all() for name, value in host.named_parameters())


@pytest.mark.parametrize("late", [False, True])
def test_lbfgs_is_refused(tmp_path, late):
    host = Host(optimizer=torch.optim.LBFGS)
    callback = Hold() if late else Zero()
    name = type(callback).__name__
    with pytest.raises(
        MisconfigurationException, match=f"{name} constrains weights after each optimizer step, but LBF"
    ):
        trainer(tmp_path, callback).fit(host, loader())
    assert host.seen == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_masks_come_back_on_resume(tmp_path, precision):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    host, again = Host(), Host()
    zero, hold = Zero(), Hold()
    trainer(tmp_path, zero, hold, Save(), max_epochs=4, precision=precision).fit(host, loader())
    zero_again, hold_again = Zero(seed=99), Hold(seed=99)
    watch = Violations(zero_again, hold_again)
    run = trainer(tmp_path, zero_again, hold_again, watch, max_epochs=4, precision=precision)
    run.fit(again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_equal_states(host.state_dict(), again.state_dict())
    assert all(torch.equal(zero.mask[name], zero_again.mask[name]) for name in zero.mask)
    assert watch.forwards == 9
    assert watch.found == 0
    # another fit with the same callbacks is a fresh one
    run = trainer(tmp_path, zero_again, hold_again, max_epochs=1)
    run.fit(again, loader())
    assert any(not torch.equal(zero.mask[name], zero_again.mask[name]) for name in zero.mask)


# -- manual optimisation -----------------------------------------------------------------------------------------------
class Manual(Host):
    """Two optimizers, each over one layer, stepped in turn."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=not self.raw):
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
            torch.optim.AdamW(self.net[2].parameters(), lr=0.1, weight_decay=0.1),
        ]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimisation(tmp_path, raw, precision):
    watch = watched(tmp_path, Manual(raw), precision=precision)
    assert watch.forwards == 17
    assert watch.found == 0
    assert watch.moved


# -- beside others -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [True, False])
def test_beside_weight_averaging(tmp_path, first):
    zero, average = Zero(), EMAWeightAveraging(decay=0.9)
    host = Host()
    run = trainer(tmp_path, *([zero, average] if first else [average, zero]), max_epochs=2)
    run.fit(host, loader(), loader(6))
    assert all((value[~zero.mask[name]] == 0.0).all() for name, value in host.named_parameters())
    assert "_lightning_trust" not in host.__dict__


class SeedsDiffer(Callback):
    """Ranks that were seeded by their number, against Lightning's advice."""

    def setup(self, trainer, pl_module, stage):
        os.environ["PL_GLOBAL_SEED"] = str(trainer.global_rank)


def test_two_ranks_hold_the_same_masks(tmp_path):
    zero, hold = Zero(), Hold()
    watch = Violations(zero, hold)

    def result(trainer, host):
        watch.look()
        masks = {name: mask.float() for name, mask in zero.mask.items()}
        return host.state_dict(), masks, watch.found, watch.forwards

    first, second = fit_on_two_ranks(
        tmp_path, Host(), DataLoader(rows(), batch_size=3), [SeedsDiffer(), zero, hold, watch], result, max_epochs=2
    )
    for one, two in zip(first[:2], second[:2], strict=True):
        assert_equal_states(one, two)
    assert first[2] == second[2] == 0
    assert first[3] == second[3] == 9


def test_two_ranks_with_accumulation_and_clipping(tmp_path):
    zero, hold = Zero(), Hold()
    watch = Violations(zero, hold)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "precision": "bf16-mixed"}
    results = fit_on_two_ranks(
        tmp_path,
        Host(nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))),
        DataLoader(rows(), batch_size=3),
        [hold, zero, watch],
        lambda *_: (watch.look(), watch.found, watch.moved)[1:],
        **settings,
    )
    assert results == [(0, True), (0, True)]
