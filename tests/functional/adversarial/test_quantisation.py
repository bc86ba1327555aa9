"""The stochastic quantiser: its mean, its error, its edges, and its bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.functional.adversarial import (
    dequantise,
    pack_codes,
    quantisation_levels,
    quantise,
    unpack_codes,
)

BITS = [2, 3, 4, 7, 8, 9, 12, 16]


def gradient(count=40, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_mean_of_the_decoded_is_the_gradient(bits):
    values = gradient()
    norm = values.norm()
    decoded = dequantise(quantise(values.expand(4000, -1), norm, uniform(4000, 40), bits), norm, bits)
    error = decoded.std(0) / 4000**0.5
    # where the standard error is tiny, the entry sits on a level
    assert ((decoded.mean(0) - values).abs() <= 4.0 * error + 1e-6 * norm).all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_the_formula(bits):
    values, draws = gradient(), uniform(40)
    s = 2 ** (bits - 1) - 1
    v, u = values.numpy().astype(np.float64), draws.numpy().astype(np.float64)
    n = np.float64(values.norm())
    a = np.abs(v) * s / n
    level = np.floor(a) + (u < a - np.floor(a))
    codes = quantise(values, values.norm(), draws, bits)
    assert codes.to(torch.int64).tolist() == (2 * level + (v < 0)).astype(int).tolist()
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.uint16)
    assert codes.to(torch.int64).max() < 2**bits
    decoded = dequantise(codes, values.norm(), bits)
    np.testing.assert_allclose(decoded.numpy(), np.sign(v) * level / s * n, rtol=1e-6)
    assert ((decoded - values).abs() <= values.norm() / s * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [1.0, 0.1, -3.7, 1e-15, 1.2345678e7])
def test_only_entry_of_a_tensor_comes_back_exactly(bits, value):
    values = torch.zeros(50)
    values[17] = value
    for seed in range(20):
        codes = quantise(values, values.norm(), uniform(50, seed=seed), bits)
        assert torch.equal(dequantise(codes, values.norm(), bits), values)


@pytest.mark.parametrize("bits", BITS)
def test_zero_stays_zero(bits):
    values = torch.zeros(5)
    codes = quantise(values, values.norm(), uniform(5), bits)
    assert codes.to(torch.int64).tolist() == [0] * 5
    assert dequantise(codes, values.norm(), bits).tolist() == [0.0] * 5


@pytest.mark.parametrize("bits", BITS)
def test_largest_code_fits(bits):
    values = torch.tensor([-2.0, 0.0])
    # a norm that rounding made too small must not carry over into the next code
    codes = quantise(values, values.norm() * (1 - 1e-6), uniform(2), bits)
    assert codes.to(torch.int64).tolist() == [2**bits - 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_become_finite(value):
    values = torch.tensor([1.0, value, -2.0])
    decoded = dequantise(quantise(values, values.norm(), uniform(3)), values.norm())
    assert not decoded.isfinite().any()


def test_norms_of_several_tensors():
    first, second = gradient(6), 100.0 * gradient(4, seed=2)
    draws = uniform(10)
    norms = torch.stack([first.norm(), second.norm()]).repeat_interleave(torch.tensor([6, 4]))
    codes = quantise(torch.cat([first, second]), norms, draws)
    alone = [quantise(first, first.norm(), draws[:6]), quantise(second, second.norm(), draws[6:])]
    assert torch.equal(codes, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    values = gradient().to(dtype)
    norm = values.float().norm()
    decoded = dequantise(quantise(values, norm, uniform(40), 16), norm, 16)
    torch.testing.assert_close(decoded, values.float(), rtol=0.0, atol=norm.item() / 32767 * 1.01)


@pytest.mark.parametrize("bits", range(2, 17))
def test_bytes(bits):
    codes = torch.randint(2**bits, (3, 10), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.uint8 if bits <= 8 else torch.uint16)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5 if bits <= 4 else 10 if bits <= 8 else 20)
    assert torch.equal(unpack_codes(packed, bits).to(torch.int32), codes.to(torch.int32))
    # also from a place that no number of two bytes may have
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), packed[0]])[1:]
    assert torch.equal(unpack_codes(moved, bits).to(torch.int32), codes[0].to(torch.int32))


@pytest.mark.parametrize("bits", [1, 17, 0, -8, 8.0, True])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"`bits` to be an integer in \[2, 16\], but got {bits}"):
        quantisation_levels(bits)
