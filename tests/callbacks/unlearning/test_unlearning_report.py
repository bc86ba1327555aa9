import errno
import json
import os
import time
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.svm import SVC
from torch import nn

from lightning_trust.callbacks import (
    ExactResume,
    FineTune,
    L1Sparse,
    LoadWeights,
    OneShotPruning,
    RandomLabel,
    SalUn,
    UnlearningReport,
    WeightSaliency,
)
from lightning_trust.core.records import RunRecord
from lightning_trust.datamodules import ForgetClass, ForgetRandom, ForgetSplit
from tests.conformance import CallbackConformance, Data, Host, Kill, assert_equal, forget_random
from tests.two_ranks import QUIET, fit_on_two_ranks


class TestConformance(CallbackConformance):
    callback = UnlearningReport
    arguments: ClassVar = {"verbose": False, "label": "mine"}
    wrap_data = staticmethod(forget_random)

    def arguments_in(self, folder):
        return {**self.arguments, "folder": str(folder)}

    @staticmethod
    def comparable(state):
        return {"before": state["before"]}


# -- tools -------------------------------------------------------------------------------------------------------------
def run(folder, *callbacks, host=None, data=None, report=None, **kwargs):
    """Host, record, trainer of a fit with a report."""
    report = report or UnlearningReport(folder=str(folder), verbose=False)
    host = Host() if host is None else host
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [report, *callbacks], **kwargs})
    trainer.fit(host, datamodule=data or forget_random(Data()))
    return host, report.record, trainer


@torch.no_grad()
def direct(host, split=None, bins=25):
    """The figures by hand, from the data as they are."""
    split = split or forget_random(Data())
    split.setup("fit")
    probabilities, targets = {}, {}
    host.eval()
    for part in ("forget", "retain", "test"):
        batches = list(split.part(part))
        targets[part] = torch.cat([labels for _, labels in batches])
        probabilities[part] = host(torch.cat([inputs for inputs, _ in batches])).double().softmax(1)
    hits = {part: float((p.argmax(1) == targets[part]).double().mean()) * 100 for part, p in probabilities.items()}
    confidence = {part: p.gather(1, targets[part].unsqueeze(1)) for part, p in probabilities.items()}
    count = min(len(confidence["retain"]), len(confidence["test"]))
    # the smaller side is used whole
    assert count == len(confidence["test"])
    return hits, confidence


def test_figures_equal_direct_computation(tmp_path):
    host, record, _ = run(tmp_path, RandomLabel())
    for metrics, model, histogram in (
        (record.metrics, host, record.confidence["after"]),
        (record.before, Host(), record.confidence["before"]),
    ):
        hits, confidence = direct(model)
        assert metrics["UA"] == pytest.approx(100.0 - hits["forget"])
        assert metrics["UA"] + hits["forget"] == pytest.approx(100.0)
        assert metrics["RA"] == pytest.approx(hits["retain"])
        assert metrics["TA"] == pytest.approx(hits["test"])
        for part in ("forget", "test"):
            expected = torch.histc(confidence[part], 25, 0.0, 1.0).long().tolist()
            assert histogram[part] == expected
            assert sum(histogram[part]) == len(confidence[part])
    assert record.confidence["edges"] == pytest.approx([place / 25 for place in range(26)])
    assert record.metrics != record.before


def test_membership_equals_a_direct_support_vector_machine(tmp_path):
    # as many test rows as retain rows, so that both sides are used whole
    class Even(Data):
        def test_dataloader(self):
            from torch.utils.data import DataLoader

            from tests.conformance import rows

            return DataLoader(rows(36, seed=5), batch_size=5)

    host, record, _ = run(tmp_path, FineTune(), data=forget_random(Even()), max_epochs=6)
    _, confidence = direct(host, forget_random(Even()))
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(torch.cat([confidence["retain"], confidence["test"]]).numpy(), [1] * 36 + [0] * 36)
    expected = 100.0 * (attack.predict(confidence["forget"].numpy()) == 0).mean()
    assert record.metrics["MIA"] == pytest.approx(expected)
    assert record.membership == {
        "feature": "confidence",
        "rows": 36,
        "note": "RBF support vector machine on 36 retain and as many test rows, drawn with seed 0",
    }


def test_the_file(tmp_path):
    pl.seed_everything(5, verbose=False)
    host, record, _ = run(tmp_path, OneShotPruning(0.25), SalUn())
    assert RunRecord.read(tmp_path) == record
    content = json.loads((tmp_path / "run.json").read_text())
    assert (content["kind"], content["version"]) == ("lightning_trust.run", 1)
    split = forget_random(Data())
    split.setup("fit")
    assert content["forget"] == {
        "hash": split.forget_hash,
        "spec": "ForgetRandom(fraction=0.25, num=None, seed=1)",
        "forget": 12,
        "retain": 36,
        "test": 24,
    }
    assert content["label"] == "OneShotPruning + SalUn"
    assert content["role"] == "method"
    assert content["scenario"] == "random 25 %"
    assert content["seed"] == 5
    assert content["sparsity"] == pytest.approx(0.25, abs=0.01)
    assert content["parameters"] == sum(parameter.numel() for parameter in host.parameters())
    assert content["hardware"]["cores"] >= 1
    assert set(content["versions"]) == {"python", "torch", "lightning", "lightning_trust"}
    assert content["created"].endswith("+00:00")
    assert content["seconds"]["passes"] > 0.0


def test_a_run_without_a_seed(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    _, record, _ = run(tmp_path, FineTune())
    assert record.seed is None
    assert record.sparsity is None


def test_folder_and_label(tmp_path):
    report = UnlearningReport(label="Mine", verbose=False)
    run(tmp_path, FineTune(), report=report, default_root_dir=tmp_path / "root")
    assert RunRecord.read(tmp_path / "root").label == "Mine"


def test_the_forgotten_class_is_not_tested(tmp_path):
    split = ForgetSplit(Data(), ForgetClass(2))
    host, record, _ = run(tmp_path, FineTune(), data=split)
    assert (record.scenario, record.forget["test"]) == ("class 2", 16)
    hits, _ = direct_of_class(host)
    assert record.metrics["TA"] == pytest.approx(hits)


@torch.no_grad()
def direct_of_class(host):
    batches = list(Data().test_dataloader())
    inputs, targets = (torch.cat(entries) for entries in zip(*batches, strict=True))
    kept = targets != 2
    return float((host(inputs).argmax(1) == targets)[kept].double().mean()) * 100, None


def test_before_is_the_loaded_model_even_behind_pruning(tmp_path):
    trained = Host()
    pl.Trainer(**{**QUIET, "max_epochs": 5}).fit(trained, datamodule=Data())
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    load = LoadWeights(str(tmp_path / "trained.pt"))
    report = UnlearningReport(folder=str(tmp_path), verbose=False)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 0, "callbacks": [OneShotPruning(0.9), load, FineTune(), report]})
    trainer.fit(Host(), datamodule=forget_random(Data()))
    hits, _ = direct(trained)
    before, after = report.record.before, report.record.metrics
    assert before["RA"] == pytest.approx(hits["retain"])
    assert before["UA"] == pytest.approx(100.0 - hits["forget"])
    assert after["RA"] < before["RA"]


# -- what it is called -------------------------------------------------------------------------------------------------
def test_retrain(tmp_path):
    _, record, _ = run(tmp_path)
    assert (record.role, record.label, record.before) == ("retrain", "Retrain", None)
    assert record.confidence["before"] is None
    _, record, _ = run(tmp_path, OneShotPruning(0.5))
    assert (record.role, record.label) == ("retrain", "Retrain + OneShotPruning")


@pytest.mark.parametrize(
    ("make", "label"),
    [
        (lambda _: [FineTune()], "FineTune"),
        (lambda _: [L1Sparse()], "L1Sparse"),
        (lambda _: [WeightSaliency(), RandomLabel()], "WeightSaliency + RandomLabel"),
        (lambda _: [WeightSaliency()], "WeightSaliency"),
        (lambda folder: [LoadWeights(str(folder / "trained.pt"))], "Training"),
    ],
)
def test_what_knows_the_forget_set_is_no_retrain(tmp_path, make, label):
    torch.save(Host().state_dict(), tmp_path / "trained.pt")
    _, record, _ = run(tmp_path, *make(tmp_path), max_epochs=1)
    assert (record.role, record.label) == ("method", label)
    assert record.before is not None


def test_training_on_everything_is_no_retrain(tmp_path):
    split = ForgetSplit(Data(), ForgetRandom(fraction=0.25), feed="mixed")
    _, record, _ = run(tmp_path, data=split, max_epochs=1)
    assert (record.role, record.label) == ("method", "Training")


# -- what it must not change -------------------------------------------------------------------------------------------
def test_training_is_the_same_with_it_and_without(tmp_path):
    states = []
    for callbacks in ([UnlearningReport(folder=str(tmp_path), verbose=False)], []):
        host = Host(dropout=0.3)
        torch.manual_seed(4)
        trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [RandomLabel(), *callbacks]})
        trainer.fit(host, datamodule=forget_random(Data()))
        states.append(dict(host.state_dict()))
    assert_equal(states[0], states[1], "weights")


class Augmenting(Data):
    """Augments as Lightning's documentation shows it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.steps = getattr(self, "steps", 0) + 1
            return batch[0] * 100.0, batch[1]
        return batch


def test_rows_are_measured_without_the_users_augmentation(tmp_path):
    data = Augmenting()
    host, record, trainer = run(tmp_path, SalUn(), data=forget_random(data), max_epochs=1)
    assert data.steps == trainer.global_step
    hits, _ = direct(host)
    assert record.metrics["RA"] == pytest.approx(hits["retain"])


class WithBatchNorm(Host):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.BatchNorm1d(16)


def test_running_statistics_and_modes_are_left_alone(tmp_path):
    host = WithBatchNorm()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    run(tmp_path, FineTune(), host=host, max_epochs=0)
    assert_equal(before, dict(host.state_dict()), "weights")
    assert host.net[2].training


# -- seconds -----------------------------------------------------------------------------------------------------------
class Slow(Host):
    """Sleeps in steps, and longer in evaluation."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.005)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.05)
        super().validation_step(batch, batch_idx)


def test_seconds_grow_with_steps_and_leave_evaluation_out(tmp_path):
    seconds = [run(tmp_path, FineTune(), host=Slow(), max_epochs=epochs)[1].seconds for epochs in (1, 4)]
    # 5 steps an epoch of 5 ms, and 3 batches of validation of 50 ms
    for found, epochs in zip(seconds, (1, 4), strict=True):
        assert found["steps"] >= epochs * 5 * 0.005
        assert found["steps"] <= found["fit"]
        assert found["fit"] < epochs * 3 * 0.05 + epochs * 5 * 0.005
        assert found["passes"] == 0.0
    assert seconds[1]["steps"] > 2 * seconds[0]["steps"]
    assert seconds[1]["fit"] > 2 * seconds[0]["fit"]


def test_passes_are_the_saliency_and_not_the_measurement(tmp_path):
    class SlowLoss(WeightSaliency):
        def saliency(self, trainer, host):
            return super().saliency(trainer, host)

    def slow(outputs, targets):
        time.sleep(0.02)
        return F.cross_entropy(outputs, targets)

    _, record, _ = run(tmp_path, SlowLoss(loss=slow), FineTune(), max_epochs=1)
    # 12 rows to forget: two batches
    assert 0.04 <= record.seconds["passes"] < 0.2


def test_a_resumed_run_goes_on_counting(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0)
    whole = run(tmp_path / "whole", RandomLabel(), ExactResume(), host=Slow())[1]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, RandomLabel(), ExactResume(), saver, Kill(4), host=Slow(), enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["UnlearningReport"]
    # the stretch that was under way when the checkpoint was written counts
    assert state["fit"] >= state["steps"] >= 3 * 0.005
    assert not (tmp_path / "run.json").exists()
    report = UnlearningReport(folder=str(tmp_path), verbose=False)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [report, RandomLabel(), ExactResume()]})
    trainer.fit(Slow(), datamodule=forget_random(Data()), ckpt_path=tmp_path / "last.ckpt")
    record = report.record
    assert (record.metrics, record.before, record.confidence) == (whole.metrics, whole.before, whole.confidence)
    assert record.seconds["steps"] >= 12 * 0.005
    assert record.seconds["fit"] >= record.seconds["steps"]


# -- where the figures go ----------------------------------------------------------------------------------------------
class Recorded(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((dict(metrics), step))


def test_loggers_get_the_figures(tmp_path):
    logger = Recorded()
    _, record, trainer = run(tmp_path, FineTune(), logger=logger)
    found = [entry for entry in logger.logged if "trust/UA" in entry[0]]
    assert found == [({f"trust/{name}": value for name, value in record.metrics.items()}, trainer.global_step)]


def test_under_test_they_are_logged(tmp_path):
    host, record, _ = run(tmp_path, FineTune())
    trainer = pl.Trainer(**{**QUIET, "callbacks": [UnlearningReport()]})
    logged = trainer.test(host, datamodule=forget_random(Data()), verbose=False)[0]
    assert {name: logged[f"trust/{name}"] for name in record.metrics} == pytest.approx(record.metrics, abs=1e-4)


def test_without_epochs(tmp_path):
    _, record, _ = run(tmp_path, OneShotPruning(0.5), FineTune(), max_epochs=0)
    assert record.seconds["steps"] == record.seconds["fit"] == 0.0
    assert record.metrics != record.before
    assert RunRecord.read(tmp_path) == record


def test_fast_dev_run_writes_nothing(tmp_path):
    run(tmp_path / "run", FineTune(), fast_dev_run=True, default_root_dir=tmp_path)
    assert list(tmp_path.rglob("run.json")) == []


def test_figures_are_printed(tmp_path, capsys):
    report = UnlearningReport(folder=str(tmp_path))
    _, record, _ = run(tmp_path, FineTune(), report=report)
    printed = capsys.readouterr().out
    assert "FineTune: forget random 25 %" in printed
    for metrics in (record.before, record.metrics):
        assert all(f"{value:.2f}" in printed for value in metrics.values())


def test_two_ranks_give_the_figures_of_one(tmp_path):
    report = UnlearningReport(folder=str(tmp_path / "two"), verbose=False)
    first, second = fit_on_two_ranks(
        tmp_path / "ranks",
        Host(),
        forget_random(Data(batch_size=4)),
        [report, FineTune()],
        lambda *_: (report.record.metrics, report.record.before, report.record.confidence, report.record.forget),
        max_epochs=2,
    )
    _, record, _ = run(tmp_path / "one", FineTune())
    one = (record.metrics, record.before, record.confidence, record.forget)
    for found in (first, second):
        assert found[0] == pytest.approx(one[0])
        assert found[1] == pytest.approx(one[1])
        assert found[2:] == one[2:]
    assert RunRecord.read(tmp_path / "two").metrics == first[0]


def test_measured_rows_at_other_sizes(tmp_path):
    """Fewer rows than ranks, and a number that does not divide."""
    report = UnlearningReport(folder=str(tmp_path / "two"), verbose=False)
    split = ForgetSplit(Data(batch_size=4), ForgetRandom(num=1))
    first, _ = fit_on_two_ranks(
        tmp_path / "ranks", Host(), split, [report, FineTune()], lambda *_: report.record.forget, max_epochs=1
    )
    assert (first["forget"], first["retain"], first["test"]) == (1, 47, 24)


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_full_disk_leaves_no_half_written_record(tmp_path, monkeypatch):
    run(tmp_path, FineTune())
    old = (tmp_path / "run.json").read_text()

    class FullDisk(Callback):
        def on_train_start(self, trainer, pl_module):
            def full(_):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, FineTune(), FullDisk())
    assert (tmp_path / "run.json").read_text() == old
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_needs_a_split(tmp_path):
    for call in ("fit", "test"):
        trainer = pl.Trainer(**{**QUIET, "callbacks": [UnlearningReport()]})
        with pytest.raises(
            MisconfigurationException, match=r"^UnlearningReport needs to know what is to be forgotten, but the run has"
        ):
            getattr(trainer, call)(Host(), datamodule=Data())


class NoLogits(Host):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1)))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()


class Broken(Host):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


def test_outputs_that_are_no_logits(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected the network to put out logits of shape \(N, K\), because UnlearningReport classifies with them,"
            r" but got torch\.float32 of shape \(8, 3, 1\)\. Name the part of the host that gives logits with `network`"
        ),
    ):
        run(tmp_path, FineTune(), host=NoLogits())


def test_a_model_that_has_diverged(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected the outputs of the network to be finite, because UnlearningReport measures them, but got NaN or"
            r" infinite values on forget rows\. Has the model diverged\?$"
        ),
    ):
        run(tmp_path, FineTune(), host=Broken())
    assert not (tmp_path / "run.json").exists()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^Expected argument `max_rows` to be at least 1, but got 0\.$"):
        UnlearningReport(max_rows=0)
    with pytest.raises(ValueError, match=r"^Expected argument `feature` to be 'confidence'.* but got 'loss'\.$"):
        UnlearningReport(feature="loss")
