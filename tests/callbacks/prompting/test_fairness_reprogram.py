"""FairnessReprogramming, AdversarialDebiasing and FairnessEvaluation: against a loop, and on hosts of several kinds."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.callbacks import AdversarialDebiasing, FairnessEvaluation, FairnessReprogramming, SavePrompt
from lightning_trust.core.wrapping import checksum
from lightning_trust.metrics import DemographicParityGap, EqualizedOddsGap, WorstGroupAccuracy
from lightning_trust.nn import (
    BorderTrigger,
    ConcatTrigger,
    FairnessAdversary,
    WatermarkPrompt,
    load_prompt,
)
from tests.conformance import BATCH, CLASSES, CallbackConformance, Data, Host, rows
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks

TRIGGER = {"class_path": "ConcatTrigger", "init_args": {"num_features": 6}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}
PLAYERS = {"num_classes": CLASSES, "hidden": [8], "adversary_lr": 0.01, "lmbda": 0.5}


class Grouped(pl.LightningDataModule):
    """The data of the conformance tests, whose batches tell a group that leans on the class as well."""

    def __init__(self, data: pl.LightningDataModule) -> None:
        super().__init__()
        self.data = data

    def grouped(self, loader: DataLoader) -> DataLoader:
        inputs, targets = loader.dataset.tensors
        groups = (torch.arange(len(targets)) // 3 + (targets == 1).long()) % 2
        dataset = TensorDataset(inputs + 0.5 * groups[:, None], targets, groups)
        if torch.distributed.is_initialized() and isinstance(loader.sampler, DistributedSampler):
            sampler = DistributedSampler(dataset, shuffle=self.data.shuffle)
            return DataLoader(dataset, batch_size=self.data.batch_size, sampler=sampler)
        shuffle = isinstance(loader.sampler, torch.utils.data.RandomSampler)
        return DataLoader(dataset, batch_size=self.data.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self.grouped(self.data.train_dataloader())

    def val_dataloader(self):
        return self.grouped(self.data.val_dataloader())

    def test_dataloader(self):
        return self.grouped(self.data.test_dataloader())

    def predict_dataloader(self):
        return self.grouped(self.data.predict_dataloader())


class TestFairnessReprogramming(CallbackConformance):
    callback = FairnessReprogramming
    arguments: ClassVar = {"trigger": TRIGGER, "criterion": "eo", "optimizer": SGD, **PLAYERS}
    wrap_data = staticmethod(Grouped)


class TestAdversarialDebiasing(CallbackConformance):
    callback = AdversarialDebiasing
    arguments: ClassVar = {"criterion": "eo", **PLAYERS}
    wrap_data = staticmethod(Grouped)


class TestFairnessEvaluation(CallbackConformance):
    callback = FairnessEvaluation
    arguments: ClassVar = {"num_classes": CLASSES}
    wrap_data = staticmethod(Grouped)


def made(folder, *callbacks, **settings):
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**QUIET, "max_epochs": 2, **settings})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def reprogramming(**changes: Any) -> FairnessReprogramming:
    settings = {"trigger": ConcatTrigger(6), "optimizer": sgd, "seed": 5, **PLAYERS, **changes}
    return FairnessReprogramming(**settings)


# -- the update --------------------------------------------------------------------------------------------------------
def by_hand(network, trigger, batches, adversary, criterion, lmbda, project, micro=1):
    """The two-player update as a plain loop over windows of micro-batches."""
    player = torch.optim.SGD(trigger.parameters(), lr=0.5)
    opponent = torch.optim.Adam(adversary.parameters(), lr=0.01, weight_decay=2e-5)
    names = list(dict(trigger.named_parameters()))
    for start in range(0, len(batches), micro):
        window = batches[start : start + micro]
        totals = {name: [0.0, 0.0] for name in names}
        played = []
        for x, y, z in window:
            logits = network(trigger(x))
            shown = y if criterion == "eo" else None
            own = torch.autograd.grad(F.cross_entropy(logits, y), trigger.parameters(), retain_graph=True)
            other = torch.autograd.grad(F.cross_entropy(adversary(logits, shown), z), trigger.parameters())
            for name, g_u, g_a in zip(names, own, other, strict=True):
                # the divisor is that of Lightning, also in a window that the data end
                totals[name][0] = totals[name][0] + g_u / micro
                totals[name][1] = totals[name][1] + g_a / micro
            played.append((logits.detach(), shown, z))
        for name, parameter in trigger.named_parameters():
            g_u, g_a = totals[name]
            u = g_a / g_a.norm()
            parameter.grad = g_u - (g_u * u).sum() * u - lmbda * g_a if project else g_u - lmbda * g_a
        player.step()
        opponent.zero_grad()
        losses = [F.cross_entropy(adversary(logits, shown), z) for logits, shown, z in played]
        (sum(losses) / len(losses)).backward()
        opponent.step()


@pytest.mark.parametrize(("criterion", "lmbda", "project", "micro"), [
    ("dp", 0.5, True, 1),
    ("eo", 0.0, True, 1),
    ("eo", 2.0, False, 1),
    ("eo", 2.0, True, 3),
])  # fmt: skip
def test_update_is_the_rule_of_the_paper(tmp_path, criterion, lmbda, project, micro):
    host, callback = Host(), reprogramming(criterion=criterion, lmbda=lmbda, project=project)
    data = Grouped(Data())
    trainer = made(tmp_path, callback, accumulate_grad_batches=micro, limit_val_batches=0)
    trainer.fit(host, data)

    reference, trigger = Host(), ConcatTrigger(6)
    adversary = FairnessAdversary(CLASSES, 2, criterion, (8,))
    first = reprogramming(criterion=criterion)
    first.random = type(first.random)(5, first.state_key)
    first.begin(trainer, host)
    adversary.load_state_dict(first.adversary.state_dict())
    batches = 2 * list(data.train_dataloader())
    assert len(batches) // 2 % micro == 0
    by_hand(reference.net.eval().requires_grad_(False), trigger, batches, adversary, criterion, lmbda, project, micro)
    assert (callback.trigger.offset - 0.0).abs().max() > 0.01
    assert_equal_states(callback.trigger.state_dict(), trigger.state_dict(), rtol=0.0, atol=1e-5)
    assert_equal_states(callback.adversary.state_dict(), adversary.state_dict(), rtol=0.0, atol=1e-5)


def test_debiasing_follows_the_same_rule(tmp_path):
    callback = AdversarialDebiasing(criterion="eo", seed=5, **PLAYERS)
    host = Host()
    trainer = made(tmp_path, callback, limit_train_batches=1, max_epochs=1, limit_val_batches=0)
    trainer.fit(host, Grouped(Data()))
    first = AdversarialDebiasing(criterion="eo", seed=5, **PLAYERS)
    first.random = type(first.random)(5, first.state_key)
    first.begin(trainer, host)
    reference = Host()
    x, y, z = next(iter(Grouped(Data()).train_dataloader()))
    logits = reference(x)
    parameters = list(reference.parameters())
    own = torch.autograd.grad(F.cross_entropy(logits, y), parameters, retain_graph=True)
    other = torch.autograd.grad(F.cross_entropy(first.adversary(logits, y), z), parameters)
    optimizer = reference.configure_optimizers()[0][0]
    for parameter, g_u, g_a in zip(parameters, own, other, strict=True):
        u = g_a / g_a.norm()
        parameter.grad = g_u - (g_u * u).sum() * u - 0.5 * g_a
    optimizer.step()
    assert_equal_states(host.state_dict(), reference.state_dict(), rtol=0.0, atol=1e-6)


def test_two_ranks_project_means(tmp_path):
    """Ranks that projected their own gradients and then averaged would end elsewhere."""

    def ended(_, module):
        callback = next(each for each in module.trainer.callbacks if isinstance(each, FairnessReprogramming))
        return {**callback.trigger.state_dict(), **callback.adversary.state_dict()}

    data = {"batch_size": BATCH // 2}
    # weak gradients of few rows differ much between ranks
    found = fit_on_two_ranks(
        tmp_path, Host(), Grouped(Data(**data)), [reprogramming(criterion="eo", lmbda=3.0)], ended, max_epochs=2
    )
    assert_equal_states(*found)
    callback = reprogramming(criterion="eo", lmbda=3.0)
    made(tmp_path, callback).fit(Host(), Grouped(Data()))
    whole = {**callback.trigger.state_dict(), **callback.adversary.state_dict()}
    assert_equal_states(found[0], whole, rtol=0.0, atol=1e-5)


def test_a_loss_scale_takes_no_part_in_the_update(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    ended = {}
    for scale in (None, 2.0**6):
        callback = reprogramming(criterion="eo", lmbda=2.0, project=False)
        plugins = []
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        made(tmp_path, callback, plugins=plugins, max_epochs=1, limit_val_batches=0).fit(Host(), Grouped(Data()))
        ended[scale] = callback.trigger.state_dict()
    assert ended[None]["offset"].abs().max() > 0.02
    # as far as half precision tells; a part on another scale would be 64 times too large
    assert_equal_states(ended[None], ended[2.0**6], rtol=0.0, atol=0.003)


# -- the host ----------------------------------------------------------------------------------------------------------
class Images(pl.LightningModule):
    """A user's classifier with BatchNorm and dropout, which knows batches of two entries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 2)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(dim=1) == y).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def tinted(count=64, seed=0):
    """Images whose class is the upper half's brightness, and whose group the left half's."""
    generator = torch.Generator().manual_seed(seed)
    targets, groups = torch.arange(count) % 2, torch.arange(count) // 2 % 2
    images = 0.2 * torch.rand(count, 1, 8, 8, generator=generator)
    images[:, :, :4] += 0.4 * targets.view(-1, 1, 1, 1)
    images[:, :, :, :4] += 0.4 * groups.view(-1, 1, 1, 1)
    return TensorDataset(images, targets, groups)


def loaders():
    return {
        "train_dataloaders": DataLoader(tinted(), batch_size=16),
        "val_dataloaders": DataLoader(tinted(seed=1), batch_size=16),
    }


def test_nothing_of_the_frozen_network_moves(tmp_path):
    host = Images()
    before = checksum(host)
    callback = FairnessReprogramming(BorderTrigger(8, 1, channels=1), "eo", optimizer=sgd, hidden=[8])
    trigger = checksum(callback.trigger)
    made(tmp_path, callback).fit(host, **loaders())
    assert checksum(host) == before
    assert checksum(callback.trigger) != trigger
    assert all(parameter.requires_grad for parameter in host.parameters())
    assert callback.adversary is not None


def test_measures_are_those_of_the_reprogrammed_network(tmp_path):
    host, callback = Images(), reprogramming(trigger=WatermarkPrompt(8, 1, channels=1), num_classes=2)
    trainer = made(tmp_path, callback)
    trainer.fit(host, **loaders())
    for found in (dict(trainer.callback_metrics), trainer.test(host, DataLoader(tinted(seed=1), 7), verbose=False)[0]):
        x, y, z = tinted(seed=1).tensors
        logits = host.net.eval()(callback.trigger.eval()(x)).detach()
        for name, kind in (
            ("trust/dp_gap", DemographicParityGap),
            ("trust/eo_gap", EqualizedOddsGap),
            ("trust/worst_group_acc", WorstGroupAccuracy),
        ):
            metric = kind()
            metric.update(logits, y, z)
            assert float(found[name]) == pytest.approx(metric.compute().item(), abs=1e-6), name


def test_measures_of_a_plain_run(tmp_path):
    host = Images()
    host.net[-1].weight.data.zero_()
    x, y, z = tinted().tensors
    (found,) = made(tmp_path, FairnessEvaluation()).validate(
        host, DataLoader(TensorDataset(x, y, z), 10), verbose=False
    )
    # a constant treats all alike, and one class badly
    assert {name: value for name, value in found.items() if name.startswith("trust/")} == {
        "trust/dp_gap": 0.0,
        "trust/eo_gap": 0.0,
        "trust/worst_group_acc": 0.0,
    }


class Dictionaries(Images):
    """A user's module whose batches are dictionaries, which it hands on whole."""

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"image", "label"}
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))


class AsDictionaries(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = tinted()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return dict(zip(("image", "label", "tint"), self.rows[index], strict=True))


def test_batches_of_any_kind(tmp_path):
    from lightning_trust.core.batch import BatchSpec

    host = Dictionaries()
    callback = FairnessReprogramming(
        BorderTrigger(8, 1, channels=1), hidden=[4], sensitive="tint", batch_spec=BatchSpec("image", "label")
    )
    data = DataLoader(AsDictionaries(), batch_size=16)
    trainer = made(tmp_path, callback)
    trainer.fit(host, data, data)
    assert trainer.global_step == 8
    assert "trust/eo_gap" in trainer.callback_metrics


def test_checkpoint_of_the_best_worst_group(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="trust/worst_group_acc", mode="max")
    host = Images()
    names = list(host.state_dict())
    settings = {"trigger": WatermarkPrompt(8, 1, channels=1), "num_classes": 2}
    made(tmp_path, reprogramming(**settings), best, enable_checkpointing=True).fit(host, **loaders())
    saved = torch.load(best.best_model_path, weights_only=True)
    assert list(saved["state_dict"]) == names
    state = saved["callbacks"]["FairnessReprogramming"]
    assert set(state) == {"part", "adversary", "adversary_optimizer"}
    # another process, from the file: the same figures
    fresh = reprogramming(**{**settings, "trigger": WatermarkPrompt(8, 1, channels=1)})
    fresh.trigger.load_state_dict({name: value + 1.0 for name, value in fresh.trigger.state_dict().items()})
    (found,) = made(tmp_path, fresh).validate(
        Images(), loaders()["val_dataloaders"], ckpt_path=best.best_model_path, verbose=False
    )
    assert found["trust/worst_group_acc"] == pytest.approx(float(best.best_model_score), abs=1e-6)


def test_trigger_goes_into_files_that_load_without_a_trainer(tmp_path):
    host, callback = Images(), reprogramming(trigger=BorderTrigger(8, 1, channels=1), num_classes=2)
    made(tmp_path, callback, SavePrompt()).fit(host, **loaders())
    loaded = load_prompt(tmp_path / "prompt", host.net.eval())
    x = tinted(seed=1).tensors[0]
    assert torch.equal(loaded(x), host.net(callback.trigger(x)))


# -- what it is for ----------------------------------------------------------------------------------------------------
class Leaning(pl.LightningModule):
    """A linear classifier that reads the class from one feature and the group from another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.net.weight.data = torch.tensor([[0.0, 0.0], [4.0, 3.0]])
        self.net.bias.data = torch.tensor([0.0, -3.5])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def test_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return None


def leaning(count=512):
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(count) % 2
    agrees = torch.rand(count, generator=generator) < 0.9
    groups = torch.where(agrees, targets, 1 - targets)
    noise = 0.3 * torch.randn(count, 2, generator=generator)
    return TensorDataset(torch.stack([targets, groups], dim=1) + noise, targets, groups)


@pytest.mark.parametrize("criterion", ["dp", "eo"])
def test_a_mask_removes_what_leans_on_the_group(tmp_path, criterion):
    gaps = {}
    for lmbda in (None, 0.0, 1.0):
        torch.manual_seed(0)
        callback: Any = FairnessEvaluation()
        if lmbda is not None:
            callback = FairnessReprogramming(
                ConcatTrigger(2),
                criterion,
                lmbda,
                hidden=[16],
                optimizer=lambda parameters: torch.optim.Adam(parameters, 0.02),
                adversary_lr=0.1 if criterion == "eo" else 0.02,
            )
        host = Leaning()
        trainer = made(tmp_path, callback, max_epochs=30)
        if lmbda is not None:
            trainer.fit(host, DataLoader(leaning(), batch_size=64, shuffle=True))
        gaps[lmbda] = trainer.test(host, DataLoader(leaning(), batch_size=512), verbose=False)[0][
            f"trust/{criterion}_gap"
        ]
    assert gaps[1.0] < 0.5 * gaps[None], gaps
    assert gaps[1.0] < 0.8 * gaps[0.0], gaps


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_bad_arguments():
    for arguments, message in (
        ({"criterion": "cf"}, "`criterion` to be 'dp' or 'eo', but got 'cf'"),
        ({"lmbda": -0.1}, "`lmbda` to be at least 0, but got -0.1"),
        ({"adversary_lr": 0.0}, "`adversary_lr` to be positive, but got 0.0"),
        ({"adversary_weight_decay": -1.0}, "`adversary_weight_decay` to be at least 0"),
        ({"num_groups": 1}, "`num_groups` .* at least 2, but got 1"),
        ({"hidden": [0]}, "`hidden` to be positive"),
    ):
        for kind in (reprogramming, lambda **given: AdversarialDebiasing(**given)):
            with pytest.raises(ValueError, match=message):
                kind(**arguments)


def test_bad_data(tmp_path):
    plain = DataLoader(rows(), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"FairnessReprogramming needs \(x, y, z\) .* at 2 of a batch"):
        made(tmp_path, reprogramming()).fit(Host(), plain)
    with pytest.raises(MisconfigurationException, match=r"FairnessEvaluation needs \(x, y, z\)"):
        made(tmp_path, FairnessEvaluation(num_classes=CLASSES)).test(Host(), plain)
    x, y = rows().tensors
    far = DataLoader(TensorDataset(x, y, torch.full_like(y, 2)), batch_size=8)
    with pytest.raises(ValueError, match=r"sensitive attribute to be in \[0, 2\), but got values from 2 to 2"):
        made(tmp_path, reprogramming()).fit(Host(), far)
    alone = DataLoader(TensorDataset(x, y, torch.zeros_like(y)), batch_size=8)
    with pytest.raises(ValueError, match="none of group 1"):
        made(tmp_path, FairnessEvaluation(num_classes=CLASSES)).validate(Host(), alone, verbose=False)
    with pytest.warns(UserWarning, match="A run of one batch does not tell how fair it is: .* none of group 1"):
        made(tmp_path, FairnessEvaluation(num_classes=CLASSES), fast_dev_run=True).validate(
            Host(), alone, verbose=False
        )


def test_wrong_number_of_classes(tmp_path):
    with pytest.raises(ValueError, match=r"logits of shape \(N, 2\), one a class, but got \(8, 3\)"):
        made(tmp_path, reprogramming(num_classes=2), num_sanity_val_steps=0).fit(Host(), Grouped(Data()))


def test_host_that_goes_around_its_network(tmp_path):
    class Around(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net.forward(x), y)

    with pytest.raises(MisconfigurationException, match="did not call it"):
        made(tmp_path, reprogramming()).fit(Around(), Grouped(Data()))
    with pytest.raises(MisconfigurationException, match="did not call it"):
        made(tmp_path, AdversarialDebiasing(**PLAYERS)).fit(Around(), Grouped(Data()))
