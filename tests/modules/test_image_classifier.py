import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.core.schedules import LinearWarmup, Product, Steps
from lightning_trust.datamodules import Digits, FashionMNIST
from lightning_trust.modules import ImageClassifier


def trainer(tmp_path, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, **{**quiet, "enable_checkpointing": False, **arguments})


def tiny(**arguments):
    return ImageClassifier(**{"network_args": {"widths": [4, 8]}, **arguments})


class LearningRates(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.seen:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learns_fashion_mnist(tmp_path):
    pl.seed_everything(0, verbose=False)
    classifier = ImageClassifier()
    data = FashionMNIST(train_rows=2000, val_rows=500, test_rows=1000, batch_size=64)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(classifier, data)
    assert run.callback_metrics["val/acc"] > 0.6
    (result,) = run.test(classifier, data, verbose=False)
    assert result["test/acc"] > 0.6


def test_one_step_is_that_of_plain_torch(tmp_path):
    classifier = tiny(schedule="constant")
    data = Digits(train_rows=32, batch_size=32)
    by_hand = pickle.loads(pickle.dumps(classifier.network))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(classifier, data)
    inputs, targets = data.train_dataset.images / 16, data.train_dataset.targets
    for _ in range(2):
        optimizer.zero_grad()
        log_probabilities = by_hand(inputs).log_softmax(1)
        (-log_probabilities[range(32), targets]).mean().backward()
        optimizer.step()
    for (name, parameter), expected in zip(classifier.network.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cosine_ends_at_zero_after_the_last_step(accumulate, tmp_path):
    rates = LearningRates()
    run = trainer(tmp_path, max_epochs=2, callbacks=[rates], accumulate_grad_batches=accumulate, limit_val_batches=0)
    run.fit(tiny(), Digits(train_rows=256, batch_size=64))
    steps = 8 // accumulate
    assert run.global_step == steps
    expected = [0.05 * (1 + math.cos(math.pi * t / steps)) for t in range(steps + 1)]
    assert sorted(set(rates.seen), reverse=True) == pytest.approx(expected, abs=1e-9)
    assert rates.seen[-1] == pytest.approx(0.0, abs=1e-9)


def test_constant_schedule(tmp_path):
    rates = LearningRates()
    run = trainer(tmp_path, max_epochs=1, callbacks=[rates], limit_val_batches=0)
    run.fit(tiny(schedule="constant"), Digits(train_rows=128))
    assert set(rates.seen) == {0.1}


@pytest.mark.parametrize("schedule", ["cosine", "cyclic"])
def test_cosine_and_cycle_refuse_a_run_without_end(schedule, tmp_path):
    with pytest.raises(MisconfigurationException, match="the Trainer has neither `max_epochs` nor `max_steps`"):
        trainer(tmp_path, max_epochs=-1).fit(tiny(schedule=schedule), Digits(train_rows=64))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cycle_goes_up_from_zero_and_down_again(accumulate, tmp_path):
    rates = LearningRates()
    run = trainer(tmp_path, max_epochs=2, callbacks=[rates], accumulate_grad_batches=accumulate, limit_val_batches=0)
    run.fit(tiny(schedule="cyclic"), Digits(train_rows=256, batch_size=64))
    # what torch's CyclicLR gives with half of the steps up and half down
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, 0.1, 4 // accumulate, 4 // accumulate, "triangular")
    expected = [optimizer.param_groups[0]["lr"]]
    for _ in range(8 // accumulate):
        optimizer.step()
        cyclic.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates.seen[::accumulate] == pytest.approx(expected, abs=1e-9)


def test_warm_up_and_steps_by_fractions_of_an_epoch(tmp_path):
    rates = LearningRates()
    schedule = Product([LinearWarmup(0.25, 1.0, epochs=1.5), Steps([1.0, 0.1], milestones=[2])])
    run = trainer(tmp_path, max_epochs=3, callbacks=[rates], limit_val_batches=0)
    run.fit(tiny(schedule=schedule), Digits(train_rows=128, batch_size=32))
    up = [0.025 + 0.075 * step / 6 for step in range(6)]
    assert rates.seen == pytest.approx([*up, 0.1, 0.1, *[0.01] * 5])


def test_schedule_object_stays_out_of_the_checkpoint(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(tiny(schedule=LinearWarmup(0.0, 1.0, epochs=1)), Digits(train_rows=64))
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.schedule == "cosine"


def test_schedule_object_from_the_command_line():
    arguments = ["--model.schedule=LinearWarmup", "--model.schedule.start=0", "--model.schedule.end=1"]
    cli = LightningCLI(ImageClassifier, Digits, run=False, args=[*arguments, "--model.schedule.epochs=5"])
    assert cli.model.schedule == LinearWarmup(0.0, 1.0, epochs=5)


def test_metrics_are_those_of_the_whole_split(tmp_path):
    classifier, data = tiny(), Digits(batch_size=50)
    run = trainer(tmp_path)
    (validated,) = run.validate(classifier, data, verbose=False)
    (tested,) = run.test(classifier, data, verbose=False)
    for stage, dataset, got in (("val", data.val_dataset, validated), ("test", data.test_dataset, tested)):
        with torch.no_grad():
            logits = classifier.eval()(dataset.images / 16)
        expected = {
            f"{stage}/loss": F.cross_entropy(logits, dataset.targets).item(),
            f"{stage}/acc": (logits.argmax(1) == dataset.targets).float().mean().item(),
        }
        assert got == pytest.approx(expected, rel=1e-5)


def test_train_loss_is_logged_per_step(tmp_path):
    logged = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append((trainer.callback_metrics["train/loss"].item(), outputs["loss"].item()))

    run = trainer(tmp_path, max_epochs=1, callbacks=[Watch()], limit_val_batches=0)
    run.fit(tiny(), Digits(train_rows=128))
    assert len(logged) == 2
    assert all(shown == pytest.approx(loss) for shown, loss in logged)


def test_predict_gives_probabilities(tmp_path):
    classifier, data = tiny(), Digits(test_rows=50)
    probabilities = torch.cat(trainer(tmp_path).predict(classifier, data))
    with torch.no_grad():
        expected = classifier.eval()(data.test_dataset.images / 16).softmax(1)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(classifier.predict_step(data.test_dataset.images / 16, 0), expected)


def test_network_holds_all_parameters():
    classifier = tiny()
    assert {id(p) for p in classifier.parameters()} == {id(p) for p in classifier.network.parameters()}
    assert all(name.startswith("network.") for name in classifier.state_dict())


@pytest.mark.parametrize(
    ("network", "kind"),
    [("resnet20", "ThinResNet"), ("test_resnet", "ResNet"), ("lightning_trust.nn.SmallCNN", "SmallCNN")],
)
def test_network_by_name(network, kind):
    assert type(ImageClassifier(network).network).__name__ == kind


def test_network_as_a_module():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert ImageClassifier(network).network is network


def test_checkpoint_loads_without_the_arguments(tmp_path):
    classifier = tiny(schedule="constant")
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(classifier, Digits(train_rows=64))
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.schedule == "constant"
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name])


def test_checkpoint_with_a_network_of_ones_own(tmp_path):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    classifier = ImageClassifier(network())
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(classifier, Digits(train_rows=64))
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", network=network())
    assert torch.equal(loaded.network[1].weight, classifier.network[1].weight)


CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "ImageClassifier",
        "init_args": {
            "network": "SmallCNN",
            "network_args": {"widths": [4, 8]},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
            "schedule": "constant",
        },
    },
    "data": {"class_path": "Digits", "init_args": {"train_rows": 128, "batch_size": 32, "normalise": True}},
}


def command_line(tmp_path, *arguments, config=None, run=True):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config or CONFIG))
    cli_arguments = [
        f"--config={tmp_path / 'config.yaml'}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *arguments,
    ]
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=run,
        args=["fit", *cli_arguments] if run else cli_arguments,
    )


def test_yaml_builds_what_it_says(tmp_path):
    cli = command_line(tmp_path, run=False)
    assert isinstance(cli.model, ImageClassifier)
    assert [m.out_channels for m in cli.model.modules() if isinstance(m, nn.Conv2d)] == [4, 8]
    assert cli.model.schedule == "constant"
    optimizer = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 0.02
    assert isinstance(cli.datamodule, Digits)
    assert cli.datamodule.normalise is True


def test_yaml_runs(tmp_path):
    cli = command_line(tmp_path, "--trainer.fast_dev_run=true")
    assert cli.trainer.global_step == 1
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])


def test_yaml_defaults_are_those_of_the_signature(tmp_path):
    cli = command_line(tmp_path, run=False, config={"model": "ImageClassifier", "data": "FashionMNIST"})
    cli.model.trainer = cli.trainer
    optimizer = cli.model._make_optimizer(cli.model.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }


def test_yaml_network_with_a_class_path(tmp_path):
    init = {"network": {"class_path": "lightning_trust.nn.SmallCNN", "init_args": {"widths": [4]}}}
    config = {**CONFIG, "model": {"class_path": "ImageClassifier", "init_args": init}}
    cli = command_line(tmp_path, run=False, config=config)
    assert cli.model.network.classifier.in_features == 4


def test_checkpoint_of_a_command_line_run_keeps_all_arguments(tmp_path):
    cli = command_line(tmp_path, "--trainer.max_epochs=1", "--trainer.limit_val_batches=0")
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    torch.load(tmp_path / "cli.ckpt", weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "cli.ckpt")
    optimizer = loaded.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 0.02
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, cli.model.state_dict()[name])


class RanksAgree(pl.Callback):
    """Runs in each rank, whose failed assertion reaches pytest as a ProcessRaisedException."""

    def on_train_end(self, trainer, pl_module):
        assert trainer.world_size == 2
        assert trainer.global_step == 2
        for name, value in pl_module.named_parameters():
            first, second = trainer.strategy.all_gather(value.detach())
            assert torch.equal(first, second), name

    def on_validation_end(self, trainer, pl_module):
        first, second = trainer.strategy.all_gather(trainer.callback_metrics["val/acc"])
        assert first == second


def test_two_ranks_agree(tmp_path):
    run = trainer(
        tmp_path, max_epochs=1, devices=2, strategy="ddp_fork", callbacks=[RanksAgree()], num_sanity_val_steps=0
    )
    run.fit(tiny(), Digits(train_rows=128, batch_size=32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "Expected argument `num_classes` to be an integer of at least 2, but got 1."),
        (
            {"schedule": "linear"},
            "Expected argument `schedule` to be 'cosine', 'cyclic', 'constant' or a Schedule, but got 'linear'.",
        ),
        ({"network": "SmalCNN"}, r"but got 'SmalCNN'. Did you mean one of \['SmallCNN'"),
        ({"in_channels": 0}, "Expected argument `in_channels` to be a positive integer, but got 0."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)


def test_network_args_with_a_module_are_refused():
    with pytest.raises(MisconfigurationException, match=r"got network_args=\{'widths': \[4\]\} and a Linear"):
        ImageClassifier(nn.Linear(3, 2), network_args={"widths": [4]})
