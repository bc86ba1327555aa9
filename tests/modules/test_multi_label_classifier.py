"""MultiLabelClassifier: its step by hand, its measure against scikit-learn, checkpoints, bad input."""

from __future__ import annotations

import pickle

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.modules import ImageClassifier, MultiLabelClassifier
from tests.two_ranks import QUIET


def rows(count=24):
    generator = torch.Generator().manual_seed(count)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    return TensorDataset(x, (torch.rand(count, 3, generator=generator) < 0.4).long())


def tiny(**arguments):
    torch.manual_seed(0)
    return MultiLabelClassifier(**{"num_classes": 3, "network_args": {"widths": [4, 8]}, **arguments})


def test_one_step_is_that_of_plain_torch():
    classifier = tiny(schedule="constant")
    by_hand = pickle.loads(pickle.dumps(classifier.network))
    trainer = pl.Trainer(max_steps=1, **QUIET)
    trainer.fit(classifier, DataLoader(rows(), batch_size=24))
    x, y = rows().tensors
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    p = by_hand(x).sigmoid()
    loss = -torch.where(y == 1, p.log(), (1 - p).log()).mean()
    loss.backward()
    optimizer.step()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, expected in zip(classifier.network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def test_measure_is_that_of_the_whole_set():
    classifier = tiny()
    trainer = pl.Trainer(**QUIET)
    (found,) = trainer.test(classifier, DataLoader(rows(), batch_size=7), verbose=False)
    x, y = rows().tensors
    logits = classifier.eval()(x).detach()
    assert found["test/auroc"] == pytest.approx(roc_auc_score(y, logits), abs=1e-6)
    assert found["test/loss"] == pytest.approx(classifier.loss(logits, y).item(), rel=1e-5)
    assert "test/acc" not in found
    (probabilities,) = trainer.predict(classifier, DataLoader(rows(), batch_size=24))
    torch.testing.assert_close(probabilities, 1 / (1 + (-logits).exp()))


def test_checkpoint_loads_without_the_arguments(tmp_path):
    classifier = tiny(num_classes=1, schedule="constant")
    data = TensorDataset(*(tensor[:, :1] for tensor in rows().tensors))
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    trainer.fit(classifier, DataLoader(data, batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = MultiLabelClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (loaded.num_classes, loaded.schedule) == (1, "constant")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name])


def test_yaml_builds_what_it_says(tmp_path):
    arguments = {"network": "densenet121", "num_classes": 7, "schedule": "constant"}
    config = {"model": {"class_path": "MultiLabelClassifier", "init_args": arguments}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        pl.LightningModule, subclass_mode_model=True, run=False, args=[f"--config={tmp_path / 'config.yaml'}"]
    )
    assert isinstance(cli.model, MultiLabelClassifier)
    assert cli.model.network.classifier.out_features == 7
    assert cli.model.network.features.conv0.in_channels == 1


def test_bad_input():
    x, y = rows().tensors
    classifier = tiny()
    with pytest.raises(ValueError, match=r"multi-hot of shape \(24, 3\), like the logits, but got \(24,\)"):
        classifier.loss(classifier(x), y[:, 0])
    with pytest.raises(ValueError, match="`num_classes` to be an integer of at least 1, but got 0"):
        tiny(num_classes=0)
    with pytest.raises(ValueError, match="`num_classes` to be an integer of at least 2, but got 1"):
        ImageClassifier(num_classes=1)
