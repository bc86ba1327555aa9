"""TransferClassifier: what is loaded, what is trained, what is left alone."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.datamodules import extract_features
from lightning_trust.modules import ImageClassifier, TransferClassifier
from lightning_trust.nn import SmallCNN
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks

SMALL = {"widths": [4, 6]}


def data(rows=60, batch_size=20):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(rows) % 3
    inputs = torch.rand(rows, 1, 8, 8, generator=generator)
    inputs[targets == 1, :, :4] += 1.0
    inputs[targets == 2, :, :, :4] += 1.0
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)


@pytest.fixture
def source(tmp_path):
    """A classifier of seven classes, and its checkpoint."""
    torch.manual_seed(1)
    host = ImageClassifier("SmallCNN", num_classes=7, network_args=SMALL)
    trainer = pl.Trainer(**QUIET, max_epochs=1)
    trainer.fit(host, data())
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    return host, str(tmp_path / "source.ckpt")


def made(source, **kwargs):
    arguments = {"source_classes": 7, "checkpoint": source[1], "num_classes": 3, "network_args": SMALL, **kwargs}
    return TransferClassifier("SmallCNN", **arguments)


def fitted(host, epochs=2, **kwargs):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": epochs, **kwargs})
    trainer.fit(host, data())
    return trainer


def backbone(host):
    return {name: value for name, value in host.network.state_dict().items() if not name.startswith("classifier.")}


def test_a_probe_trains_the_last_layer_alone(source):
    host = made(source)
    start = copy.deepcopy(host.last_layer)
    fitted(host)
    # BatchNorm's statistics included
    assert_equal_states(backbone(host), backbone(source[0]))
    assert not torch.equal(host.last_layer.weight, start.weight)
    assert host.last_layer.out_features == 3
    assert not host.network.training


def test_full_finetuning_starts_there_and_trains_all(source):
    host = made(source, mode="ff", optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    fitted(host)
    weights = dict(source[0].network.named_parameters())
    for name, parameter in host.network.named_parameters():
        assert parameter.requires_grad
        assert name.startswith("classifier.") or torch.equal(parameter, weights[name])
    host = made(source, mode="ff", optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    fitted(host)
    assert all(not torch.equal(value, weights[name]) for name, value in host.network.named_parameters() if "0." in name)
    assert int(host.network.features[1].num_batches_tracked) > int(source[0].network.features[1].num_batches_tracked)


def test_a_probe_is_logistic_regression_on_features(source):
    """Trained to the end, it is the multinomial logistic regression that scikit-learn finds."""
    host = made(source, optimizer=lambda params: torch.optim.LBFGS(params, max_iter=500, tolerance_grad=1e-7))
    loader = data(batch_size=60)
    pl.Trainer(**QUIET, max_epochs=3).fit(host, loader)
    features, (_, targets) = extract_features(host.network, loader), next(iter(loader))
    expected = LogisticRegression(C=1e6, max_iter=5000, tol=1e-8).fit(features.double().numpy(), targets.numpy())
    probabilities = torch.from_numpy(expected.predict_proba(features.double().numpy())).float()
    found = host.last_layer(features).softmax(dim=1)
    assert (found.argmax(1) == probabilities.argmax(1)).float().mean() > 0.95


def test_a_network_that_is_built_already_gets_a_new_last_layer():
    network = SmallCNN(1, 7, widths=(4, 6))
    before = copy.deepcopy(network.state_dict())
    host = TransferClassifier(network, num_classes=3)
    assert (host.source_classes, host.network.classifier.out_features) == (7, 3)
    fitted(host)
    assert_equal_states(backbone(host), {key: value for key, value in before.items() if "classifier" not in key})


@pytest.mark.parametrize("mode", ["lp", "ff"])
def test_a_checkpoint_of_it_needs_no_file_to_start_from(tmp_path, source, mode):
    host = made(source, mode=mode)
    fitted(host).save_checkpoint(tmp_path / "target.ckpt")
    (tmp_path / "source.ckpt").unlink()
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "target.ckpt")
    assert (loaded.mode, loaded.source_classes, loaded.num_classes) == (mode, 7, 3)
    assert_equal_states(loaded.state_dict(), host.state_dict())
    pl.Trainer(**QUIET).test(loaded, data(), verbose=False)
    assert_equal_states(loaded.network.state_dict(), host.network.state_dict())


def test_a_second_fit_goes_on_and_a_resumed_one_too(tmp_path, source):
    host = made(source, mode="ff")
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0)
    fitted(host, epochs=1, callbacks=[saver], enable_checkpointing=True)
    state = copy.deepcopy(host.state_dict())
    host.setup("fit")
    assert_equal_states(host.state_dict(), state)
    resumed = made(source, mode="ff")

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert_equal_states(pl_module.state_dict(), state)

    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[Start()])
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 6


def test_two_ranks(tmp_path, source):
    first, second = fit_on_two_ranks(tmp_path / "ranks", made(source), data(), [], max_epochs=1)
    assert_equal_states(first, second)


def test_bad_arguments(source):
    with pytest.raises(ValueError, match=r"`mode` to be one of \['lp', 'ff'\], but got 'all'"):
        TransferClassifier(mode="all")
    with pytest.raises(
        ValueError, match="linear layer within SmallCNN, but got 'clasifier'. Close names: 'classifier'"
    ):
        TransferClassifier(head="clasifier")
    with pytest.raises(ValueError, match="linear layer within Sequential, but got None. Close names: none"):
        TransferClassifier(nn.Sequential(nn.Flatten()))
    with pytest.raises(ValueError, match=r"classifier.weight \(\(7, 6\) instead of \(9, 6\)\)"):
        fitted(made(source, source_classes=9))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fitted(made((None, "nowhere.ckpt")))
