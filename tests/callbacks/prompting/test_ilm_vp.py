"""VisualPrompting: only the prompt moves, and nothing of the host is left changed."""

from __future__ import annotations

import copy
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.callbacks import IterativeLabelMapping, VisualPrompting
from lightning_trust.core.wrapping import checksum
from lightning_trust.nn import AdditivePrompt, LabelMapping, PadPrompt
from tests.conformance import CLASSES, CallbackConformance, Data, Host
from tests.two_ranks import assert_equal_states, fit_on_two_ranks

PROMPT = {"class_path": "AdditivePrompt", "init_args": {"shape": [6]}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}


class TestVisualPrompting(CallbackConformance):
    callback = VisualPrompting
    arguments: ClassVar = {"prompt": PROMPT}


class TestVisualPromptingWithItsOwnOptimizer(CallbackConformance):
    callback = VisualPrompting
    arguments: ClassVar = {
        "prompt": PROMPT,
        "mapping": {
            "class_path": "LabelMapping",
            "init_args": {"num_source": 3, "num_target": 3, "method": "fixed", "indices": [2, 0, 1]},
        },
        "optimizer": SGD,
        "schedule": "cosine",
    }


class TestIterativeLabelMapping(CallbackConformance):
    callback = IterativeLabelMapping
    arguments: ClassVar = {"interval_epochs": 1}

    def trainer(self, folder, callbacks, **kwargs):
        mapped = LabelMapping(CLASSES, CLASSES, "iterative")
        prompting = VisualPrompting(AdditivePrompt((6,)), mapped)
        rival = any(isinstance(each, VisualPrompting) for each in callbacks)
        extra = [] if rival or any("network" in getattr(each, "claims", ()) for each in callbacks) else [prompting]
        return super().trainer(folder, [*callbacks, *extra], **kwargs)

    def test_exclusive_claims_refuse_a_second(self, tmp_path):
        """It claims nothing; what it needs is tested below."""
        assert self.make(tmp_path).all_claims == ()


class Images(pl.LightningModule):
    """A user's classifier of images, with BatchNorm and dropout, whose network is large beside the task."""

    def __init__(self, sources: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * 25, sources),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        assert logits.shape[1] == 3
        self.log("acc", (logits.argmax(dim=1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.1)


def images() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(48) % 3
    pixels = torch.rand(48, 1, 8, 8, generator=generator)
    pixels[:, 0, :2] += targets[:, None, None] * 0.3
    return DataLoader(TensorDataset(pixels.clamp(0, 1), targets), batch_size=16)


def prompting(method: str = "iterative", **kwargs) -> VisualPrompting:
    return VisualPrompting(PadPrompt(8, 11, channels=1), LabelMapping(12, 3, method), **kwargs)


def fast(params):
    return torch.optim.Adam(params, lr=0.3)


def trainer(*callbacks, **kwargs) -> pl.Trainer:
    settings = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, callbacks=[*callbacks], **{**settings, **kwargs}
    )


@pytest.mark.parametrize("optimizer", [lambda params: torch.optim.Adam(params, lr=0.01), None])
def test_the_frozen_network_is_untouched(optimizer):
    host, callback = Images(), prompting(optimizer=optimizer)
    before, modes = checksum(host), [module.training for module in host.modules()]
    prompt = copy.deepcopy(callback.prompt.delta.data)
    run = trainer(callback, IterativeLabelMapping())
    run.fit(host, images(), images())
    run.test(host, images(), verbose=False)
    assert checksum(host) == before
    assert [module.training for module in host.modules()] == modes
    assert all(parameter.grad is None for parameter in host.parameters())
    moved = callback.prompt.delta.data != prompt
    assert torch.equal(moved, callback.prompt.mask.bool())
    held = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert len(held) == 1
    assert held[0] is callback.prompt.delta


def test_the_loss_falls_and_the_mapping_settles():
    class Losses(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(float(trainer.callback_metrics["train_loss"]))

    losses, mapping = Losses(), IterativeLabelMapping()
    trainer(prompting(optimizer=fast), mapping, losses, max_epochs=30).fit(Images(), images())
    assert losses.seen[-1] < 0.98 * losses.seen[0]
    assert mapping.changed == 0.0
    assert mapping.mass > 0.34


def test_iterative_with_a_long_interval_is_frequency():
    def run(method, interval):
        torch.manual_seed(3)
        callback = prompting(method, optimizer=fast)
        trainer(callback, IterativeLabelMapping(interval), max_epochs=4).fit(Images(), images())
        return callback

    often, once, never = run("iterative", 1), run("iterative", 9), run("frequency", 1)
    assert torch.equal(once.prompt.delta, never.prompt.delta)
    assert torch.equal(once.mapping.indices, never.mapping.indices)
    assert not torch.equal(often.prompt.delta, never.prompt.delta)


def test_counts_are_those_of_the_prompted_network_in_eval_mode():
    host, callback, mapping = Images(), prompting("frequency"), IterativeLabelMapping()
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["counts"] = mapping.counts(trainer, pl_module)

    trainer(callback, mapping, Look(), limit_train_batches=2, max_epochs=1).fit(host, images())
    batches = [batch for batch, _ in zip(images(), range(2), strict=False)]
    # the prompt as it was before training: a grey frame
    start = PadPrompt(8, 11, channels=1)
    with torch.no_grad():
        found = torch.cat([host.net.eval()(start(batch[0])).argmax(dim=1) for batch in batches])
    targets = torch.cat([batch[1] for batch in batches])
    expected = torch.zeros(12, 3, dtype=torch.int64)
    expected.index_put_((found, targets), torch.ones(32, dtype=torch.int64), accumulate=True)
    assert torch.equal(seen["counts"], expected)


def test_surrounded_computes_what_the_run_did():
    host, callback = Images(), prompting("identity")
    run = trainer(callback)
    run.fit(host, images())
    with torch.no_grad():
        alone = callback.surrounded(host)(images().dataset.tensors[0]).argmax(dim=1)
    accuracy = run.test(host, images(), verbose=False)[0]["acc"]
    assert accuracy == pytest.approx(float((alone == images().dataset.tensors[1]).float().mean()))


def test_a_checkpoint_holds_the_host_under_its_own_keys(tmp_path):
    host, callback = Images(), prompting("identity")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(callback, saver, enable_checkpointing=True).fit(host, images())
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert list(content["state_dict"]) == list(host.state_dict())
    loaded = Images.load_from_checkpoint(path)
    assert checksum(loaded) == checksum(host)
    again = prompting("identity")
    trained = callback.prompt.delta.detach().clone()
    run = trainer(again)
    # validation of a checkpoint restores the prompt
    found = run.validate(loaded, images(), ckpt_path=str(path), verbose=False)[0]["acc"]
    assert torch.equal(again.prompt.delta, trained)
    assert found == trainer(callback).validate(host, images(), verbose=False)[0]["acc"]


def test_a_copy_of_the_host_has_a_prompt_of_its_own():
    host, callback, seen = Images(), prompting("identity"), {}

    class Copy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            twin = copy.deepcopy(pl_module)
            x = images().dataset.tensors[0]
            with torch.no_grad():
                seen["same"] = torch.equal(twin(x), pl_module(x))
                twin.visual_prompting.prompt.delta.add_(5.0)
                seen["apart"] = not torch.equal(twin(x), pl_module(x))

    trainer(callback, Copy(), max_epochs=1).fit(host, images())
    assert seen == {"same": True, "apart": True}


class Bypasses(Images):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net.forward(F.pad(batch[0], (2, 1, 2, 1)))[:, :3], batch[1])


class OwnForward(Host):
    """Its layers lie on the host itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.last = self.net[0], self.net[3]
        del self.net

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_a_host_whose_layers_lie_on_itself():
    host, callback = OwnForward(), VisualPrompting(AdditivePrompt((6,)))
    before = checksum(host)
    run = trainer(callback)
    run.fit(host, Data())
    assert checksum(host) == before
    assert bool((callback.prompt.delta != 0).all())
    assert "forward" not in host.__dict__


class Late(Images):
    def __init__(self):
        super().__init__()
        self.built, self.net = self.net, None

    def configure_model(self):
        if self.net is None:
            self.net = self.built
            del self.built


def test_a_host_that_builds_late():
    host, callback = Late(), prompting("identity")
    trainer(callback).fit(host, images())
    assert bool(callback.prompt.delta[callback.prompt.mask.bool()].ne(0).any())


@pytest.mark.parametrize(
    ("host", "callbacks", "error", "words"),
    [
        (Bypasses, lambda: [prompting("identity")], MisconfigurationException, r"did not call it.*network='<name>'"),
        (Images, lambda: [prompting("frequency")], MisconfigurationException, "Add the callback IterativeLabelMapping"),
        (Images, lambda: [prompting("semantic")], MisconfigurationException, "fit_similarity"),
        (Images, lambda: [prompting("random"), IterativeLabelMapping()], MisconfigurationException, "method='random'"),
        (Images, lambda: [IterativeLabelMapping()], MisconfigurationException, "found no LabelMapping"),
        (
            Images,
            lambda: [VisualPrompting(PadPrompt(8, 11, channels=3), LabelMapping(12, 3, "identity"))],
            ValueError,
            r"shape \(B, 3, 8, 8\) for this PadPrompt, but got \(16, 1, 8, 8\)",
        ),
        (
            Images,
            lambda: [VisualPrompting(PadPrompt(8, 11, channels=1), LabelMapping(10, 3, "identity"))],
            ValueError,
            r"num_source=10\), but got \(16, 12\)",
        ),
        (
            Images,
            lambda: [VisualPrompting(nn.ZeroPad2d(2), LabelMapping(12, 3, "identity"))],
            MisconfigurationException,
            "nothing to train",
        ),
        (
            Images,
            lambda: [VisualPrompting(PadPrompt(8, 11, 1), LabelMapping(12, 2, "iterative")), IterativeLabelMapping()],
            ValueError,
            r"`targets` to hold classes in \[0, 2\), but got 0 to 2",
        ),
    ],
)
def test_bad_input(host, callbacks, error, words):
    with pytest.raises(error, match=words):
        trainer(*callbacks()).fit(host(), images())


class Loaded(Images):
    """Brings its own data, half of every batch on each of two ranks."""

    def train_dataloader(self):
        dataset, several = images().dataset, torch.distributed.is_initialized()
        sampler = DistributedSampler(dataset, shuffle=False) if several else None
        return DataLoader(dataset, batch_size=8 if several else 16, sampler=sampler)


def test_two_ranks_have_the_mapping_and_the_prompt_of_one(tmp_path):
    alone = prompting(optimizer=fast)
    trainer(alone, IterativeLabelMapping()).fit(Loaded())
    shared = prompting(optimizer=fast)
    found = fit_on_two_ranks(
        tmp_path / "ranks",
        Loaded(),
        None,
        [shared, IterativeLabelMapping()],
        result=lambda _, module: module.visual_prompting.state_dict(),
        max_epochs=3,
    )
    assert_equal_states(found[0], found[1])
    assert torch.equal(found[0]["mapping.indices"], alone.mapping.indices)
    torch.testing.assert_close(found[0]["prompt.delta"], alone.prompt.delta.detach(), rtol=0.0, atol=1e-4)
