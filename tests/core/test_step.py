"""The chain around the steps of a host: order, results, replays, claims, kinds of hosts and Trainers."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import CatMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_trust.core.host import ATTACHMENT
from lightning_trust.core.step import Attachment, HostCallback, StepTransform, check_steps
from tests.core.hosts import CLASSES, FEATURES, Host, loader, net, rows, trainer
from tests.two_ranks import assert_equal_states, fit_on_two_ranks


class Record(StepTransform):
    """Writes down when it is called, relabels, and scales the loss."""

    def __init__(self, events: list[Any], name: str, shift: int = 0, scale: float = 1.0) -> None:
        super().__init__(name=name)
        self.events, self.shift, self.scale = events, shift, scale

    def prepare(self, host, batch, ctx):
        self.events.append(("prepare", self.name, ctx.batch_idx, ctx.total_batch_idx))
        return self.batch_spec.replace(batch, targets=(self.batch_spec.targets_of(batch) + self.shift) % CLASSES)

    def loss(self, host, step, batch, ctx):
        self.events.append(("enter", self.name))
        value = self.scale * step(batch)
        self.events.append(("leave", self.name))
        return value


class Relabel(StepTransform):
    """Changes the batch only."""

    def __init__(self, shift: int = 1, name: str | None = None) -> None:
        super().__init__(name=name)
        self.shift = shift
        self.contexts: list[Any] = []

    def prepare(self, host, batch, ctx):
        self.contexts.append(ctx)
        return self.batch_spec.replace(batch, targets=(self.batch_spec.targets_of(batch) + self.shift) % CLASSES)


class Replace(StepTransform):
    """Never asks for the host's loss."""

    replaces_loss: ClassVar[bool] = True

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def loss(self, host, step, batch, ctx):
        self.events.append(("replace", batch[1].tolist()))
        return host.net(batch[0]).square().mean()


class EventHost(Host):
    """Writes down when its own step runs."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.__dict__["events"] = events

    def training_step(self, batch, batch_idx):
        self.events.append(("host", batch[1].tolist()))
        return super().training_step(batch, batch_idx)


def labels(batch: int, shift: int = 0, batch_size: int = 6) -> list[int]:
    return ((rows().tensors[1] + shift) % CLASSES).split(batch_size)[batch].tolist()


# -- order -------------------------------------------------------------------------------------------------------------
def test_two_transforms_prepare_in_list_order_and_nest_with_the_first_outside(tmp_path):
    events: list[Any] = []
    host = EventHost(events)
    trainer(tmp_path, Record(events, "a", 1), Record(events, "b", 1), max_steps=2).fit(host, loader())
    one = [
        ("enter", "a"),
        ("enter", "b"),
        ("host", labels(0, 2)),
        ("leave", "b"),
        ("leave", "a"),
    ]
    two = [*one]
    two[2] = ("host", labels(1, 2))
    assert events == [
        ("prepare", "a", 0, 0),
        ("prepare", "b", 0, 0),
        *one,
        ("prepare", "a", 1, 1),
        ("prepare", "b", 1, 1),
        *two,
    ]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_replaces_the_loss_is_innermost_whatever_its_place(tmp_path, place):
    events: list[Any] = []
    callbacks: list[Callback] = [Record(events, "a", 1), Record(events, "b", 1)]
    callbacks.insert(place, Replace(events))
    host = EventHost(events)
    trainer(tmp_path, *callbacks, max_steps=1).fit(host, loader())
    assert [event[:2] for event in events] == [
        ("prepare", "a"),
        ("prepare", "b"),
        ("enter", "a"),
        ("enter", "b"),
        ("replace", labels(0, 2)),
        ("leave", "b"),
        ("leave", "a"),
    ]
    assert host.seen == []


def weights_after(folder, host, *callbacks, data=None, **settings) -> dict[str, torch.Tensor]:
    trainer(folder, *callbacks, **settings).fit(host, data or loader())
    return {name: value.clone() for name, value in host.state_dict().items()}


def test_scaled_losses_multiply_and_other_hooks_keep_the_clean_batch(tmp_path):
    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert batch[1].tolist() == labels(batch_idx)

    class Expected(Host):
        def training_step(self, batch, batch_idx):
            return 6.0 * F.cross_entropy(self(batch[0]), (batch[1] + 3) % CLASSES)

    found = weights_after(tmp_path, Host(), Record([], "a", 1, 2.0), Relabel(1), Record([], "b", 1, 3.0), Watch())
    assert_equal_states(found, weights_after(tmp_path, Expected()), rtol=1e-5, atol=1e-6)


def test_context_tells_epoch_batch_and_total(tmp_path):
    relabel = Relabel()
    run = trainer(tmp_path, relabel, max_epochs=2, accumulate_grad_batches=2)
    run.fit(Host(), loader())
    found = [(ctx.stage, ctx.batch_idx, ctx.total_batch_idx, ctx.dataloader_idx) for ctx in relabel.contexts]
    # the global step would repeat: 0, 0, 1, 1
    assert found == [("fit", batch % 4, batch, 0) for batch in range(8)]
    assert all(ctx.trainer is run for ctx in relabel.contexts)


def test_a_prepared_micro_batch_is_let_go_of(tmp_path):
    class Watch(Callback):
        def on_validation_start(self, trainer, pl_module):
            chain = Attachment.on(pl_module).chains["fit"]
            assert (chain._kept, chain._extras, chain._replay) == (None, None, None)

    class DictHost(Host):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "logits": batch[0]}

    trainer(tmp_path, Record([], "a"), Watch()).fit(DictHost(), loader(), loader())


def test_the_kept_micro_batch_is_there_for_every_callback_of_ours(tmp_path):
    kept = []

    class Late(HostCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            chain = self.attachment.chain()
            kept.append(chain.replay().item() if chain.replayable else chain._kept[0])
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    trainer(tmp_path, Record([], "a"), Late(), max_steps=2).fit(Host(), loader())
    assert kept == [(0, 0), (1, 1)]


def test_a_callback_that_leaves_in_mid_run_takes_its_links_along(tmp_path):
    class Leaver(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                Attachment.on(pl_module).leave(first)

    host, first, second = Host(), Relabel(1), Record([], "b", 1)
    trainer(tmp_path, first, second, Leaver()).fit(host, loader())
    assert [found.tolist() for found in host.seen] == [labels(batch, shift) for batch, shift in enumerate((2, 2, 1, 1))]
    assert ATTACHMENT not in host.__dict__


# -- results -----------------------------------------------------------------------------------------------------------
class Outputs(Callback):
    """Keeps what Lightning hands on."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(outputs)


class Result(Host):
    """Returns what the test wants."""

    def __init__(self, make) -> None:
        super().__init__()
        self.__dict__["make"] = make

    def training_step(self, batch, batch_idx):
        return self.make(super().training_step(batch, batch_idx), batch_idx)


def test_other_keys_of_a_dict_survive(tmp_path):
    plain, outputs = Outputs(), Outputs()
    make = lambda loss, batch_idx: {"first": batch_idx, "loss": loss, "logits": loss.detach() + 1.0}  # noqa: E731
    trainer(tmp_path, plain, max_steps=1).fit(Result(make), loader())
    trainer(tmp_path, Record([], "a", 0, 2.0), outputs, max_steps=1).fit(Result(make), loader())
    assert list(outputs.found[0]) == list(plain.found[0])
    assert outputs.found[0]["first"] == 0
    assert outputs.found[0]["logits"] == plain.found[0]["logits"]
    assert outputs.found[0]["loss"] == 2.0 * plain.found[0]["loss"]


def test_a_skipped_batch_is_skipped(tmp_path):
    make = lambda loss, batch_idx: None if batch_idx == 1 else loss  # noqa: E731
    outputs, events = Outputs(), []
    found = weights_after(tmp_path, Result(make), Record(events, "a", 0, 2.0), outputs)
    assert outputs.found[1] == {}
    assert ("leave", "a") in events
    assert [event[0] for event in events].count("enter") == 4
    assert [event[0] for event in events].count("leave") == 3

    twice = lambda loss, batch_idx: None if batch_idx == 1 else 2.0 * loss  # noqa: E731
    assert_equal_states(found, weights_after(tmp_path, Result(twice)))
    # without a change of the loss as well
    make_plain = lambda loss, batch_idx: None if batch_idx == 1 else loss  # noqa: E731
    assert_equal_states(
        weights_after(tmp_path, Result(make_plain), Relabel(0)), weights_after(tmp_path, Result(make_plain))
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda loss, _: {"objective": loss}, "but got a dict with keys ['objective']"),
        (lambda loss, _: {"loss": float(loss)}, "but got a dict with keys ['loss']"),
        (lambda loss, _: (loss, 1), "but got tuple"),
    ],
)
def test_a_result_without_loss_is_named(tmp_path, make, words):
    with pytest.raises(MisconfigurationException) as error:
        trainer(tmp_path, Record([], "a")).fit(Result(make), loader())
    assert str(error.value).startswith(
        "Expected `Result.training_step` to return a loss tensor or a dict with the key 'loss', because Record works on"
    )
    assert words in str(error.value)


# -- kinds of steps ----------------------------------------------------------------------------------------------------
class NoIndex(Host):
    """Steps without an index."""

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class ValidationRelabel(Relabel):
    """Changes the batch in fit and in validation."""

    stages = ("fit", "validate")


def test_steps_without_an_index(tmp_path):
    relabel = ValidationRelabel()
    run = trainer(tmp_path, relabel)
    run.fit(NoIndex(), loader(), loader(12))
    found = [(ctx.stage, ctx.batch_idx, ctx.total_batch_idx) for ctx in relabel.contexts]
    assert found == [*(("fit", batch, batch) for batch in range(4)), ("validate", 0, 0), ("validate", 1, 1)]
    run.validate(NoIndex(), loader(12))
    assert [ctx.batch_idx for ctx in relabel.contexts[6:]] == [0, 1]


class Iterating(Host):
    """A step that takes the iterator."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_step_over_the_iterator_is_refused(tmp_path):
    host = Iterating()
    with pytest.raises(MisconfigurationException, match="Relabel changes .* `Iterating.training_step` takes `dataloa"):
        trainer(tmp_path, Relabel()).fit(host, loader())
    assert ATTACHMENT not in host.__dict__


def test_a_host_without_a_step_is_refused_in_fit_only(tmp_path):
    class Evaluated(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def validation_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return None

    relabel = ValidationRelabel()
    trainer(tmp_path, relabel).validate(Evaluated(), loader())
    assert len(relabel.contexts) == 4
    # Lightning itself refuses such a fit; a patched Trainer may not
    with pytest.raises(MisconfigurationException, match="Evaluated has no `training_step` that returns a loss"):
        check_steps(relabel, Evaluated(), ["fit", "validate"])


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_validation_transforms(tmp_path, stage):
    host, plain = Host(), Host()
    relabel = ValidationRelabel(1)
    run, expected = trainer(tmp_path, relabel), trainer(tmp_path)
    shifted = DataLoader(TensorDataset(rows(18, 9).tensors[0], (rows(18, 9).tensors[1] + 1) % CLASSES), batch_size=6)
    if stage == "fit":
        data = DataLoader(TensorDataset(rows().tensors[0], (rows().tensors[1] + 1) % CLASSES), batch_size=6)
        run.fit(host, loader(), [loader(18, seed=9), loader(18, seed=9)])
        expected.fit(plain, data, [shifted, shifted])
    else:
        run.validate(host, [loader(18, seed=9), loader(18, seed=9)])
        expected.validate(plain, [shifted, shifted])
    keys = ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    assert [run.callback_metrics[key] for key in keys] == [expected.callback_metrics[key] for key in keys]
    found = [(ctx.batch_idx, ctx.dataloader_idx) for ctx in relabel.contexts if ctx.stage == "validate"]
    assert found == [(batch, number) for number in range(2) for batch in range(3)]


class Attack(StepTransform):
    """Needs gradients in validation, test and prediction."""

    stages = ("fit", "validate", "test", "predict")

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[str] = []

    def prepare(self, host, batch, ctx):
        with torch.inference_mode(False), torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(host.net(x), batch[1].clone()), x)
        assert gradient.abs().sum() > 0
        self.moved.append(ctx.stage)
        return self.batch_spec.replace(batch, inputs=(x + 10.0 * gradient.sign()).detach())


def test_gradients_with_default_trainer_flags_in_every_stage(tmp_path):
    host, attack = Host(), Attack()
    run = trainer(tmp_path, attack)
    run.fit(host, loader(12), loader(6))
    run.validate(host, loader(6))
    clean = trainer(tmp_path)
    assert run.validate(host, loader(6))[0]["val_loss"] > clean.validate(host, loader(6))[0]["val_loss"] + 0.2
    run.test(host, loader(6))
    attacked = run.predict(host, loader(6))[0]
    assert not torch.equal(attacked, clean.predict(host, loader(6))[0])
    assert attack.moved == ["fit", "fit", "validate", "validate", "validate", "test", "predict"]
    assert ATTACHMENT not in host.__dict__


# -- optimizers that evaluate the step several times -------------------------------------------------------------------
class Metrics(Host):
    """Logs, metrics with and without compute groups, dropout and BatchNorm."""

    def __init__(self, network: nn.Module | None = None, optimizer: Any = None) -> None:
        super().__init__(network, optimizer)
        self.accuracy = MulticlassAccuracy(CLASSES)
        # means would not tell that a batch counted thrice
        self.sum, self.rows = SumMetric(), CatMetric()
        self.group = MetricCollection([MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES)])

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1])
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.group.update(logits, batch[1])
        self.sum.update(loss)
        self.rows.update(batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"loss": loss, "count": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_epoch_end(self):
        self.log("sum", self.sum)
        self.log("rows", float(self.rows.compute().numel()))
        self.rows.reset()
        self.updates = [m.update_count for m in (self.accuracy, *self.group.values(), self.sum)]
        self.log_dict(self.group)

    def on_before_backward(self, loss):
        torch.rand(1)


class ThreeEvaluations(torch.optim.SGD):
    """Evaluates the closure three times, and steps from the first gradient."""

    def step(self, closure=None):
        loss = closure()
        gradients = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]
        with torch.no_grad():
            for _ in range(2):
                closure()
        for parameter, gradient in zip(self.param_groups[0]["params"], gradients, strict=True):
            parameter.grad.copy_(gradient)
        super().step()
        return loss


class LogsItself(Record):
    """A transform that logs through the host."""

    def loss(self, host, step, batch, ctx):
        host.log("trust/calls", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().loss(host, step, batch, ctx)


def test_an_optimizer_that_evaluates_several_times(tmp_path):
    events: list[Any] = []
    host = Metrics(optimizer=lambda parameters: ThreeEvaluations(parameters, lr=0.1))
    plain = Metrics(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    run, expected = trainer(tmp_path, LogsItself(events, "a", 1), LogsItself([], "b")), trainer(tmp_path, Relabel(1))
    run.fit(host, loader())
    expected.fit(plain, loader())
    names = [event[0] for event in events]
    assert names.count("prepare") == 4
    assert names.count("enter") == 12
    assert len(host.seen) == 12
    assert_equal_states(host.state_dict(), plain.state_dict())
    assert run.callback_metrics.pop("trust/calls") == 8.0
    assert run.callback_metrics == expected.callback_metrics
    assert run.callback_metrics["count"] == 4.0
    assert run.callback_metrics["rows"] == 24.0
    assert host.updates == plain.updates


def test_lbfgs_runs_under_a_transform(tmp_path):
    host = Host(optimizer=lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4))
    relabel = Relabel(1)
    trainer(tmp_path, relabel, Record([], "a")).fit(host, loader())
    assert len(relabel.contexts) == 4
    assert len(host.seen) > 8


def test_a_transform_that_evaluates_several_times(tmp_path):
    class Twice(StepTransform):
        def loss(self, host, step, batch, ctx):
            return 0.5 * (step(batch) + step(batch))

    host, plain = Metrics(), Metrics()
    run, expected = trainer(tmp_path, Twice(), Record([], "a")), trainer(tmp_path)
    run.fit(host, loader())
    expected.fit(plain, loader())
    assert len(host.seen) == 8
    assert_equal_states(host.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    for name, value in expected.callback_metrics.items():
        torch.testing.assert_close(run.callback_metrics[name], value, rtol=1e-4, atol=1e-5)


# -- gradient sources --------------------------------------------------------------------------------------------------
class FiniteDifference(HostCallback):
    """Central differences in place of back-propagation: replays of the loss chain at moved weights."""

    claims = ("gradient_source",)

    def attach(self, trainer, host, attachment):
        self.chain = attachment.chain("fit")
        self.chain.replayable = True
        self.replays = 0
        attachment.wrap(host, "training_step", self.without_graph, order=-1)
        attachment.wrap(host, "backward", self.differences, order=-1)

    def without_graph(self, host, call, *args, **kwargs):
        with torch.no_grad():
            return call(*args, **kwargs)

    @torch.no_grad()
    def differences(self, host, call, loss, *args, **kwargs):
        mu = 1e-5
        for parameter in host.parameters():
            gradient = torch.zeros_like(parameter)
            for place in range(parameter.numel()):
                kept = parameter.view(-1)[place].item()
                found = []
                for sign in (1.0, -1.0):
                    parameter.view(-1)[place] = kept + sign * mu
                    found.append(self.chain.replay())
                    self.replays += 1
                parameter.view(-1)[place] = kept
                gradient.view(-1)[place] = (found[0] - found[1]) / (2.0 * mu)
            # the loss that backward gets is divided already, ours is not
            gradient /= host.trainer.accumulate_grad_batches
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class Noise(StepTransform):
    """Draws from the global generator, in the batch and in the loss."""

    def prepare(self, host, batch, ctx):
        return self.batch_spec.replace(batch, inputs=batch[0] + 0.1 * torch.randn_like(batch[0]))

    def loss(self, host, step, batch, ctx):
        host.log("trust/noise", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return step(batch) * (1.0 + torch.rand((), dtype=batch[0].dtype))


def random_net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_replays_give_the_gradient_of_back_propagation(tmp_path, accumulate, first):
    """Batch and random numbers are those of the first evaluation; BatchNorm, logs and metrics count once."""
    settings = {"precision": "64-true", "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    transforms: list[Callback] = [Noise(), Record([], "a", 1, 2.0)]
    source = FiniteDifference()
    host, plain = Metrics(random_net()), Metrics(random_net())
    # outside the chain whatever its place in the list
    run = trainer(tmp_path, *([source, *transforms] if first else [*transforms, source]), **settings)
    torch.manual_seed(0)
    run.fit(host, loader())
    drawn = torch.rand(3)
    expected = trainer(tmp_path, *transforms, **settings)
    torch.manual_seed(0)
    expected.fit(plain, loader())
    assert torch.equal(drawn, torch.rand(3))
    assert source.replays == 4 * 2 * sum(parameter.numel() for parameter in host.parameters())
    assert_equal_states(host.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-8)
    assert host.net[1].num_batches_tracked == 4
    assert not torch.equal(host.net[4].weight, random_net()[4].weight.double())
    assert list(run.callback_metrics) == list(expected.callback_metrics)
    for name, value in expected.callback_metrics.items():
        torch.testing.assert_close(run.callback_metrics[name], value, rtol=1e-5, atol=1e-6)
    assert run.callback_metrics["count"] == run.callback_metrics["trust/noise"] == 4.0
    assert run.callback_metrics["rows"] == 24.0
    assert host.updates == plain.updates
    assert "training_step" not in host.__dict__
    assert "backward" not in host.__dict__


def test_a_gradient_source_alone_and_skipped_batches(tmp_path):
    make = lambda loss, batch_idx: None if batch_idx == 1 else {"loss": loss, "other": 1}  # noqa: E731
    hosts = []
    for callbacks in ([FiniteDifference()], []):
        host, outputs = Result(make), Outputs()
        hosts.append(host)
        trainer(tmp_path, *callbacks, outputs, precision="64-true").fit(host, loader())
        assert [list(output) for output in outputs.found] == [["loss", "other"], [], *[["loss", "other"]] * 2]
    assert_equal_states(hosts[0].state_dict(), hosts[1].state_dict(), rtol=1e-6, atol=1e-8)


def test_a_replay_without_a_step(tmp_path):
    class Early(FiniteDifference):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.chain.replay()

    with pytest.raises(RuntimeError, match="Expected a training step to have run before its loss is evaluated again"):
        trainer(tmp_path, Early()).fit(Host(), loader())


class Shared(pl.LightningDataModule):
    """Ranks share every global batch."""

    def train_dataloader(self):
        if torch.distributed.is_initialized():
            return DataLoader(rows(), batch_size=3, sampler=DistributedSampler(rows(), shuffle=False))
        return DataLoader(rows(), batch_size=6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_source_on_two_ranks(tmp_path, accumulate):
    settings = {"precision": "64-true", "accumulate_grad_batches": accumulate, "max_epochs": 1}
    small = lambda: nn.Linear(FEATURES, CLASSES)  # noqa: E731
    torch.manual_seed(0)
    zero, one = fit_on_two_ranks(tmp_path, Host(small()), Shared(), [Relabel(1), FiniteDifference()], **settings)
    torch.manual_seed(0)
    host = Host(small())
    trainer(tmp_path, Relabel(1), **settings).fit(host, datamodule=Shared())
    assert_equal_states(zero, one)
    assert_equal_states(zero, host.state_dict(), rtol=1e-7, atol=1e-9)


def test_transforms_on_two_ranks(tmp_path):
    callbacks = lambda: [Record([], "a", 1, 2.0), Relabel(1)]  # noqa: E731
    zero, one = fit_on_two_ranks(tmp_path, Host(), Shared(), callbacks(), max_epochs=2)
    host = Host()
    trainer(tmp_path, *callbacks(), max_epochs=2).fit(host, datamodule=Shared())
    assert_equal_states(zero, one)
    assert_equal_states(zero, host.state_dict(), rtol=1e-5, atol=1e-6)
