"""The cosine basis of an image."""

from __future__ import annotations

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    r"""The orthonormal basis of the discrete cosine transform (type II): one basis vector a row, slowest first.

    Args:
        size: Length of a vector.

    Returns:
        Float32, shape ``(size, size)``.

    Example:
        >>> basis = dct_matrix(4)
        >>> torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-6)
        True

    """
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    place = torch.arange(size, dtype=torch.float64)[None]
    basis = torch.cos(torch.pi * frequency * (2.0 * place + 1.0) / (2.0 * size)) * (2.0 / size) ** 0.5
    basis[0] /= 2.0**0.5
    return basis.float()
