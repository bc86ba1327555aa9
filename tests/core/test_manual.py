"""Two optimizers in one module behave as one does under automatic optimisation."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.callbacks import OneShotPruning
from lightning_trust.core.manual import ManualSteps


class TwoOptimizers(pl.LightningModule):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.steps = ManualSteps(**settings)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 1)
        self.rates = []

    def loss(self, batch, sign):
        return sign * self.second(self.first(batch[0]).tanh()).mean() + self.first(batch[0]).square().mean()

    def training_step(self, batch, batch_idx):
        self.steps.minimise(self, 0, lambda: self.loss(batch, 1.0))
        self.steps.minimise(self, 1, lambda: self.loss(batch, -1.0))
        self.rates.append(self.optimizers()[0].param_groups[0]["lr"])

    def on_train_epoch_end(self):
        self.steps.end_epoch(self)

    def configure_optimizers(self):
        parts = (self.first, self.second)
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
        return [
            {"optimizer": optimizers[0], "lr_scheduler": {"scheduler": schedulers[0], "interval": "step"}},
            {"optimizer": optimizers[1], "lr_scheduler": schedulers[1]},
        ]


def rows():
    return TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(0)))


def fit(module, folder, *callbacks, batch_size=4, **settings):
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            **settings,
        },
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(rows(), batch_size=batch_size))
    return trainer


def by_hand(module, batches, clip):
    """The same steps in plain torch."""
    parts = (module.first, module.second)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    for _ in range(2):
        for batch in batches:
            for optimizer, part, sign in zip(optimizers, parts, (1.0, -1.0), strict=True):
                gradients = torch.autograd.grad(module.loss([batch], sign), list(part.parameters()))
                for parameter, gradient in zip(part.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                if clip:
                    nn.utils.clip_grad_norm_(part.parameters(), clip)
                optimizer.step()
            schedulers[0].step()
        schedulers[1].step()
    return module


@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_plain_torch(tmp_path, clip):
    module = TwoOptimizers(gradient_clip_val=clip)
    expected = by_hand(copy.deepcopy(module), rows().tensors[0].split(4), clip)
    fit(module, tmp_path)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


@pytest.mark.parametrize(("accumulate", "clip"), [(2, None), (3, 0.05)])
def test_accumulation_equals_a_larger_batch(tmp_path, accumulate, clip):
    """For losses that share no parameter: the step of one optimizer does not change the other's gradient."""

    class Apart(TwoOptimizers):
        def loss(self, batch, sign):
            return self.first(batch[0]).square().mean() + self.second(batch[0][:, :3]).square().mean()

    module = Apart(accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    expected = Apart(gradient_clip_val=clip)
    fit(module, tmp_path)
    fit(expected, tmp_path, batch_size=4 * accumulate)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


@pytest.mark.parametrize(("accumulate", "windows"), [(1, 6), (4, 2)])
def test_global_step_counts_windows_once(tmp_path, accumulate, windows):
    module = TwoOptimizers(accumulate_grad_batches=accumulate)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=windows, save_top_k=-1, filename="{step}")
    trainer = fit(module, tmp_path, saver)
    assert trainer.global_step == 2 * windows
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == sorted(f"step={windows * k}.ckpt" for k in (1, 2))


def test_max_steps_stops_in_time(tmp_path):
    assert fit(TwoOptimizers(), tmp_path, max_steps=5, max_epochs=-1).global_step == 5


def test_schedulers_follow_their_interval(tmp_path):
    module = TwoOptimizers()
    trainer = fit(module, tmp_path)
    assert module.rates == pytest.approx([0.1 * 0.5 ** (step + 1) for step in range(12)])
    assert trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_mask_holds_for_both_optimizers(tmp_path):
    module = TwoOptimizers()
    pruning = OneShotPruning(0.5, scope="layer")
    fit(module, tmp_path, pruning)
    for part, name in ((module.first, "first.weight"), (module.second, "second.weight")):
        assert torch.equal(part.weight == 0, ~pruning.mask[name])


def test_bad_arguments():
    with pytest.raises(ValueError, match="`gradient_clip_val` to be positive, but got 0"):
        ManualSteps(gradient_clip_val=0.0)
    with pytest.raises(ValueError, match="`gradient_clip_algorithm` to be 'norm' or 'value', but got 'l1'"):
        ManualSteps(gradient_clip_algorithm="l1")
    with pytest.raises(ValueError, match="`accumulate_grad_batches` to be at least 1, but got 0"):
        ManualSteps(accumulate_grad_batches=0)


def test_automatic_optimisation_is_refused(tmp_path):
    module = TwoOptimizers()
    module.automatic_optimization = True
    with pytest.raises(MisconfigurationException, match="TwoOptimizers has automatic_optimization=True"):
        module.steps.minimise(module, 0, lambda: None)
