import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules import CIFAR10


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data set of 5 x 4 training and 6 test rows, laid out as the published one, and torchvision told its sums."""
    folder = tmp_path / CIFAR10_SOURCE.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def save(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    def rows(count):
        return {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [7, 0, 3, 9, 1, 2][:count]}

    train = [list(save(f"data_batch_{number}", rows(4))) for number in range(1, 6)]
    test = [list(save("test_batch", rows(6)))]
    name, md5 = save("batches.meta", {"label_names": list(CIFAR10.class_names)})
    monkeypatch.setattr(CIFAR10_SOURCE, "train_list", train)
    monkeypatch.setattr(CIFAR10_SOURCE, "test_list", test)
    monkeypatch.setattr(CIFAR10_SOURCE, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


CIFAR10_SOURCE = torchvision.datasets.CIFAR10


def test_reads_what_is_in_the_files(root):
    data = CIFAR10(str(root), val_rows=0)
    images, labels = data.read("train")
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [7, 0, 3, 9] * 5
    # a row of the file: all of red, then green, then blue, each line by line
    raw = pickle.loads((root / "cifar-10-batches-py" / "data_batch_2").read_bytes())["data"][1]
    assert images[5].flatten().tolist() == raw.tolist()
    assert data.read("test")[1].tolist() == [7, 0, 3, 9, 1, 2]


def test_splits_and_batches(root):
    data = CIFAR10(str(root), batch_size=5, train_rows=12, val_rows=8, test_rows=4, augment=True, normalise=True)
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_dataset, data.val_dataset, data.test_dataset)] == [12, 8, 4]
    inputs, targets = next(iter(data.train_dataloader()))
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((5, 3, 32, 32), torch.float32, torch.int64)
    assert data.train_dataset.transform is CIFAR10.augmentation
    assert data.val_dataset.transform is None
    assert data.input_space == InputSpace(0.0, 1.0, CIFAR10.mean, CIFAR10.std)
    with pytest.raises(MisconfigurationException, match="share the 20 training rows of CIFAR10, but got train_rows=18"):
        CIFAR10(str(root), train_rows=18, val_rows=8).setup()


def test_names_of_the_classes_are_torchvisions(root):
    assert tuple(CIFAR10_SOURCE(str(root)).classes) == CIFAR10.class_names


def test_missing_and_damaged_files_are_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"in .*cifar-10-batches-py, but they are missing or damaged"):
        CIFAR10(str(tmp_path / "nowhere")).setup()
    with (root / "cifar-10-batches-py" / "data_batch_3").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        CIFAR10(str(root)).setup()


def test_missing_files_are_downloaded_through_torchvision(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *args, **kwargs: calls.append((args, kwargs)))
    CIFAR10(str(tmp_path)).prepare_data()
    assert calls == [((str(tmp_path),), {"download": True})]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="`batch_size` to be an integer of at least 1, but got 0"):
        CIFAR10(batch_size=0)
