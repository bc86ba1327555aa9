"""Oscillators: solver against the closed form, splits, noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from lightning_trust.datamodules import OscillatorDataModule, oscillator_trajectory

TIMES = np.linspace(2.5, 6.0, 8)


def test_solver_against_the_matrix_exponential():
    points = np.array([[1.0, 0.0], [2.3, 0.4], [4.0, 0.05], [1.0, 3.0]])
    found = oscillator_trajectory(points)
    assert found.shape == (4, 8)
    for (stiffness, damping), row in zip(points, found, strict=True):
        system = np.array([[0.0, 1.0], [-stiffness, -damping]])
        expected = [(expm(system * time) @ [1.0, 0.0])[0] for time in TIMES]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def data(**kwargs):
    module = OscillatorDataModule(**kwargs)
    module.setup()
    return module


def test_targets_are_what_the_solver_says_of_the_constants():
    module = data(train_rows=9)
    for part in ("train", "test"):
        constants = module.constants(part)
        assert ((constants >= torch.tensor([1.0, 0.05])) & (constants <= torch.tensor([4.0, 0.6]))).all()
        targets = getattr(module, f"{part}_dataset").tensors[1]
        np.testing.assert_allclose(targets, oscillator_trajectory(constants.numpy()), atol=1e-6)


def test_inputs_are_the_start_with_noise():
    clean, noisy = data(noise=0.0, train_rows=500), data(noise=0.1, train_rows=500)
    x = clean.train_dataset.tensors[0]
    stiffness = clean.constants("train")[:, 0]
    # x(t) = 1 - k t^2 / 2 + ... at t = 0.125
    np.testing.assert_allclose(1.0 - x[:, 0], stiffness * 0.125**2 / 2, rtol=0.06)
    difference = noisy.train_dataset.tensors[0] - x
    assert difference.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy.train_dataset.tensors[1], clean.train_dataset.tensors[1])


def test_splits():
    small, large = data(train_rows=20, val_rows=5), data(train_rows=50, val_rows=5)
    assert torch.equal(small.test_dataset.tensors[0], large.test_dataset.tensors[0])
    assert len(next(iter(small.train_dataloader()))[0]) == 20
    assert len(next(iter(small.val_dataloader()))[0]) == 5
    assert data().val_dataloader() == []
    assert len(next(iter(data(batch_size=8).predict_dataloader()))[0]) == 8
    assert not torch.equal(data(seed=1).constants("test"), data(seed=2).constants("test"))
    assert not torch.equal(large.constants("train")[:5], large.constants("val"))


def test_bad_input():
    for arguments, message in (
        ({"train_rows": 0}, "`train_rows` to be at least 1, but got 0"),
        ({"val_rows": -1}, "`val_rows` to be at least 0, but got -1"),
        ({"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
        ({"noise": -0.1}, "`noise` to be at least 0, but got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            OscillatorDataModule(**arguments)
