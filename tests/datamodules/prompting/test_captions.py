"""Captions of Fashion-MNIST say what the labels and the rotations are."""

from __future__ import annotations

import pytest
import torch

from lightning_trust.datamodules import CaptionedRows, FashionMNIST, FashionMNISTCaptions, ImageRows
from lightning_trust.datamodules.prompting.captions import CAPTION_FORMS, GARMENT_NAMES, ROTATION_NAMES
from lightning_trust.nn import clean_class_name


def made(**arguments):
    data = FashionMNISTCaptions(**{"train_rows": 300, "val_rows": 40, "test_rows": 30, "batch_size": 16, **arguments})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def data():
    return made()


def test_every_garment_has_its_class_name_first():
    assert tuple(names[0] for names in GARMENT_NAMES) == tuple(map(clean_class_name, FashionMNIST.class_names))
    every = [name for names in GARMENT_NAMES for name in names]
    assert len(set(every)) == len(every)


def test_captions_name_the_garment_in_one_of_the_forms(data):
    for part in (data.train_dataset, data.val_dataset, data.test_dataset):
        for target, caption in zip(part.targets.tolist(), part.captions, strict=True):
            assert caption in {form.replace("{}", name) for form in CAPTION_FORMS for name in GARMENT_NAMES[target]}
    rows = data.train_dataset
    bags = {rows.captions[row] for row in rows.targets.eq(8).nonzero().flatten()}
    assert len(bags) > 10


def test_batches_are_those_of_fashion_mnist_with_captions(data):
    plain = FashionMNIST(train_rows=300, val_rows=40, test_rows=30, batch_size=16)
    plain.prepare_data()
    plain.setup()
    for mine, theirs in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert len(mine[2]) == len(mine[0])
    images, targets, captions = next(iter(data.train_dataloader()))
    assert images.shape == (16, 1, 28, 28)
    assert targets.dtype == torch.int64
    assert all(isinstance(caption, str) for caption in captions)
    index = data.train_dataset.captions.index(captions[0])
    assert data.train_dataset[index][2] == captions[0]


def test_captions_are_drawn_by_the_seed(data):
    assert made().train_dataset.captions == data.train_dataset.captions
    other = made(seed=1)
    assert other.train_dataset.captions != data.train_dataset.captions
    before = list(data.train_dataset.captions)
    data.setup()
    assert data.train_dataset.captions == before


def test_turned_garments_say_so():
    data = made(rotations=[0, 180], train_rows=400, forms=["{}!"])
    assert data.num_classes == 20
    assert data.class_names[8] == "bag"
    assert data.class_names[18] == "bag upside down"
    raw, _ = FashionMNIST().read("test")
    seen = 0
    for index, (target, caption) in enumerate(zip(data.test_dataset.targets, data.test_dataset.captions, strict=True)):
        turned = target >= 10
        assert caption in {
            f"{ROTATION_NAMES[180 if turned else 0].replace('{}', name)}!" for name in GARMENT_NAMES[target % 10]
        }
        # the image itself, turned back, is one of the raw ones
        image = data.test_dataset.images[index]
        upright = torch.rot90(image, 2, dims=(1, 2)) if turned else image
        assert (raw == upright).flatten(1).all(dim=1).any()
        seen += int(turned)
    assert 0 < seen < 30


def test_measuring_code_can_take_the_augmentation_away():
    data = made(augment=True)
    assert data.train_dataset.transform is not None
    data.train_dataset.transform = None
    assert torch.equal(data.train_dataset[3][0], data.train_dataset.images[3].float() / 255)


@pytest.mark.parametrize("forms", [["a photo"], ["{} and {}"], []])
def test_forms_without_one_slot_are_refused(forms):
    with pytest.raises(ValueError, match=r"`forms` to hold texts with one slot"):
        FashionMNISTCaptions(forms=forms)


def test_a_caption_for_every_row():
    rows = ImageRows(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2))
    with pytest.raises(ValueError, match="each of the 2 rows, but got 1"):
        CaptionedRows(rows, ["one"])
