import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits

from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules import Digits


def test_rows_are_those_of_scikit_learn():
    digits = load_digits()
    data = Digits(val_rows=0)
    data.setup()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    inputs, targets = next(iter(data.test_dataloader()))
    assert torch.equal(inputs, images[-360:-296])
    assert targets.tolist() == digits.target[-360:-296].tolist()
    assert torch.equal(data.train_dataset[5][0], images[5])
    assert data.train_dataset.targets.tolist() == digits.target[:-360].tolist()


def test_splits():
    data = Digits(train_rows=300, test_rows=100)
    data.setup()
    assert [len(d) for d in (data.train_dataset, data.val_dataset, data.test_dataset)] == [300, 200, 100]
    rows = [{image.numpy().tobytes() for image in d.images} for d in (data.train_dataset, data.val_dataset)]
    assert not rows[0] & rows[1]
    assert data.num_classes == len(data.class_names) == 10


def test_mean_and_std_are_those_of_the_training_pixels():
    data = Digits(val_rows=0, normalise=True)
    data.setup()
    assert data.input_space == InputSpace(0.0, 1.0, Digits.mean, Digits.std)
    inputs = torch.stack([image for image, _ in data.train_dataset])
    assert inputs.mean().item() == pytest.approx(0.0, abs=2e-4)
    assert inputs.std().item() == pytest.approx(1.0, abs=2e-4)
    assert Digits().input_space == InputSpace(0.0, 1.0)


def test_augmentation_does_not_mirror_digits():
    data = Digits(augment=True)
    data.setup()
    padded = torch.nn.functional.pad(data.train_dataset.images[0] / 16, (1, 1, 1, 1))
    shifts = [padded[:, t : t + 8, s : s + 8] for t in range(3) for s in range(3)]
    for _ in range(30):
        image = data.train_dataset[0][0]
        assert any(torch.equal(image, shift) for shift in shifts)


def test_more_rows_than_there_are():
    with pytest.raises(MisconfigurationException, match="to share the 1437 training rows of Digits, but got"):
        Digits(train_rows=1400).setup()
    with pytest.raises(ValueError, match="Expected argument `test_rows` to be at most 360, .* but got 361."):
        Digits(test_rows=361).setup()


def test_bad_arguments():
    with pytest.raises(ValueError, match="Expected argument `batch_size` to be an integer of at least 1, but got 0."):
        Digits(batch_size=0)
