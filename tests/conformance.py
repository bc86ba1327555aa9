"""The shared tester of callbacks: subclass :class:`CallbackConformance` in the test module of each callback.

A subclass names the class and its arguments as YAML would, and the data that the callback needs:

    class TestSalUn(CallbackConformance):
        callback = SalUn
        arguments: ClassVar = {"ratio": 0.5}
        wrap_data = staticmethod(forget_random)
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_trust.callbacks
from lightning_trust.core.host import ATTACHMENT, named_parameters
from lightning_trust.core.step import (
    EXCLUSIVE_CLAIMS,
    ConstraintPhase,
    GradientPhase,
    HostCallback,
    StepTransform,
)
from lightning_trust.datamodules import ForgetRandom, ForgetSplit

ROWS, BATCH, CLASSES = 48, 8, 3


class Host(pl.LightningModule):
    """A user's module: no BatchNorm, no dropout, mean loss, plain SGD with momentum and weight decay."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", F.cross_entropy(self(inputs), targets))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def rows(count: int = ROWS, seed: int = 3) -> TensorDataset:
    """Separable classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    inputs = torch.randn(count, 6, generator=generator) + 2.0 * F.one_hot(targets, 6)
    return TensorDataset(inputs, targets)


class Data(pl.LightningDataModule):
    """A user's data, with an explicit sampler so that ranks share every global batch."""

    def __init__(self, batch_size: int = BATCH, shuffle: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.shuffle = shuffle

    def train_dataloader(self):
        dataset = rows()
        if not torch.distributed.is_initialized():
            return DataLoader(dataset, batch_size=self.batch_size, shuffle=self.shuffle)
        return DataLoader(
            dataset, batch_size=self.batch_size, sampler=DistributedSampler(dataset, shuffle=self.shuffle)
        )

    def val_dataloader(self):
        return DataLoader(rows(24, seed=4), batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(rows(24, seed=5), batch_size=self.batch_size)

    def predict_dataloader(self):
        return self.test_dataloader()


class Kill(Callback):
    """Ends the run after some optimizer steps, as a lost machine would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step >= self.after:
            raise RuntimeError("killed")


class MoveGlobalGenerators(Callback):
    """Draws one more random number on rank 1, as any other callback may."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(100 + trainer.global_rank)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(1 + trainer.global_rank)


class SaveWeights(Callback):
    """Brings the weights of each rank out of its process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


class PartnerLoss(StepTransform):
    """Doubles the loss."""

    claims = ("loss",)

    def loss(self, host, step, batch, ctx):
        return 2.0 * step(batch)


class PartnerGradient(HostCallback):
    """Halves the gradient."""

    claims = ("gradient_edit",)

    def attach(self, trainer, host, attachment):
        attachment.edit_gradients(self, GradientPhase.SCALE, self.halve)

    def halve(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)


class PartnerWeights(HostCallback):
    """Keeps the first bias within a box."""

    claims = ("weights",)

    def attach(self, trainer, host, attachment):
        self.bias = next(value for name, value in named_parameters(host).items() if name.endswith("bias"))
        attachment.constrain(self, ConstraintPhase.CLAMP, lambda _: self.bias.clamp_(-0.1, 0.1))


PARTNERS = {"loss": PartnerLoss, "gradient_edit": PartnerGradient, "weights": PartnerWeights}


class CallbackConformance:
    """What every callback must pass."""

    callback: ClassVar[type[Callback]]
    #: the user's module, for callbacks that need a network of a kind
    host: ClassVar[type[pl.LightningModule]] = Host
    arguments: ClassVar[dict[str, Any]] = {}
    #: whether two ranks must end with the weights of one rank that has the whole batch
    equal_to_one_rank: ClassVar[bool] = True
    #: how far float sums of two ranks may part from those of one
    tolerance: ClassVar[float] = 1e-6
    epochs: ClassVar[int] = 2

    # -- what a subclass may change ------------------------------------------------------------------------------------
    @staticmethod
    def wrap_data(data: pl.LightningDataModule) -> pl.LightningDataModule:
        return data

    def make(self, folder: Path | None = None) -> Callback:
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return built(self.callback, self.arguments_in(folder))

    def arguments_in(self, folder: Path | None) -> dict[str, Any]:
        """Arguments, with files in a folder of the test's where a callback reads or writes some."""
        return dict(self.arguments)

    # -- tools ---------------------------------------------------------------------------------------------------------
    def data(self, **kwargs: Any) -> pl.LightningDataModule:
        return self.wrap_data(Data(**kwargs))

    def trainer(self, folder: Path, callbacks: list[Callback], **kwargs: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": self.epochs,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
        }
        return pl.Trainer(callbacks=callbacks, **{**settings, **kwargs})

    def fitted(self, folder: Path, *partners: Callback, host: Host | None = None, **kwargs: Any):
        host = host or self.host()
        callback = self.make(folder)
        trainer = self.trainer(folder, [callback, *partners], **kwargs)
        trainer.fit(host, self.data())
        return host, callback, trainer

    @staticmethod
    def assert_clean(host: nn.Module, before: dict[str, Any]) -> None:
        assert ATTACHMENT not in host.__dict__
        new = {name for name in host.__dict__ if name not in before and not name.startswith("_")} - {
            "prepare_data_per_node"
        }
        assert not new, f"left attributes on the host: {new}"
        assert all(parameter.requires_grad for parameter in host.parameters())
        assert not any("hook" in name and value for module in host.modules() for name, value in module.__dict__.items())

    # -- the tests -----------------------------------------------------------------------------------------------------
    def test_fit_leaves_the_host_as_it_was(self, tmp_path):
        host = self.host()
        names, attributes = list(host.state_dict()), dict(host.__dict__)
        host, _, trainer = self.fitted(tmp_path, host=host)
        assert list(host.state_dict()) == names
        self.assert_clean(host, attributes)
        assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
        assert all(torch.isfinite(value).all() for value in host.state_dict().values())

    def test_fit_twice(self, tmp_path):
        host, callback, trainer = self.fitted(tmp_path)
        again = self.trainer(tmp_path, [callback])
        again.fit(host, self.data())
        assert again.global_step == trainer.global_step

    @pytest.mark.parametrize("where", ["on_train_start", "on_train_batch_start", "on_before_optimizer_step"])
    def test_exception_leaves_the_host_as_it_was(self, tmp_path, where):
        class Fails(Callback):
            pass

        def fail(*_: Any) -> None:
            raise ZeroDivisionError(where)

        setattr(Fails, where, fail)
        host = self.host()
        attributes = dict(host.__dict__)
        with pytest.raises(ZeroDivisionError):
            self.fitted(tmp_path, Fails(), host=host)
        self.assert_clean(host, attributes)
        self.fitted(tmp_path, host=host)

    def test_fast_dev_run(self, tmp_path):
        _, _, trainer = self.fitted(tmp_path, fast_dev_run=True)
        assert trainer.global_step == 1
        assert not list(tmp_path.glob("*.json"))

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_stages_without_fit(self, tmp_path, stage):
        host = self.host()
        before = copy.deepcopy(host.state_dict())
        trainer = self.trainer(tmp_path, [self.make(tmp_path)])
        getattr(trainer, stage)(host, datamodule=self.data())
        assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
        self.assert_clean(host, dict(host.__dict__))

    @pytest.mark.parametrize("after", [2, 7])
    def test_killed_and_resumed_equals_uninterrupted(self, tmp_path, after):
        """With shuffled data and dropout, bit for bit: weights, optimizer state and the callback's own state."""

        def run(folder: Path, *extra: Callback, **kwargs: Any):
            torch.manual_seed(11)
            host, callback = self.host(dropout=0.3), self.make(folder)
            saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
            exact = [] if isinstance(callback, lightning_trust.callbacks.ExactResume) else [exact_resume()]
            trainer = self.trainer(folder, [callback, *exact, saver, *extra])
            trainer.fit(host, self.data(shuffle=True), **kwargs)
            return host, callback, trainer

        def exact_resume():
            return lightning_trust.callbacks.ExactResume()

        whole, callback, trainer = run(tmp_path / "whole")
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "killed", Kill(after))
        torch.rand(13)
        resumed, resumed_callback, resumed_trainer = run(
            tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt")
        )
        assert resumed_trainer.global_step == trainer.global_step
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert_equal(
            trainer.optimizers[0].state_dict()["state"],
            resumed_trainer.optimizers[0].state_dict()["state"],
            "optimizer",
        )
        assert_equal(self.comparable(callback.state_dict()), self.comparable(resumed_callback.state_dict()), "state")

    @staticmethod
    def comparable(state: dict[str, Any]) -> dict[str, Any]:
        """What of a callback's state must be equal after a resume (seconds need not)."""
        return state

    def test_pickle_and_deepcopy(self, tmp_path):
        host, callback, _ = self.fitted(tmp_path)
        for twin in (
            pickle.loads(pickle.dumps(callback)),
            copy.deepcopy(callback),
            pickle.loads(pickle.dumps(self.make(tmp_path))),
        ):
            trainer = self.trainer(tmp_path, [twin])
            trainer.fit(host, self.data())

    def test_state_loads_as_weights_only(self, tmp_path):
        _, callback, _ = self.fitted(tmp_path)
        path = tmp_path / "state.pt"
        torch.save(callback.state_dict(), path)
        assert_equal(torch.load(path, weights_only=True), callback.state_dict(), "state")

    def test_yaml_round_trip(self, tmp_path):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--callback", type=Callback)
        arguments = self.arguments_in(tmp_path)
        config = parser.parse_string(
            yaml.safe_dump({"callback": {"class_path": self.callback.__name__, "init_args": arguments}})
        )
        dumped = parser.dump(config)
        again = parser.parse_string(dumped)
        assert parser.dump(again) == dumped
        callback = parser.instantiate(again).callback
        assert type(callback) is self.callback
        written = yaml.safe_load(dumped)["callback"].get("init_args", {})
        assert_contains(written, arguments)

    def test_two_ranks(self, tmp_path):
        """Ranks whose global generators differ end with equal weights: those of one rank with the whole batch."""
        torch.manual_seed(1)
        trainer = self.trainer(
            tmp_path,
            [self.make(tmp_path), MoveGlobalGenerators(), SaveWeights(tmp_path)],
            devices=2,
            strategy="ddp_fork",
        )
        trainer.fit(self.host(), self.data(batch_size=BATCH // 2))
        first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        if self.equal_to_one_rank:
            host, _, _ = self.fitted(tmp_path)
            for name, value in host.state_dict().items():
                torch.testing.assert_close(value, first[name], rtol=0.0, atol=self.tolerance)

    def test_accumulation_counts_optimizer_steps(self, tmp_path):
        host, _, trainer = self.fitted(tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5)
        assert trainer.global_step == self.epochs * -(-trainer.num_training_batches // 2)
        assert all(torch.isfinite(value).all() for value in host.state_dict().values())

    def test_bf16(self, tmp_path):
        host, _, _ = self.fitted(tmp_path, precision="bf16-mixed")
        # counters of BatchNorm are integers
        assert all(value.dtype in (torch.float32, torch.int64) for value in host.state_dict().values())
        assert all(torch.isfinite(value).all() for value in host.state_dict().values())

    @pytest.mark.parametrize("claim", list(PARTNERS))
    def test_partners(self, tmp_path, claim):
        _, _, trainer = self.fitted(tmp_path, PARTNERS[claim]())
        assert trainer.global_step > 0

    def test_exclusive_claims_refuse_a_second(self, tmp_path):
        mine = getattr(self.make(tmp_path), "all_claims", ())
        for claim in EXCLUSIVE_CLAIMS:
            rival = type("Rival", (HostCallback,), {"claims": (claim,)})()
            trainer = self.trainer(tmp_path, [self.make(tmp_path), rival], fast_dev_run=True)
            if claim in mine:
                with pytest.raises(MisconfigurationException, match=f"{self.callback.__name__} and Rival"):
                    trainer.fit(self.host(), self.data())
            else:
                trainer.fit(self.host(), self.data())

    def test_unsupported_strategy_is_refused(self, tmp_path):
        trainer = under_another_strategy(self.trainer(tmp_path, [self.make(tmp_path)]))
        with pytest.raises(MisconfigurationException, match=f"{self.callback.__name__} supports .* got FSDPStrategy"):
            trainer.fit(self.host(), self.data())


def built(kind: type, arguments: dict[str, Any]) -> Any:
    """An object from its arguments; those with a ``class_path`` are made as LightningCLI makes them."""
    if not any(isinstance(value, (dict, list)) for value in arguments.values()):
        return kind(**arguments)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "made", fail_untyped=False)
    config = parser.parse_object({"made": copy.deepcopy(arguments)})
    return parser.instantiate(config).made


def assert_contains(written: Any, given: Any) -> None:
    """What was written has all that was given; defaults may have been added."""
    if isinstance(given, dict):
        for name, value in given.items():
            if name == "class_path":
                assert written[name].rpartition(".")[2] == value.rpartition(".")[2]
            else:
                assert_contains(written[name], value)
    else:
        assert written == given


def under_another_strategy(trainer: pl.Trainer) -> pl.Trainer:
    """A Trainer whose strategy goes by the name of one that nobody has tested."""
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    return trainer


def forget_random(data: pl.LightningDataModule) -> pl.LightningDataModule:
    """A quarter of the rows is to be forgotten."""
    return ForgetSplit(data, ForgetRandom(fraction=0.25))


def assert_equal(first: Any, second: Any, where: str) -> None:
    """Nested containers of tensors and primitives are equal, tensors bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{where}[{place}]")
    else:
        assert first == second, where
