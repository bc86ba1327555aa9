import gzip
import shutil

import pytest
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules import FashionMNIST, fashion_mnist

IMAGES, LABELS = torch.arange(4 * 6, dtype=torch.uint8).view(4, 2, 3), torch.tensor([3, 1, 2, 0], dtype=torch.uint8)


def write_idx(path, tensor):
    content = bytes([0, 0, 8, tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    content += tensor.numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_small(folder, suffix=""):
    """Four training and two test rows."""
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", IMAGES)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", LABELS)
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", IMAGES[:2])
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", LABELS[:2])


@pytest.fixture(scope="module")
def whole():
    data = FashionMNIST()
    data.prepare_data()
    return data


def test_the_data_set_is_the_published_one(whole):
    """Sizes, balance and moments that the paper and torchvision's users know."""
    images, labels = whole.read("train")
    assert images.shape == (60000, 1, 28, 28)
    assert labels.bincount().tolist() == [6000] * 10
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    test_images, test_labels = whole.read("test")
    assert test_images.shape == (10000, 1, 28, 28)
    assert test_labels.bincount().tolist() == [1000] * 10
    raw = images.float() / 255
    assert FashionMNIST.mean == (pytest.approx(raw.mean().item(), abs=5e-5),)
    assert FashionMNIST.std == (pytest.approx(raw.std().item(), abs=5e-5),)


def test_splits_are_disjoint_parts_of_the_training_rows(whole):
    data = FashionMNIST(train_rows=100, val_rows=50, test_rows=20)
    data.setup()
    order = torch.randperm(60000, generator=torch.Generator().manual_seed(0))
    images, labels = whole.read("train")
    val, train = order[:50].sort().values, order[50:150].sort().values
    assert torch.equal(data.val_dataset.images, images[val])
    assert torch.equal(data.val_dataset.targets, labels[val])
    assert torch.equal(data.train_dataset.images, images[train])
    assert torch.equal(data.train_dataset.targets, labels[train])
    assert len(data.test_dataset) == 20


def test_all_rows_by_default(whole):
    whole.setup()
    assert (len(whole.train_dataset), len(whole.val_dataset), len(whole.test_dataset)) == (55000, 5000, 10000)
    assert torch.equal(whole.test_dataset.targets, whole.read("test")[1])


def test_fewer_training_rows_are_a_part_of_more_and_leave_validation_alone():
    few, many = FashionMNIST(train_rows=50, val_rows=30), FashionMNIST(train_rows=100, val_rows=30)
    few.setup()
    many.setup()
    rows = [{image.numpy().tobytes() for image in data.train_dataset.images} for data in (few, many)]
    assert rows[0] < rows[1]
    assert torch.equal(few.val_dataset.images, many.val_dataset.images)


def test_seed_chooses_the_rows():
    datas = [FashionMNIST(train_rows=50, val_rows=30, seed=seed) for seed in (0, 0, 1)]
    for data in datas:
        data.setup()
    first, same, other = (data.train_dataset.images for data in datas)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_setup_twice_keeps_the_data_sets():
    data = FashionMNIST(train_rows=50, val_rows=30)
    data.setup("fit")
    dataset = data.train_dataset
    data.setup("test")
    assert data.train_dataset is dataset


def test_batches():
    data = FashionMNIST(train_rows=50, val_rows=30, test_rows=40, batch_size=20)
    data.setup()
    for loader, sizes in (
        (data.train_dataloader(), [20, 20, 10]),
        (data.val_dataloader(), [20, 10]),
        (data.test_dataloader(), [20, 20]),
        (data.predict_dataloader(), [20, 20]),
    ):
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == sizes
        inputs, targets = batches[0]
        assert inputs.shape == (20, 1, 28, 28)
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        data.input_space.check(inputs)
        assert inputs.max() > 0.5
    train = torch.cat([targets for _, targets in data.train_dataloader()])
    assert not torch.equal(train, data.train_dataset.targets)
    assert torch.equal(train.sort().values, data.train_dataset.targets.sort().values)


def test_worker_processes_give_the_same_rows():
    data = FashionMNIST(train_rows=50, val_rows=30, batch_size=20, num_workers=1)
    data.setup()
    inputs = torch.cat([inputs for inputs, _ in data.val_dataloader()])
    assert torch.equal(inputs, data.val_dataset.images / 255)


def test_no_validation_rows_no_loader():
    data = FashionMNIST(train_rows=50, val_rows=0)
    data.setup()
    assert data.val_dataloader() == []


def test_normalised_data_say_so_in_their_input_space():
    plain, normalised = (FashionMNIST(train_rows=50, val_rows=30, normalise=choice) for choice in (False, True))
    plain.setup()
    normalised.setup()
    assert plain.input_space == InputSpace(0.0, 1.0)
    assert normalised.input_space == InputSpace(0.0, 1.0, (0.2860,), (0.3530,))
    inputs = normalised.val_dataset[3][0].unsqueeze(0)
    torch.testing.assert_close(inputs, (plain.val_dataset[3][0].unsqueeze(0) - 0.2860) / 0.3530)
    torch.testing.assert_close(normalised.input_space.to_raw(inputs)[0], plain.val_dataset[3][0])


def test_augmentation_is_for_training_rows_only():
    data = FashionMNIST(train_rows=50, val_rows=30, augment=True)
    data.setup()
    drawn = torch.stack([data.train_dataset[0][0] for _ in range(8)])
    assert len(drawn.unique(dim=0)) > 1
    assert data.val_dataset.transform is None
    assert data.test_dataset.transform is None
    data.train_dataset.transform = None
    assert torch.equal(data.train_dataset[0][0], data.train_dataset.images[0] / 255)


def test_class_names():
    data = FashionMNIST()
    assert data.num_classes == len(data.class_names) == 10
    assert data.class_names == tuple(torchvision.datasets.FashionMNIST.classes)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw"])
def test_files_in_root_come_first(suffix, inside, tmp_path):
    write_small(tmp_path / inside, suffix)
    data = FashionMNIST(root=str(tmp_path), val_rows=1)
    data.prepare_data()
    images, labels = data.read("train")
    assert torch.equal(images, IMAGES.unsqueeze(1))
    assert torch.equal(labels, LABELS.long())
    assert len(data.read("test")[1]) == 2


def test_files_are_read_once_a_process(tmp_path):
    write_small(tmp_path)
    first = FashionMNIST(root=str(tmp_path)).read("train")
    assert FashionMNIST(root=str(tmp_path)).read("train")[0] is first[0]


def test_torchvision_downloads_where_the_files_are_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    calls = []

    def download(root, download):
        calls.append((root, download))
        write_small(tmp_path / "root" / "FashionMNIST" / "raw", ".gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    data = FashionMNIST(root=str(tmp_path / "root"), val_rows=1)
    with pytest.raises(FileNotFoundError, match=r"they are in neither. `prepare_data\(\)` downloads them"):
        data.setup()
    data.prepare_data()
    data.prepare_data()
    assert calls == [(str(tmp_path / "root"), True)]
    data.setup()
    assert len(data.train_dataset) == 3


def test_debian_package_comes_before_the_download(tmp_path, monkeypatch):
    write_small(tmp_path / "debian", ".gz")
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", None)  # calling it would fail
    data = FashionMNIST(root=str(tmp_path / "root"), val_rows=1)
    data.prepare_data()
    assert len(data.read("train")[1]) == 4


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("keep", [0, 3, 12, -2])
def test_damaged_file(suffix, keep, tmp_path):
    write_small(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"Expected {path} to be a whole idx file, but it is damaged"):
        FashionMNIST(root=str(tmp_path)).read("train")


def test_files_that_do_not_belong_together(tmp_path):
    write_small(tmp_path)
    shutil.copy(tmp_path / "t10k-labels-idx1-ubyte", tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(ValueError, match=r"as many images as labels, but got shapes \(4, 2, 3\) and \(2,\)"):
        FashionMNIST(root=str(tmp_path)).read("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "Expected argument `batch_size` to be an integer of at least 1, but got 0."),
        ({"num_workers": -1}, "Expected argument `num_workers` to be an integer of at least 0, but got -1."),
        ({"train_rows": 0}, "Expected argument `train_rows` to be an integer of at least 1, but got 0."),
        ({"val_rows": -5}, "Expected argument `val_rows` to be an integer of at least 0, but got -5."),
        ({"test_rows": 0.5}, "Expected argument `test_rows` to be an integer of at least 1, but got 0.5."),
        ({"seed": True}, "Expected argument `seed` to be an integer of at least 0, but got True."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FashionMNIST(**arguments)


@pytest.mark.parametrize("arguments", [{"train_rows": 59000, "val_rows": 5000}, {"val_rows": 60000}])
def test_more_rows_than_there_are(arguments):
    with pytest.raises(MisconfigurationException, match="to share the 60000 training rows of FashionMNIST, but got"):
        FashionMNIST(**arguments).setup()


def test_more_test_rows_than_there_are():
    with pytest.raises(ValueError, match="Expected argument `test_rows` to be at most 10000, .* but got 10001."):
        FashionMNIST(test_rows=10001).setup()
