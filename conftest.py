"""Settings of every test, the doctests of the package included."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _seeded():
    """Each test and doctest starts from the same random state, whatever ran before it."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
