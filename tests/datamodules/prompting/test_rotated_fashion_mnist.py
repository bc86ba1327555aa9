import pytest
import torch

from lightning_trust.datamodules import Digits, FashionMNIST, RotatedFashionMNIST


def test_every_image_is_there_once_turned_by_its_angle():
    plain, turned = FashionMNIST(), RotatedFashionMNIST()
    images, targets = plain.read("test")
    found, classes = turned.read("test")
    assert torch.equal(classes % 10, targets)
    assert torch.equal(classes // 10, torch.arange(len(classes)) % 4)
    for place in range(4):
        assert torch.equal(found[place], torch.rot90(images[place], place, dims=(1, 2)))


def test_angles():
    assert RotatedFashionMNIST((90, -90)).class_names[10] == "T-shirt/top, 270 degrees"
    for angles in ((45,), (0, 360), ()):
        with pytest.raises(ValueError, match="different multiples of 90 degrees, but got"):
            RotatedFashionMNIST(angles)


def test_enlarged_digits():
    small, large = Digits(), Digits(image_size=16)
    small.setup()
    large.setup()
    (x, y), (z, w) = small.test_dataset[3], large.test_dataset[3]
    assert y == w
    assert z.shape == (1, 16, 16)
    expected = torch.nn.functional.interpolate(x[None], (16, 16), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(z, expected, rtol=0.0, atol=0.5 / 255)
    with pytest.raises(ValueError, match="`image_size` to be at least 8, but got 7"):
        Digits(image_size=7)
