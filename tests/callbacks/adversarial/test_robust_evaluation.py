"""RobustEvaluation: figures by hand, default flags, resume, ranks, a network that is random, the self-test."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_trust.attacks import FGSM, PGD
from lightning_trust.callbacks import AdversarialTraining, RobustEvaluation
from lightning_trust.core.robustness_record import RobustnessRecord
from tests.callbacks.adversarial.test_adversarial_training import Images, images, in_a_box
from tests.conformance import CallbackConformance
from tests.two_ranks import QUIET


class TestRobustEvaluation(CallbackConformance):
    callback = RobustEvaluation
    arguments: ClassVar = {"attacks": {"pgd": {"class_path": "PGD", "init_args": {"eps": 0.3, "steps": 2}}}}
    wrap_data = staticmethod(in_a_box)


class Evaluated(Images):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass


ATTACKS = {"fgsm": FGSM(eps=0.05), "pgd": PGD(eps=0.1, steps=5)}


def trained() -> Evaluated:
    """A host that gets most of the test images right."""
    host = Evaluated()
    optimizer = torch.optim.Adam(host.parameters(), lr=0.02)
    x, y = images(40, seed=5).tensors
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(host.net(x), y).backward()
        optimizer.step()
    return host


def evaluate(callback, host, folder, batch_size=16, loader=None, **settings: Any):
    trainer = pl.Trainer(callbacks=[callback], default_root_dir=folder, **{**QUIET, **settings})
    (found,) = trainer.test(host, loader or DataLoader(images(40, seed=5), batch_size=batch_size), verbose=False)
    return found


def test_figures_are_those_of_a_plain_loop(tmp_path):
    host = trained()
    x, y = images(40, seed=5).tensors
    found = evaluate(
        RobustEvaluation({"fgsm": FGSM(eps=0.05), "pgd": PGD(eps=0.1, random_start=False)}), host, tmp_path
    )
    clean = host.net(x).argmax(1) == y
    fgsm = (host.net(FGSM(eps=0.05)(host.net, x, y)).argmax(1) == y) & clean
    pgd = (host.net(PGD(eps=0.1, random_start=False)(host.net, x, y)).argmax(1) == y) & clean
    assert found["trust/clean_acc"] == pytest.approx(clean.float().mean().item())
    assert found["trust/robust_acc/fgsm"] == pytest.approx(fgsm.float().mean().item())
    assert found["trust/robust_acc/pgd"] == pytest.approx(pgd.float().mean().item())
    assert found["trust/robust_acc/union"] == pytest.approx((fgsm & pgd).float().mean().item())
    assert 0.0 < found["trust/robust_acc/fgsm"] < found["trust/clean_acc"]


def test_neither_batch_size_nor_accuracy_of_others_changes_a_verdict(tmp_path):
    host = trained()
    first, second = (evaluate(RobustEvaluation(ATTACKS), host, tmp_path, batch_size=size) for size in (7, 40))
    assert first == pytest.approx(second)


def test_record_and_table(tmp_path, capsys):
    callback = RobustEvaluation(ATTACKS, eps_curve=[0.02, 0.2], label="mine", examples=3)
    found = evaluate(callback, trained(), tmp_path)
    record = RobustnessRecord.read(tmp_path)
    assert record == callback.record
    assert (record.label, record.samples) == ("mine", 40)
    for name in ("fgsm", "pgd", "union"):
        values = record.accuracy[name]
        assert values["low"] <= values["value"] <= values["high"]
        assert values["value"] == pytest.approx(found[f"trust/robust_acc/{name}"])
    curve = record.curves["pgd"]
    assert [point[0] for point in curve] == [0.0, 0.02, 0.2]
    # broken within a small ball is broken within a large one
    assert curve[0][1] >= curve[1][1] >= record.accuracy["pgd"]["value"] >= curve[2][1]
    text = capsys.readouterr().out
    assert "mine: accuracy in percent on 40 samples" in text
    assert (tmp_path / "robustness_examples.safetensors").is_file()


def test_monitored_by_checkpoint_and_early_stopping(tmp_path):
    callbacks = [
        AdversarialTraining(PGD(eps=0.1, steps=2)),
        RobustEvaluation({"pgd": PGD(eps=0.1, steps=2)}, every_n_epochs=2),
        ModelCheckpoint(dirpath=tmp_path, monitor="trust/robust_acc/pgd", mode="max"),
        EarlyStopping("trust/robust_acc/union", mode="max", patience=50),
    ]
    trainer = pl.Trainer(
        max_epochs=3, callbacks=callbacks, default_root_dir=tmp_path, **{**QUIET, "enable_checkpointing": True}
    )
    loader = DataLoader(images(), batch_size=8)
    trainer.fit(Evaluated(batch_norm=True), loader, loader)
    assert callbacks[2].best_model_score is not None
    assert trainer.lightning_module.net[1].num_batches_tracked == 9
    assert len(callbacks[1]._epoch_seconds) == 3


def test_a_cheap_attack_in_validation_and_a_strong_one_in_test(tmp_path):
    cheap = RobustEvaluation({"fgsm": FGSM(eps=0.1)}, stage="validate", name="cheap")
    strong = RobustEvaluation({"pgd": PGD(eps=0.1, steps=2)}, stage="test", name="strong")
    trainer = pl.Trainer(max_epochs=1, callbacks=[cheap, strong], default_root_dir=tmp_path, **QUIET)
    host, loader = Evaluated(), DataLoader(images(), batch_size=8)
    trainer.fit(host, loader, loader)
    logged = {name for name in trainer.callback_metrics if name.startswith("trust/")}
    assert logged == {"trust/clean_acc", "trust/robust_acc/fgsm", "trust/robust_acc/union"}
    (found,) = trainer.test(host, loader, verbose=False)
    assert set(found) == {"trust/clean_acc", "trust/robust_acc/pgd", "trust/robust_acc/union"}


def test_some_samples_are_the_same_whatever_the_batch_size(tmp_path):
    host = trained()
    callbacks = [RobustEvaluation(ATTACKS, max_samples=13, seed=4) for _ in range(2)]
    found = [evaluate(each, host, tmp_path, batch_size=size) for each, size in zip(callbacks, (5, 16), strict=True)]
    assert found[0] == pytest.approx(found[1])
    assert callbacks[0].record.samples == 13


def test_killed_evaluation_goes_on(tmp_path):
    class Counts(PGD):
        calls = 0

        def _perturb(self, problem):
            Counts.calls += len(problem)
            if Counts.calls > 24:
                raise KeyboardInterrupt
            return super()._perturb(problem)

    host, folder = trained(), str(tmp_path / "verdicts")
    whole = evaluate(RobustEvaluation({"pgd": PGD(eps=0.1, steps=3)}), host, tmp_path)
    killed = RobustEvaluation({"pgd": Counts(eps=0.1, steps=3)}, resume_dir=folder)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate(killed, host, tmp_path, batch_size=8)
    kept = [json.loads(path.read_text()) for path in (tmp_path / "verdicts").glob("*.json")]
    assert sum(len(each["rows"]) for each in kept) in range(8, 33)
    Counts.calls = -1000
    resumed = evaluate(RobustEvaluation({"pgd": Counts(eps=0.1, steps=3)}, resume_dir=folder), host, tmp_path)
    assert resumed == pytest.approx(whole)
    assert Counts.calls + 1000 < 40 - 8
    with pytest.raises(MisconfigurationException, match=r"`resume_dir` to hold verdicts .* differs in attacks"):
        evaluate(RobustEvaluation({"pgd": Counts(eps=0.2, steps=3)}, resume_dir=folder), host, tmp_path)
    shuffled = DataLoader(images(40, seed=5), batch_size=8, shuffle=True)
    with pytest.raises(MisconfigurationException, match=r"resume_dir=...\) must know which sample is which"):
        evaluate(RobustEvaluation(ATTACKS, resume_dir=folder), host, tmp_path, loader=shuffled)


class Noisy(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x + 0.1 * torch.randn_like(x))


def test_random_network_is_noticed(tmp_path):
    host = trained()
    host.net = Noisy(host.net)
    callback = RobustEvaluation({"pgd": PGD(eps=0.05, steps=2)}, repeats=4)
    with pytest.warns(UserWarning, match=r"Noisy is not deterministic.*4 passes.*AutoAttack\(version='rand'\)"):
        evaluate(callback, host, tmp_path)
    assert callback.record.random


class Rounds(nn.Module):
    """A defence that only masks gradients."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network((x * 8.0).round() / 8.0)


def test_self_test_tells_an_attack_from_a_masked_gradient(tmp_path):
    host = trained()
    evaluate(RobustEvaluation({"pgd": PGD(eps=0.1, steps=20)}, self_test=True), host, tmp_path)
    host.net = Rounds(host.net)
    with pytest.raises(RuntimeError, match=r"attack 'pgd' \(PGD\) found \d+ of \d+ weaknesses"):
        evaluate(RobustEvaluation({"pgd": PGD(eps=0.1, steps=20)}, self_test=True), host, tmp_path)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least one attack"):
        RobustEvaluation({})
    with pytest.raises(ValueError, match="other than 'clean' and 'union'"):
        RobustEvaluation({"union": FGSM()})
    for arguments in (
        {"stage": "fit"},
        {"every_n_epochs": 0},
        {"max_samples": 0},
        {"repeats": 0},
        {"eps_curve": [0.1, -1.0]},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            RobustEvaluation(ATTACKS, **arguments)
    with pytest.raises(ValueError, match="Did you mean 8/255"):
        evaluate(RobustEvaluation({"pgd": PGD(eps=8)}), trained(), tmp_path)

    class Shaped(Evaluated):
        pass

    host = Shaped(network=nn.Conv2d(1, 3, 3))
    with pytest.raises(ValueError, match=r"put out logits of shape \(N, K\), but got"):
        evaluate(RobustEvaluation(ATTACKS), host, tmp_path)
