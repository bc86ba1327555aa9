"""CIFAR-10-C from files that are laid out as the published ones, 5 severities of 6 images."""

import shlex
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_trust.cli import main
from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules import CIFAR10, CIFAR10C
from lightning_trust.modules import ImageClassifier

LABELS = np.array([3, 8, 8, 0, 6, 1])


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in (*CIFAR10C.names, *CIFAR10C.extra):
        np.save(folder / f"{name}.npy", random.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(LABELS, 5))
    return tmp_path


def images(root, name):
    return np.load(root / "CIFAR-10-C" / f"{name}.npy")


def rows(data):
    """All test rows."""
    data.setup()
    batches = list(data.test_dataloader())
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def test_corruptions_and_severities_one_after_the_other(root):
    inputs, targets = rows(CIFAR10C(str(root), ["fog", "saturate"], severities=[5, 2], batch_size=7))
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert targets.tolist() == LABELS.tolist() * 4
    fog, saturate = images(root, "fog"), images(root, "saturate")
    expected = np.concatenate([fog[24:], fog[6:12], saturate[24:], saturate[6:12]]).transpose(0, 3, 1, 2) / 255
    assert np.allclose(inputs.numpy(), expected, atol=1e-7)


def test_all_that_the_benchmark_has(root):
    data = CIFAR10C(str(root))
    inputs, targets = rows(data)
    assert len(inputs) == len(targets) == 15 * 5 * 6
    first, last = images(root, "gaussian_noise"), images(root, "jpeg_compression")
    assert np.allclose(inputs[0].numpy(), first[0].transpose(2, 0, 1) / 255)
    assert np.allclose(inputs[-1].numpy(), last[-1].transpose(2, 0, 1) / 255)
    assert not set(data.names) & set(data.extra)
    assert (data.class_names, data.num_classes) == (CIFAR10.class_names, 10)


def test_the_same_images_of_each(root):
    inputs, targets = rows(CIFAR10C(str(root), ["snow", "frost"], test_rows=2, seed=3))
    # those that CIFAR10 keeps
    kept = CIFAR10(seed=3)._permutation(6)[:2].sort().values
    assert targets.tolist() == LABELS[kept].tolist() * 10
    expected = np.concatenate(
        [images(root, name)[6 * level + kept.numpy()] for name in ("snow", "frost") for level in range(5)]
    )
    assert np.allclose(inputs.numpy(), expected.transpose(0, 3, 1, 2) / 255, atol=1e-7)


def test_normalised(root):
    raw, _ = rows(CIFAR10C(str(root), ["fog"]))
    data = CIFAR10C(str(root), ["fog"], normalise=True)
    inputs, _ = rows(data)
    assert data.input_space == InputSpace(0.0, 1.0, CIFAR10.mean, CIFAR10.std)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (CIFAR10.mean, CIFAR10.std))
    torch.testing.assert_close(inputs, (raw - mean) / std)


class _Brightness(nn.Module):
    """Calls an image by how much of it is bright."""

    def forward(self, x):
        return nn.functional.one_hot((x.mean(dim=(1, 2, 3)) * 1000).long() % 10, 10).float()


def test_accuracy_is_the_mean_over_corruptions_and_severities(root):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def accuracy(**choice):
        host = ImageClassifier(_Brightness(), 10)
        return trainer.test(host, CIFAR10C(str(root), batch_size=4, **choice), verbose=False)[0]["test/acc"]

    every = [accuracy(corruptions=[name], severities=[level]) for name in ("fog", "frost") for level in (1, 4)]
    assert accuracy(corruptions=["fog", "frost"], severities=[1, 4]) == pytest.approx(sum(every) / 4)
    assert len(set(every)) > 1


def test_missing_files_are_named(root):
    for name in ("fog", "labels"):
        (root / "CIFAR-10-C" / f"{name}.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"but labels.npy, fog.npy are missing.*zenodo"):
        CIFAR10C(str(root)).setup()


def save(root, name, content):
    np.save(root / "CIFAR-10-C" / f"{name}.npy", content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("fog", np.zeros((30, 3, 32, 32), np.uint8), r"fog.npy to have the shape \(N, 32, 32, 3\), got \(30, 3, 32"),
        ("fog", np.zeros((30, 32, 32, 3), np.float32), "fog.npy to hold bytes, but got float32"),
        ("fog", np.zeros((25, 32, 32, 3), np.uint8), "fog.npy to hold 30 images, one for each label, but got 25"),
        ("labels", np.zeros(32, np.int64), "labels.npy to hold labels for 5 severities, but got 32"),
        ("labels", np.arange(30), "labels.npy to hold labels in 0, ..., 9, but got 0 to 29"),
        ("labels", np.zeros((30, 1), np.int64), r"labels.npy to have the shape \(N, \), got \(30, 1\)"),
    ],
)
def test_files_of_another_kind_are_refused(root, name, content, words):
    save(root, name, content)
    with pytest.raises(ValueError, match=words):
        CIFAR10C(str(root), ["fog"]).setup()


def test_a_damaged_file_is_refused(root):
    path = root / "CIFAR-10-C" / "fog.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"fog.npy to be a whole .npy file, but"):
        CIFAR10C(str(root), ["fog"]).setup()
    path.write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"fog.npy to be a whole .npy file, but"):
        CIFAR10C(str(root), ["fog"]).setup()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"corruptions": ["forst"]}, "`corruptions` .* but got 'forst'. Close names: .*frost"),
        ({"corruptions": []}, "`corruptions` to hold something, and nothing twice"),
        ({"corruptions": ["fog", "fog"]}, "`corruptions` to hold something, and nothing twice"),
        ({"severities": [0, 1]}, r"`severities` to hold some of 1, ..., 5, but got \[0, 1\]"),
        ({"severities": []}, "`severities` to hold something"),
        ({"severities": [2, 2]}, "nothing twice"),
        ({"batch_size": 0}, "`batch_size` to be an integer of at least 1, got 0"),
        ({"test_rows": 0}, "`test_rows` to be an integer of at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` to be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        CIFAR10C(**arguments)


def test_too_many_rows(root):
    with pytest.raises(ValueError, match="`test_rows` to be at most 6, the images of each severity, but got 7"):
        CIFAR10C(str(root), test_rows=7).setup()


def test_the_command_on_the_page_of_autovp(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(root)
    page = (Path(__file__).parents[2] / "docs/prompting/autovp.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("lightning-trust test") and "CIFAR10C" in line]
    (tmp_path / "mine.yaml").write_text(
        "model: {class_path: ImageClassifier, init_args: {network: SmallCNN, num_classes: 10, in_channels: 3}}\n"
        "data: {class_path: CIFAR10, init_args: {root: data, val_rows: 100, augment: true}}\n"
        "trainer: {logger: false, accelerator: cpu, enable_progress_bar: false}\n"
    )
    host = ImageClassifier("SmallCNN", 10, in_channels=3)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(host)
    trainer.save_checkpoint("last.ckpt")
    content = torch.load("last.ckpt", weights_only=False)
    torch.save({name: value for name, value in content.items() if name != "hyper_parameters"}, "last.ckpt")
    cli = main(shlex.split(line)[1:])
    assert cli.datamodule.corruptions == ("fog", "snow")
    assert len(cli.datamodule.test_dataset) == 2 * 5 * 6
    inputs, targets = rows(cli.datamodule)
    found = (host.eval()(inputs).argmax(dim=1) == targets).float().mean()
    assert float(cli.trainer.callback_metrics["test/acc"]) == pytest.approx(float(found))
