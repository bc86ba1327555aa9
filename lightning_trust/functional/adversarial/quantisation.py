"""Stochastic quantisation of gradients: few bits an entry, right on average."""

from __future__ import annotations

import torch
from torch import Tensor


def quantisation_levels(bits: int) -> int:
    r"""Number :math:`s = 2^{b-1} - 1` of steps between zero and the norm; one of the bits is the sign.

    Args:
        bits: Bits :math:`b` of a code, 2 to 16.

    Raises:
        ValueError: If ``bits`` is another number.

    Example:
        >>> quantisation_levels(8)
        127

    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise ValueError(f"Expected argument `bits` to be an integer in [2, 16], but got {bits!r}.")
    return 2 ** (bits - 1) - 1


def quantise(values: Tensor, norm: Tensor, uniform: Tensor, bits: int = 8) -> Tensor:
    r"""Values -> codes of ``bits`` bits whose decoding is right on average.

    .. math::
        a = s \, |v| / n, \qquad l = \lfloor a \rfloor + \mathrm{Bernoulli}(a - \lfloor a \rfloor), \qquad
        \mathrm{code} = 2 l + [v < 0]

    Paper: QSGD (arXiv:1610.02132), as in Distributed Adversarial Training to Robustify Deep Neural Networks at Scale
    (UAI 2022).

    Args:
        values: Any shape; computed in float32 or wider.
        norm: Norm :math:`n` of the tensor that a value belongs to, at least as large as any of its values; a scalar,
            or of a shape that broadcasts. Where it is 0 the code is 0.
        uniform: Random numbers in [0, 1), of the shape of ``values``.
        bits: Bits of a code, 2 to 16.

    Returns:
        Codes in ``[0, 2**bits)`` of the shape of ``values``: uint8 for up to 8 bits, else uint16.

    Raises:
        ValueError: If ``bits`` is out of its range.

    Example:
        >>> gradient = torch.tensor([3.0, -4.0, 0.0])
        >>> quantise(gradient, gradient.norm(), torch.full((3,), 0.5), bits=8).tolist()
        [152, 205, 0]

    """
    levels = quantisation_levels(bits)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    # the ratio first: it is 1, and not nearly 1, for the only entry of a tensor
    scaled = torch.where(norm > 0.0, wide.abs() / norm, torch.zeros_like(wide)) * levels
    level = scaled.floor()
    level += uniform < scaled - level
    codes = (level.clamp_(max=levels).to(torch.int32) << 1) | (wide < 0.0)
    return codes.to(torch.uint8 if bits <= 8 else torch.uint16)


def dequantise(codes: Tensor, norm: Tensor, bits: int = 8) -> Tensor:
    r"""Codes -> values :math:`\pm n \, l / s`.

    A norm that is NaN or infinite gives values that are not finite either.

    Args:
        codes: What :func:`quantise` returned.
        norm: The norms that were given to it.
        bits: Bits of a code.

    Returns:
        float32 of the shape of ``codes``.

    Example:
        >>> norm = torch.tensor(5.0)
        >>> [round(value, 3) for value in dequantise(torch.tensor([152, 205], dtype=torch.uint8), norm).tolist()]
        [2.992, -4.016]

    """
    whole = codes.to(torch.int32)
    # an integer shift: halving by division would add half a level to every code that ends in 1
    level = (whole >> 1).to(torch.float32) / quantisation_levels(bits)
    return torch.where(whole & 1 == 1, -level, level) * norm


def pack_codes(codes: Tensor, bits: int = 8) -> Tensor:
    """Codes -> bytes to be sent: two codes a byte up to 4 bits, one up to 8, else two bytes a code.

    Args:
        codes: Shape ``(..., n)``; ``n`` is even where two share a byte.
        bits: Bits of a code.

    Returns:
        uint8, shape ``(..., n / 2)``, ``(..., n)`` or ``(..., 2 n)``.

    Example:
        >>> pack_codes(torch.tensor([3, 15, 1, 0], dtype=torch.uint8), bits=4).tolist()
        [243, 1]

    """
    if bits <= 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes.contiguous().view(torch.uint8)


def unpack_codes(packed: Tensor, bits: int = 8) -> Tensor:
    """Bytes -> codes (inverse of :func:`pack_codes`).

    Example:
        >>> unpack_codes(torch.tensor([243, 1], dtype=torch.uint8), bits=4).tolist()
        [3, 15, 1, 0]

    """
    if bits <= 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    # a copy: two bytes may not lie where a number of two bytes must
    return packed.clone().view(torch.uint16) if bits > 8 else packed
