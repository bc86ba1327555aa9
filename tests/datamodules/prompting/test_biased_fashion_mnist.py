"""Tints, groups and splits of BiasedFashionMNIST."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.datamodules import BiasedFashionMNIST, FashionMNIST


def made(**changes):
    data = BiasedFashionMNIST(**{"train_rows": 300, "base_rows": 400, "val_rows": 100, "test_rows": 200, **changes})
    data.prepare_data()
    data.setup()
    return data


def test_classes_and_tints_are_what_they_are_called():
    data = made(tint=0.5, test_rows=None)
    plain = FashionMNIST()
    images, labels = plain.read("test")
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).sort().values
    rows = data.test_dataset
    names = [plain.class_names[label] for label in labels[order].tolist()]
    upper = {"T-shirt/top", "Pullover", "Coat", "Shirt"}
    assert rows.targets.tolist() == [int(name in upper) for name in names]
    grey = images[order].float() / 255
    image, _, group = rows[17]
    assert data.group_names[group] in ("red", "green")
    colour = torch.tensor([1.0, 0.0, 0.0] if data.group_names[group] == "red" else [0.0, 1.0, 0.0]).view(3, 1, 1)
    torch.testing.assert_close(image, grey[17] + (1 - grey[17]) * 0.5 * colour, atol=0.501 / 255, rtol=0.0)


def test_groups_agree_with_classes_as_often_as_asked():
    data = made(p_train=0.9)
    for rows, share in ((data.train_dataset, 0.9), (data.val_dataset, 0.5), (data.test_dataset, 0.5)):
        for target in range(2):
            agrees = rows.groups[rows.targets == target] == target
            assert agrees.float().mean().item() == pytest.approx(share, abs=0.51 / len(agrees))
    # every group of every class is there, however few rows there are
    few = made(val_rows=10).val_dataset
    assert {(y, z) for y, z in zip(few.targets.tolist(), few.groups.tolist(), strict=True)} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }


def test_parts_share_no_row():
    # without a tint an image is itself
    parts = [made(part=part, tint=0.0, train_rows=rows) for part, rows in (("base", 400), ("tuning", 400))]
    seen = [{image.numpy().tobytes() for image in part.train_dataset.images} for part in parts]
    assert not seen[0] & seen[1]
    assert min(map(len, seen)) > 390
    for part in parts[1:]:
        assert torch.equal(part.test_dataset.groups, parts[0].test_dataset.groups)
        assert torch.equal(part.val_dataset.images, parts[0].val_dataset.images)
    assert not seen[1] & {image.numpy().tobytes() for image in parts[1].val_dataset.images}


def test_batches():
    data = made(batch_size=50)
    inputs, targets, groups = next(iter(data.train_dataloader()))
    assert inputs.shape == (50, 3, 28, 28)
    assert inputs.dtype == torch.float32
    assert 0.0 <= inputs.min() < inputs.max() <= 1.0
    assert targets.dtype == groups.dtype == torch.int64
    again = made(batch_size=50)
    assert torch.equal(again.train_dataset.groups, data.train_dataset.groups)
    assert not torch.equal(made(seed=1).train_dataset.images, data.train_dataset.images)


def test_bad_input():
    for arguments, message in (
        ({"part": "test"}, "`part` to be 'base' or 'tuning', but got 'test'"),
        ({"p_train": 1.5}, r"`p_train` to be in \[0, 1\], but got 1.5"),
        ({"tint": -0.1}, r"`tint` to be in \[0, 1\], but got -0.1"),
        ({"base_rows": 0}, "`base_rows` to be a positive integer, but got 0"),
        ({"test_rows": 10001}, "`test_rows` to be at most 10000"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**arguments)
    for arguments in ({"train_rows": 401}, {"part": "tuning", "base_rows": 59900}, {"base_rows": 60000}):
        with pytest.raises(MisconfigurationException, match="to leave rows for part="):
            made(**{"train_rows": None, **arguments})
