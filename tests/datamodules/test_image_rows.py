import copy
import pickle

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate

from lightning_trust.datamodules import ImageRows, RandomShiftFlip


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 2, 5, 4), dtype=torch.uint8)


@pytest.fixture
def targets():
    return torch.arange(12) % 3


def test_a_row_is_a_float_image_and_an_int(images, targets):
    rows = ImageRows(images, targets.to(torch.int32))
    image, label = rows[4]
    assert type(label) is int
    assert label == 1
    assert image.dtype == torch.float32
    assert torch.equal(image, images[4] / 255)
    assert rows.targets.dtype == torch.int64
    assert torch.equal(rows[-1][0], images[11] / 255)
    assert len(rows) == 12


def test_mean_and_std_by_the_formula(images, targets):
    rows = ImageRows(images, targets, largest=200, mean=(0.1, 0.2), std=(0.5, 2.0))
    expected = torch.stack([(images[3, 0] / 200 - 0.1) / 0.5, (images[3, 1] / 200 - 0.2) / 2.0])
    torch.testing.assert_close(rows[3][0], expected)


def test_a_batch_is_what_row_by_row_collation_gives(images, targets):
    rows = ImageRows(images, targets, mean=(0.1, 0.2), std=(0.5, 2.0))
    for batch, start in zip(DataLoader(rows, batch_size=5), range(0, 12, 5), strict=True):
        expected = default_collate([rows[i] for i in range(start, min(start + 5, 12))])
        assert type(batch) is list
        assert [value.dtype for value in batch] == [torch.float32, torch.int64]
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])


@pytest.mark.parametrize(
    "wrap", [lambda rows: Subset(rows, [7, 2, 9]), lambda rows: Subset(ConcatDataset([rows]), [7, 2, 9])]
)
def test_batches_through_torch_wrappers(wrap, images, targets):
    (inputs, labels) = next(iter(DataLoader(wrap(ImageRows(images, targets)), batch_size=3)))
    assert torch.equal(inputs, images[[7, 2, 9]] / 255)
    assert torch.equal(labels, targets[[7, 2, 9]])


def test_transform_sees_each_raw_image_and_can_be_replaced_on_a_copy(images, targets):
    seen = []

    def transform(image):
        seen.append(image.clone())
        return 1 - image

    rows = ImageRows(images, targets, transform, mean=(0.1, 0.2), std=(0.5, 2.0))
    plain = copy.copy(rows)
    plain.transform = None
    inputs, _ = next(iter(DataLoader(rows, batch_size=12)))
    assert torch.equal(torch.stack(seen), images / 255)
    mean, std = torch.tensor([0.1, 0.2]).view(2, 1, 1), torch.tensor([0.5, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(inputs, (1 - images / 255 - mean) / std)
    torch.testing.assert_close(plain[0][0], (images[0] / 255 - mean) / std)
    assert len(seen) == 12


def test_rows_survive_pickle(images, targets):
    rows = pickle.loads(pickle.dumps(ImageRows(images, targets, RandomShiftFlip())))
    assert torch.equal(rows.images, images)


@pytest.mark.parametrize("index", [12, -13])
def test_index_out_of_range(index, images, targets):
    with pytest.raises(IndexError, match=rf"Expected an index in \[-12, 12\), but got {index}."):
        ImageRows(images, targets)[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(12, 1, 2, 2)}, r"Expected argument `images` to be bytes .* got torch.float32 of shape"),
        ({"images": torch.zeros(12, 2, 2, dtype=torch.uint8)}, r"Expected argument `images` .* shape \(12, 2, 2\)"),
        ({"targets": torch.zeros(11)}, r"Expected argument `targets` to have shape \(12,\) .* but got \(11,\)"),
        ({"largest": 0}, r"Expected argument `largest` to be an integer in \[1, 255\], but got 0."),
        ({"mean": (0.1, 0.2)}, "Expected arguments `mean` and `std` to be given together"),
    ],
)
def test_bad_arguments(change, message, images, targets):
    with pytest.raises(ValueError, match=message):
        ImageRows(**{"images": images, "targets": targets, **change})


def test_random_shift_flip_gives_every_shift_and_mirror_image_equally_often():
    image = torch.arange(1.0, 13.0).view(1, 3, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    twins = [padded[:, t : t + 3, s : s + 4] for t in range(3) for s in range(3)]
    twins += [twin.flip(-1) for twin in twins]
    augment = RandomShiftFlip(padding=1)
    counts = [0] * len(twins)
    for _ in range(3600):
        augmented = augment(image)
        (index,) = [i for i, twin in enumerate(twins) if torch.equal(twin, augmented)]
        counts[index] += 1
    # 200 expected each; chi-square with 17 degrees of freedom is above 40.8 once in a thousand seeds
    assert sum((count - 200) ** 2 / 200 for count in counts) < 40.8


def test_random_shift_flip_without_flip_or_shift_changes_nothing():
    image = torch.rand(1, 3, 4)
    assert all(torch.equal(RandomShiftFlip(padding=0, flip=False)(image), image) for _ in range(10))
    assert any(torch.equal(RandomShiftFlip(padding=0)(image), image.flip(-1)) for _ in range(20))


def test_random_shift_flip_follows_the_global_generator():
    image, augment = torch.rand(1, 28, 28), RandomShiftFlip()
    state = torch.get_rng_state()
    first = [augment(image) for _ in range(5)]
    torch.set_rng_state(state)
    assert all(torch.equal(before, augment(image)) for before in first)


def test_random_shift_flip_bad_argument():
    with pytest.raises(ValueError, match="Expected argument `padding` to be zero or a positive integer, but got -1."):
        RandomShiftFlip(padding=-1)
