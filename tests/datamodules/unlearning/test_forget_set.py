import pytest
import torch

from lightning_trust.datamodules import ForgetClass, ForgetIndices, ForgetRandom


def no_targets():
    raise AssertionError("targets were asked for")


def test_class():
    targets = torch.tensor([2, 0, 2, 1, 2])
    assert ForgetClass(2).rows(5, lambda: targets).tolist() == [0, 2, 4]
    assert str(ForgetClass(2)) == "class 2"


def test_absent_class_lists_the_present_ones():
    with pytest.raises(
        ValueError,
        match=r"^Expected argument `label` of ForgetClass to be a class of the training set \(0, 1, 5\), but got 7\.$",
    ):
        ForgetClass(7).rows(3, lambda: torch.tensor([5, 0, 1]))


@pytest.mark.parametrize(
    ("targets", "found"),
    [(torch.tensor([0.0, 1.5]), r"torch\.float32 of shape \(2,\)"), (torch.eye(2).long(), r"\(2, 2\)")],
)
def test_class_of_targets_that_are_no_labels(targets, found):
    with pytest.raises(
        ValueError, match=rf"^Expected the targets of the training set to be integer class labels.*{found}"
    ):
        ForgetClass(1).rows(2, lambda: targets)


def test_random_is_a_draw_of_its_own():
    first = ForgetRandom(fraction=0.1, seed=3).rows(200, no_targets)
    torch.manual_seed(5)
    assert torch.equal(ForgetRandom(fraction=0.1, seed=3).rows(200, no_targets), first)
    assert len(first) == len(set(first.tolist())) == 20
    assert first.tolist() == sorted(first.tolist())
    assert not torch.equal(ForgetRandom(fraction=0.1, seed=4).rows(200, no_targets), first)
    assert torch.equal(ForgetRandom(num=20, seed=3).rows(200, no_targets), first)
    assert str(ForgetRandom(fraction=0.1)) == "random 10 %"
    assert str(ForgetRandom(num=20)) == "random 20 rows"


def test_random_covers_all_rows_alike():
    drawn = torch.zeros(50)
    for seed in range(2000):
        drawn[ForgetRandom(num=5, seed=seed).rows(50, no_targets)] += 1
    expected = 2000 * 5 / 50
    # 85.4 is the 99.9 % point of chi-square with 49 degrees of freedom
    assert float(((drawn - expected) ** 2 / expected).sum()) < 85.4


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 10.0, float("nan")])
def test_random_fraction(fraction):
    with pytest.raises(
        ValueError, match=rf"^Expected argument `fraction` of ForgetRandom to lie in \(0, 1\), but got {fraction}\.$"
    ):
        ForgetRandom(fraction=fraction)


def test_random_number():
    with pytest.raises(ValueError, match=r"^Expected argument `num` of ForgetRandom to be at least 1, but got 0\.$"):
        ForgetRandom(num=0)
    for wrong in ({}, {"fraction": 0.1, "num": 3}):
        with pytest.raises(
            ValueError, match=r"^Expected exactly one of arguments `fraction` and `num` of ForgetRandom"
        ):
            ForgetRandom(**wrong)


def test_indices():
    assert ForgetIndices([7, 0, 3]).rows(8, no_targets).tolist() == [0, 3, 7]
    assert str(ForgetIndices([7, 0, 3])) == "3 given rows"


@pytest.mark.parametrize("wrong", [8, -1])
def test_indices_outside(wrong):
    with pytest.raises(
        ValueError, match=rf"^Expected argument `indices` of ForgetIndices to lie in \[0, 7\], but got {wrong}\.$"
    ):
        ForgetIndices([1, wrong]).rows(8, no_targets)


def test_indices_twice():
    with pytest.raises(
        ValueError,
        match=r"^Expected argument `indices` of ForgetIndices to name each row once, but got 3 several times\.$",
    ):
        ForgetIndices([1, 3, 3]).rows(8, no_targets)
