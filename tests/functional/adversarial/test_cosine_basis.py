"""The cosine basis against scipy."""

from __future__ import annotations

import pytest
import torch
from scipy.fft import dct

from lightning_trust.functional.adversarial import dct_matrix


@pytest.mark.parametrize("size", [1, 2, 7, 28])
def test_cosine_basis_is_that_of_scipy(size):
    expected = torch.from_numpy(dct(torch.eye(size, dtype=torch.float64).numpy(), axis=0, norm="ortho")).float()
    torch.testing.assert_close(dct_matrix(size), expected)
