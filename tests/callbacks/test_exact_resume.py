import contextlib
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_trust.callbacks import ExactResume
from tests.conformance import CallbackConformance, Host, assert_equal, rows, under_another_strategy
from tests.two_ranks import QUIET, GeneratorsDiffer, fit_on_two_ranks

EPOCHS, BATCHES = 3, 6


class TestConformance(CallbackConformance):
    callback = ExactResume
    # shuffled and seeded by the global generators, which differ
    equal_to_one_rank = False

    @staticmethod
    def comparable(state):
        # CUDA states aside, all of it
        return state

    def test_unsupported_strategy_is_refused(self, tmp_path):
        """It does not touch the host, and so does not ask for a strategy."""
        trainer = under_another_strategy(self.trainer(tmp_path, [ExactResume()]))
        trainer.fit(Host(), self.data())
        assert trainer.global_step == 2 * BATCHES


class Augmented(Dataset):
    """Draws from the global generators of torch and Python, in a worker where there is one."""

    def __init__(self, noise=0.1):
        self.rows, self.noise = rows(), noise

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        inputs, target = self.rows[row]
        if self.noise == 0.0:
            return inputs, target
        return inputs + self.noise * (torch.rand(6) + random.random()), target


class AugmentedData(pl.LightningDataModule):
    def __init__(self, workers=0, validation=True, sampler=None, persistent=False, batch_size=8):
        super().__init__()
        self.settings = {"num_workers": workers, "persistent_workers": persistent, "batch_size": batch_size}
        self.sampler, self.noise = sampler, 0.1
        if validation:
            self.val_dataloader = lambda: DataLoader(Augmented(), batch_size=16, shuffle=True)

    def train_dataloader(self):
        dataset = Augmented(self.noise)
        if self.sampler is not None:
            return DataLoader(dataset, sampler=self.sampler(dataset), **self.settings)
        return DataLoader(dataset, shuffle=True, **self.settings)


class DropoutHost(Host):
    def __init__(self):
        super().__init__(dropout=0.4)

    def validation_step(self, batch, batch_idx):
        # a host that draws in validation
        np.random.rand()
        torch.rand(5)
        super().validation_step(batch, batch_idx)


class Asks(DropoutHost):
    def configure_optimizers(self):
        # asks for the data before on_fit_start
        self.total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=int(self.total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Losses(Callback):
    """What every step saw, so that a difference shows at the step where it begins."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.global_step, float(batch[0].sum()), float(outputs["loss"])))


class KilledError(Exception):
    pass


class LateModelCheckpoint(ModelCheckpoint):
    """Ends the run once it has written a checkpoint."""

    def __init__(self, after, **settings):
        super().__init__(filename="last", enable_version_counter=False, **settings)
        self.after = after

    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        if trainer.global_step >= self.after:
            raise KilledError


def run(data, host, *callbacks, seed=11, **kwargs):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    losses = Losses()
    fit = {"ckpt_path": kwargs.pop("ckpt_path", None)}
    settings = {**QUIET, "max_epochs": EPOCHS, "enable_checkpointing": True, **kwargs}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        settings["enable_checkpointing"] = False
    trainer = pl.Trainer(**settings, callbacks=[ExactResume(), *callbacks, losses])
    with contextlib.suppress(KilledError):
        trainer.fit(host, datamodule=data, **fit)
    return host, losses.seen, trainer


def compare(folder, make_data, after, host=DropoutHost, saver=None, **kwargs):
    whole, seen, trainer = run(make_data(), host(), **kwargs)
    assert trainer.global_step == EPOCHS * BATCHES
    killed = LateModelCheckpoint(after, dirpath=folder, **(saver or {"every_n_train_steps": 1}))
    _, _, stopped = run(make_data(), host(), killed, **kwargs)
    assert stopped.global_step < EPOCHS * BATCHES
    resumed, rest, last = run(make_data(), host(), seed=99, ckpt_path=folder / "last.ckpt", **kwargs)
    assert rest == seen[stopped.global_step :]
    assert last.global_step == trainer.global_step
    assert_equal(dict(whole.state_dict()), dict(resumed.state_dict()), "weights")
    return seen


# -- one rank ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("after", [1, 5, 6, 7, 12, 17])
def test_shuffle_dropout_and_augmentation(tmp_path, after, validation):
    compare(tmp_path, lambda: AugmentedData(validation=validation), after)


@pytest.mark.parametrize("after", [4, 6, 9])
def test_two_workers(tmp_path, after):
    compare(tmp_path, lambda: AugmentedData(workers=2), after)


def test_persistent_workers(tmp_path):
    compare(tmp_path, lambda: AugmentedData(workers=1, persistent=True), 3)


@pytest.mark.parametrize("after", [2, 6, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_hosts_that_ask_for_the_number_of_steps(tmp_path, after, workers):
    compare(tmp_path, lambda: AugmentedData(workers=workers), after, host=Asks)


@pytest.mark.parametrize("after", [6, 12])
def test_saved_at_the_end_of_validation(tmp_path, after):
    saver = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    compare(tmp_path, AugmentedData, after, saver=saver)


@pytest.mark.parametrize("after", [6, 12])
@pytest.mark.parametrize("validation", [False, True])
def test_saved_at_the_end_of_a_training_epoch(tmp_path, after, validation):
    saver = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    compare(tmp_path, lambda: AugmentedData(validation=validation), after, saver=saver)


@pytest.mark.parametrize("after", [2, 4, 8])
def test_validation_within_the_epoch(tmp_path, after):
    compare(tmp_path, AugmentedData, after, val_check_interval=2)
    saver = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    compare(tmp_path / "validation", AugmentedData, after, saver=saver, val_check_interval=2)


@pytest.mark.parametrize("after", [4, 6, 8])
def test_samplers_with_an_epoch(tmp_path, after):
    def data():
        return AugmentedData(sampler=lambda dataset: DistributedSampler(dataset, 1, 0, shuffle=True, seed=5))

    seen = compare(tmp_path, data, after)
    assert seen[0][1] != seen[BATCHES][1]


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_accumulation_between_two_optimizer_steps(tmp_path, after):
    whole, _, _ = run(AugmentedData(), DropoutHost(), accumulate_grad_batches=2)
    killed = LateModelCheckpoint(after, dirpath=tmp_path, every_n_train_steps=1)
    run(AugmentedData(), DropoutHost(), killed, accumulate_grad_batches=2)
    path = tmp_path / "last.ckpt"
    resumed, _, _ = run(AugmentedData(), DropoutHost(), seed=99, ckpt_path=path, accumulate_grad_batches=2)
    assert_equal(dict(whole.state_dict()), dict(resumed.state_dict()), "weights")


def test_limited_batches(tmp_path):
    for after in (2, 4, 5):
        folder = tmp_path / str(after)
        whole, seen, _ = run(AugmentedData(), DropoutHost(), limit_train_batches=4)
        killed = LateModelCheckpoint(after, dirpath=folder, every_n_train_steps=1)
        run(AugmentedData(), DropoutHost(), killed, limit_train_batches=4)
        path = folder / "last.ckpt"
        resumed, rest, _ = run(AugmentedData(), DropoutHost(), seed=99, ckpt_path=path, limit_train_batches=4)
        assert rest == seen[after:]
        assert_equal(dict(whole.state_dict()), dict(resumed.state_dict()), "weights")


def test_killed_twice(tmp_path):
    whole, seen, _ = run(AugmentedData(), DropoutHost())
    path = None
    for place, after in enumerate((2, 5, 11)):
        killed = LateModelCheckpoint(after, dirpath=tmp_path / str(place), every_n_train_steps=1)
        run(AugmentedData(), DropoutHost(), killed, seed=11 + place, ckpt_path=path)
        path = tmp_path / str(place) / "last.ckpt"
    resumed, rest, _ = run(AugmentedData(), DropoutHost(), seed=99, ckpt_path=path)
    assert rest == seen[11:]
    assert_equal(dict(whole.state_dict()), dict(resumed.state_dict()), "weights")


def test_a_finished_run_goes_on(tmp_path):
    whole, seen, _ = run(AugmentedData(), DropoutHost(), max_epochs=4)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, every_n_epochs=1)
    run(AugmentedData(), DropoutHost(), saver, max_epochs=2)
    path = tmp_path / "last.ckpt"
    resumed, rest, _ = run(AugmentedData(), DropoutHost(), seed=99, max_epochs=4, ckpt_path=path)
    assert rest == seen[2 * BATCHES :]
    assert_equal(dict(whole.state_dict()), dict(resumed.state_dict()), "weights")


def test_without_it_a_resumed_run_is_another(tmp_path):
    _, seen, _ = run(AugmentedData(), DropoutHost())
    killed = LateModelCheckpoint(4, dirpath=tmp_path, every_n_train_steps=1)
    run(AugmentedData(), DropoutHost(), killed)
    torch.manual_seed(11)
    losses = Losses()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": EPOCHS, "callbacks": [losses]})
    trainer.fit(DropoutHost(), datamodule=AugmentedData(), ckpt_path=tmp_path / "last.ckpt")
    assert losses.seen[0] != seen[4]


def test_it_changes_nothing_but_validation():
    """With it or without it, an uninterrupted run without validation is the same."""
    found = []
    for callbacks in ([ExactResume()], []):
        torch.manual_seed(3)
        random.seed(3)
        host = DropoutHost()
        torch.manual_seed(4)
        trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": callbacks})
        trainer.fit(host, datamodule=AugmentedData(validation=False))
        found.append(dict(host.state_dict()))
    assert_equal(found[0], found[1], "weights")


def test_the_loops_are_left_as_they_were():
    _, _, trainer = run(AugmentedData(), DropoutHost())
    loops = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop
    for loop in loops:
        assert not {"setup_data", "on_advance_start", "on_run_start", "run"} & set(loop.__dict__)


# -- ranks -------------------------------------------------------------------------------------------------------------
class OnRanks(AugmentedData):
    """Half a batch a rank."""

    def __init__(self):
        super().__init__(validation=False, batch_size=4)
        self.sampler = lambda dataset: DistributedSampler(dataset, shuffle=True, seed=2)


def on_two_ranks(folder, *callbacks, host=None, **kwargs):
    losses = Losses()
    return fit_on_two_ranks(
        folder,
        host or DropoutHost(),
        OnRanks(),
        [ExactResume(), *callbacks, losses],
        lambda _, module: (losses.seen, module.state_dict()),
        max_epochs=2,
        **kwargs,
    )


class SaveAt(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resume_on_ranks(folder, path, host=None):
    losses, last = Losses(), Bring(folder)
    last.losses = losses
    callbacks = [GeneratorsDiffer(), ExactResume(), losses, last]
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "devices": 2, "strategy": "ddp_fork", "callbacks": callbacks})
    trainer.fit(host or DropoutHost(), datamodule=OnRanks(), ckpt_path=path)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


class Bring(Callback):
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def on_train_end(self, trainer, pl_module):
        torch.save((self.losses.seen, pl_module.state_dict()), self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("step", [2, 6, 8])
def test_two_ranks_with_random_states_of_their_own(tmp_path, step):
    whole = on_two_ranks(tmp_path / "whole", SaveAt(tmp_path / "run.ckpt", step))
    resumed = resume_on_ranks(tmp_path / "resumed", tmp_path / "run.ckpt")
    for (seen, state), (rest, again) in zip(whole, resumed, strict=True):
        assert rest == seen[step:]
        assert_equal(dict(state), dict(again), "weights")
    # augmentation draws differ between the ranks
    assert whole[0][0][0][1] != whole[1][0][0][1]


@pytest.mark.parametrize("host", [DropoutHost, Asks])
def test_another_number_of_ranks_is_refused(tmp_path, host):
    message = (
        r"ExactResume resumes on as many ranks as saved their random state \({}\), but got {}\. Use as many devices, or"
        r" remove ExactResume from `callbacks`\."
    )
    on_two_ranks(tmp_path / "whole", SaveAt(tmp_path / "two.ckpt", 2), host=host())
    with pytest.raises(MisconfigurationException, match="^" + message.format(2, 1) + "$"):
        run(AugmentedData(), host(), ckpt_path=tmp_path / "two.ckpt")
    killed = LateModelCheckpoint(2, dirpath=tmp_path, every_n_train_steps=1)
    run(AugmentedData(), host(), killed)
    with pytest.raises(Exception, match=message.format(1, 2)):
        resume_on_ranks(tmp_path / "resumed", tmp_path / "last.ckpt", host())


def test_a_checkpoint_saved_while_an_exception_is_handled(tmp_path):
    class SaveOnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "exception.ckpt")

    # the batch of the step that failed had been drawn: exact where drawing it takes no random numbers
    def data():
        made = AugmentedData(validation=False)
        made.noise = 0.0
        return made

    _, seen, _ = run(data(), Host())
    with pytest.raises(ZeroDivisionError):
        run(data(), Host(), Fails(4), SaveOnException())
    _, rest, _ = run(data(), Host(), seed=99, ckpt_path=tmp_path / "exception.ckpt")
    assert rest == seen[4:]


class Fails(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise ZeroDivisionError
