"""Some garments, of rows that another task does not see."""

from __future__ import annotations

import pytest
import torch

from lightning_trust.datamodules import FashionMNIST, FashionMNISTSubset


def rows_of(images):
    return {image.numpy().tobytes() for image in images}


def test_classes_are_the_garments_in_their_order():
    subset = FashionMNISTSubset(garments=[6, 0], val_rows=0)
    subset.setup()
    images, targets = FashionMNIST().read("train")
    for new, old in enumerate([6, 0]):
        mine = subset.train_dataset.images[subset.train_dataset.targets == new]
        assert torch.equal(mine, images[targets == old])
    assert subset.num_classes == 2
    assert len(subset.test_dataset) == 2000


@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_is_shared_with_the_other_task(seed):
    other = FashionMNIST(train_rows=18000, val_rows=2000, seed=seed)
    subset = FashionMNISTSubset(skip_rows=20000, val_rows=100, seed=seed)
    for data in (other, subset):
        data.setup()
    seen = rows_of(other.train_dataset.images) | rows_of(other.val_dataset.images)
    mine = rows_of(subset.train_dataset.images) | rows_of(subset.val_dataset.images)
    # Fashion-MNIST itself has a few images twice
    assert len(seen & mine) <= 5
    whole = FashionMNISTSubset(val_rows=0, seed=seed)
    whole.setup()
    assert len(rows_of(whole.train_dataset.images) & seen) > 9000


def test_bad_arguments():
    for garments in ([], [1, 1], [10], [-1]):
        with pytest.raises(ValueError, match=r"`garments` to hold different classes in \[0, 10\)"):
            FashionMNISTSubset(garments)
    with pytest.raises(ValueError, match=r"`skip_rows` to lie in \[0, 60000\), but got 60000"):
        FashionMNISTSubset(skip_rows=60000)
