"""Rows, groups and splits of Diabetes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_diabetes

from lightning_trust.datamodules import Diabetes


def made(**changes):
    data = Diabetes(**changes)
    data.setup()
    return data


def test_rows_are_those_of_the_study():
    data = made(test_rows=280, base_rows=60, val_rows=60)
    found = [
        torch.cat(parts)
        for parts in zip(
            *(
                made(**{"test_rows": 280, "base_rows": 60, "val_rows": 60, "part": part}).train_dataset.tensors
                for part in ("base", "tuning")
            ),
            strict=True,
        )
    ]
    inputs, targets, groups = (
        torch.cat(parts) for parts in zip(found, data.val_dataset.tensors, data.test_dataset.tensors, strict=True)
    )
    study = load_diabetes(scaled=False)
    assert len(inputs) == 442
    # all patients, each once, in another order
    columns = (study.data - study.data.mean(axis=0)) / study.data.std(axis=0, ddof=1)
    expected = np.column_stack([columns, study.target > np.median(study.target), study.data[:, 1] == 2])
    whole = np.column_stack([inputs, targets, groups])
    for rows in (expected, whole):
        rows[:] = rows[np.lexsort(rows[:, :10].round(4).T)]
    np.testing.assert_allclose(whole, expected, atol=1e-3)


def test_sizes_and_batches():
    data = made(batch_size=16, train_rows=50)
    inputs, targets, groups = next(iter(data.train_dataloader()))
    assert inputs.shape == (16, 10)
    assert (targets.dtype, groups.dtype) == (torch.int64, torch.int64)
    assert [len(part) for part in (data.train_dataset, data.val_dataset, data.test_dataset)] == [50, 60, 120]
    assert len(next(iter(data.predict_dataloader()))[0]) == len(next(iter(data.val_dataloader()))[0]) == 16


def test_bad_input():
    with pytest.raises(ValueError, match="`part` to be 'base' or 'tuning', but got 'all'"):
        Diabetes(part="all")
    with pytest.raises(ValueError, match="`val_rows` to be a positive integer, but got 0"):
        Diabetes(val_rows=0)
    for arguments in ({"base_rows": 400}, {"train_rows": 161}, {"part": "tuning", "base_rows": 262}):
        with pytest.raises(MisconfigurationException, match="to share the 442 rows of Diabetes"):
            made(**arguments)
