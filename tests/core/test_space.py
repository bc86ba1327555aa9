"""The box of valid inputs, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.core.space import InputSpace

MEAN, STD = (0.1, 0.4, 0.7), (0.5, 0.25, 2.0)


def normalised(raw: np.ndarray) -> np.ndarray:
    shape = (1, 3, 1, 1)
    return (raw - np.reshape(MEAN, shape)) / np.reshape(STD, shape)


def test_conversions_equal_numpy_and_invert_each_other():
    raw = np.random.default_rng(0).random((4, 3, 2, 5))
    space = InputSpace(0.0, 1.0, MEAN, STD)
    x = space.from_raw(torch.from_numpy(raw).float())
    np.testing.assert_allclose(x.numpy(), normalised(raw), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(space.to_raw(x).numpy(), raw, rtol=1e-5, atol=1e-6)
    assert space.normalised
    # a raw step of eps is a step of eps * scale
    moved = space.from_raw(torch.from_numpy(raw + 0.1).float())
    torch.testing.assert_close(moved - x, (0.1 * space.scale(x)).expand_as(x), rtol=1e-4, atol=1e-5)


def test_bounds_and_clamp_equal_numpy():
    x = torch.from_numpy(np.random.default_rng(1).normal(0.0, 4.0, (4, 3, 2, 5))).float()
    space = InputSpace(-1.0, 2.0, MEAN, STD)
    low, high = space.bounds(x)
    assert low.shape == high.shape == (1, 3, 1, 1)
    expected = np.clip(x.numpy(), normalised(np.full((1, 3, 1, 1), -1.0)), normalised(np.full((1, 3, 1, 1), 2.0)))
    np.testing.assert_allclose(space.clamp(x).numpy(), expected, rtol=1e-5, atol=1e-6)
    raw = space.to_raw(space.clamp(x))
    assert -1.0 - 1e-5 <= raw.min() < raw.max() <= 2.0 + 1e-5


def test_raw_data_pass_as_they_are():
    space = InputSpace(0, 255)
    x = torch.tensor([[-3.0, 7.0], [300.0, 0.0]])
    assert not space.normalised
    assert space.to_raw(x) is x
    assert space.from_raw(x) is x
    assert space.scale(x).shape == (1, 1)
    assert space.clamp(x).tolist() == [[0.0, 7.0], [255.0, 0.0]]


def test_channels_elsewhere_and_one_value_for_all():
    x = torch.randn(2, 5, 3)
    last = InputSpace(0.0, 1.0, MEAN, STD, channel_dim=-1)
    torch.testing.assert_close(last.to_raw(x), x * torch.tensor(STD) + torch.tensor(MEAN))
    torch.testing.assert_close(InputSpace(0.0, 1.0, [0.5], [0.25]).to_raw(x), x * 0.25 + 0.5)
    torch.testing.assert_close(last.bounds(x)[1], ((1.0 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 1, 3))


def test_check():
    space = InputSpace(0.0, 1.0, MEAN, STD)
    x = space.from_raw(torch.rand(2, 3, 4, 4))
    space.check(x)
    space.check(space.bounds(x)[0].expand(2, 3, 4, 4))
    space.check(x.half())
    with pytest.raises(ValueError, match=r"Expected `images` to lie in \[0.0, 1.0\] in raw units, but got values in"):
        space.check(x + 3.0, "images")
    with pytest.raises(ValueError, match=r"Are the data normalised\? Then state `InputSpace"):
        InputSpace().check(x)
    with pytest.raises(ValueError, match=r"Are they bytes\? Divide them by 255, or state `InputSpace\(low=0.0"):
        InputSpace().check(torch.linspace(0.0, 255.0, 5))
    with pytest.raises(ValueError, match="to be finite"):
        space.check(x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 1.0, "high": 1.0}, "Expected argument `high` to be greater than `low` (1.0), but got 1.0."),
        ({"high": float("nan")}, "greater than `low`"),
        ({"mean": [0.5]}, "Expected arguments `mean` and `std` to be given together, but got mean=[0.5] and std=None"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "to have the same length, but got 1 and 2 values"),
        ({"mean": [0.5], "std": [0.0]}, "Expected every value of argument `std` to be positive, but got [0.0]"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        InputSpace(**arguments)
    assert words in str(error.value)


def test_channels_that_do_not_fit_are_refused():
    space = InputSpace(0.0, 1.0, MEAN, STD)
    grey = torch.rand(2, 1, 4, 4)
    for method in (space.to_raw, space.from_raw, space.scale, space.bounds, space.clamp, space.check):
        with pytest.raises(ValueError, match=r"Expected inputs with 3 channels in dimension 1, .* \(2, 1, 4, 4\)"):
            method(grey)
