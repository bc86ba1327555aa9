import pytest
import torch

from lightning_trust.core.randomness import keyed_bits
from lightning_trust.functional.unlearning import random_labels


def chi_square(labels, num_classes):
    counts = torch.bincount(labels, minlength=num_classes).double()
    expected = len(labels) / num_classes
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniform_over_all_classes_whatever_the_true_label():
    targets = torch.arange(20_000) % 10
    labels = random_labels(targets, keyed_bits(3, torch.arange(20_000)), 10)
    # 27.9 is the 99.9 % point of chi-square with 9 degrees of freedom
    assert chi_square(labels, 10) < 27.9
    for label in range(10):
        assert chi_square(labels[targets == label], 10) < 27.9
    # so the true label is drawn once in K times
    assert float((labels == targets).double().mean()) == pytest.approx(0.1, abs=0.01)


def test_without_the_true_label_uniform_over_the_others():
    targets = torch.arange(20_000) % 10
    labels = random_labels(targets, keyed_bits(3, torch.arange(20_000)), 10, exclude_true_label=True)
    assert not (labels == targets).any()
    # 26.1 is the 99.9 % point with 8 degrees of freedom
    assert chi_square((labels - targets - 1) % 10, 9) < 26.1


def test_two_classes_without_the_true_one_are_the_other():
    targets = torch.tensor([0, 1, 1, 0])
    labels = random_labels(targets, keyed_bits(0, torch.arange(4)), 2, exclude_true_label=True)
    assert labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_type_and_shape_are_those_of_the_targets(dtype):
    targets = torch.tensor([0, 9, 200 % 10], dtype=dtype)
    for exclude in (False, True):
        labels = random_labels(targets, keyed_bits(1, torch.arange(3)), 10, exclude)
        assert labels.dtype == dtype
        assert labels.shape == targets.shape
        assert bool(((labels >= 0) & (labels < 10)).all())


def test_a_small_type_does_not_overflow_on_the_way():
    targets = torch.full((1000,), 250, dtype=torch.uint8)
    labels = random_labels(targets, keyed_bits(1, torch.arange(1000)), 251, exclude_true_label=True)
    assert not (labels == 250).any()
    assert int(labels.max()) > 200


def test_one_class():
    with pytest.raises(ValueError, match=r"^Expected argument `num_classes` to be at least 2, but got 1\.$"):
        random_labels(torch.tensor([0]), torch.tensor([1]), 1)


@pytest.mark.parametrize("targets", [torch.tensor([0.0, 1.0]), torch.tensor([True, False])])
def test_targets_that_are_no_integers(targets):
    with pytest.raises(
        ValueError, match=rf"^Expected argument `targets` to be integer class labels, but got {targets.dtype}\.$"
    ):
        random_labels(targets, torch.tensor([1, 2]), 3)


def test_targets_of_another_shape_than_one_label_a_row():
    message = (
        r"^Expected argument `targets` to hold one label a row, of the shape \(2,\) of `draws`, but got \(2, 3\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        random_labels(torch.zeros(2, 3, dtype=torch.long), torch.tensor([1, 2]), 3)
