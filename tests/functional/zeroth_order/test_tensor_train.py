"""Tensor-train matrices against full sums, tensorly and torchTT."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_trust.functional.zeroth_order import (
    Contraction,
    contraction,
    largest_ranks,
    tt_linear,
    tt_matrix,
    tt_svd,
)
from lightning_trust.functional.zeroth_order import tensor_train as under_test


def random_cores(out_shape, in_shape, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bonds = [1, *ranks, 1]
    return [
        torch.randn(bonds[k], m, n, bonds[k + 1], generator=generator, dtype=torch.float64)
        for k, (m, n) in enumerate(zip(out_shape, in_shape, strict=True))
    ]


def test_every_entry_is_the_product_of_slices():
    cores = random_cores((2, 3, 2), (3, 1, 2), (2, 4))
    matrix = tt_matrix(cores)
    assert matrix.shape == (12, 6)
    for row, i in enumerate(itertools.product(range(2), range(3), range(2))):
        for column, j in enumerate(itertools.product(range(3), range(1), range(2))):
            product = torch.eye(1, dtype=torch.float64)
            for core, m, n in zip(cores, i, j, strict=True):
                product = product @ core[:, m, n, :]
            assert matrix[row, column].item() == pytest.approx(product.item(), abs=1e-12)


def all_ways(cores, rows):
    shapes = tuple(tuple(core.shape) for core in cores)
    for side in ("left", "right"):
        for cuts in itertools.product([False, True], repeat=len(cores) - 1):
            ends = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(cores)]
            groups = tuple(itertools.pairwise(ends))
            prices = [under_test._group_price(shapes, start, stop, rows, side) for start, stop in groups]
            yield Contraction(side, groups, sum(p[0] for p in prices), sum(p[1] for p in prices))


@pytest.mark.parametrize(("out_shape", "in_shape"), [((2, 3, 2, 1), (3, 1, 2, 4)), ((4, 2, 1, 1), (1, 1, 3, 2))])
def test_every_way_to_multiply_gives_the_product(monkeypatch, out_shape, in_shape):
    cores = random_cores(out_shape, in_shape, (2, 3, 2))
    x = torch.randn(5, 24 if out_shape[0] == 2 else 6, dtype=torch.float64)
    expected = x @ tt_matrix(cores).T
    ways = list(all_ways(cores, 5))
    assert len(ways) == 16
    for way in ways:
        monkeypatch.setattr(under_test, "contraction", lambda *_, way=way: way)
        torch.testing.assert_close(tt_linear(x, cores), expected)


@pytest.mark.parametrize("rows", [1, 64, 9250])
@pytest.mark.parametrize(
    ("out_shape", "in_shape", "rank"),
    [((8, 4, 4, 4), (4, 4, 4, 8), 2), ((8, 4, 4, 4), (1, 1, 3, 7), 2), ((4, 4, 4), (7, 7, 4), 12)],
)
def test_chosen_way_is_the_cheapest_of_all(out_shape, in_shape, rank, rows):
    cores = random_cores(out_shape, in_shape, [rank] * (len(in_shape) - 1))
    chosen = contraction(tuple(tuple(core.shape) for core in cores), rows)
    ways = list(all_ways(cores, rows))
    assert chosen in ways
    assert under_test._price(chosen) == min(map(under_test._price, ways))


def test_multiply_adds_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    cores = random_cores((4, 4, 4), (7, 7, 4), (3, 3))
    for rows in (1, 500):
        with FlopCounterMode(display=False) as counter:
            tt_linear(torch.randn(rows, 196, dtype=torch.float64), cores)
        chosen = contraction(tuple(tuple(core.shape) for core in cores), rows)
        assert counter.get_total_flops() == 2 * chosen.multiply_adds


def test_many_rows_of_a_high_rank_build_the_matrix_and_few_do_not():
    shapes = ((1, 8, 8, 40), (40, 8, 8, 1))
    assert contraction(shapes, 10_000).groups == ((0, 2),)
    assert contraction(shapes, 1).groups == ((0, 1), (1, 2))


def test_gradients_reach_all_cores():
    cores = [core.requires_grad_() for core in random_cores((2, 2, 2), (2, 3, 2), (2, 2))]
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: tt_linear(x, given), cores)


def test_one_call_serves_many_sets_of_cores():
    many = [random_cores((2, 2), (3, 2), (2,), seed) for seed in range(4)]
    stacked = [torch.stack(cores) for cores in zip(*many, strict=True)]
    x = torch.randn(3, 6, dtype=torch.float64)
    got = torch.func.vmap(lambda *cores: tt_linear(x, cores))(*stacked)
    torch.testing.assert_close(got, torch.stack([tt_linear(x, cores) for cores in many]))


def test_svd_of_full_rank_is_exact():
    matrix = torch.randn(24, 30, dtype=torch.float64)
    out_shape, in_shape = (2, 3, 4), (5, 2, 3)
    cores = tt_svd(matrix, out_shape, in_shape, largest_ranks(out_shape, in_shape))
    torch.testing.assert_close(tt_matrix(cores), matrix, rtol=0, atol=1e-10)
    assert largest_ranks(out_shape, in_shape) == [10, 12]
    sizes = [core.square().mean().item() for core in cores]
    assert sizes == pytest.approx([sizes[0]] * 3)


def test_svd_finds_the_ranks_of_a_train():
    cores = random_cores((2, 3, 4), (5, 2, 3), (2, 3))
    matrix = tt_matrix(cores)
    torch.testing.assert_close(tt_matrix(tt_svd(matrix, (2, 3, 4), (5, 2, 3), (2, 3))), matrix)


def test_truncated_svd_with_two_cores_is_the_best_of_its_rank():
    # for two cores it is the truncated SVD of the rearranged matrix, whose error is the rest of the singular values
    matrix = torch.randn(6, 6, dtype=torch.float64)
    cores = tt_svd(matrix, (2, 3), (3, 2), (2,))
    rearranged = matrix.reshape(2, 3, 3, 2).permute(0, 2, 1, 3).reshape(6, 6)
    rest = torch.linalg.svdvals(rearranged)[2:]
    assert (tt_matrix(cores) - matrix).norm().item() == pytest.approx(rest.norm().item())


def test_svd_is_that_of_tensorly():
    tensorly = pytest.importorskip("tensorly")
    matrix = torch.randn(16, 16, dtype=torch.float64)
    # rows and columns by their modes (4, 2, 2) and (2, 2, 4), a pair of modes an axis
    pairs = matrix.reshape(4, 2, 2, 2, 2, 4).permute(0, 3, 1, 4, 2, 5).reshape(8, 4, 8)
    with tensorly.backend_context("pytorch"):
        theirs = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(pairs, [1, 3, 3, 1]))
    mine = tt_matrix(tt_svd(matrix, (4, 2, 2), (2, 2, 4), (3, 3)))
    mine = mine.reshape(4, 2, 2, 2, 2, 4).permute(0, 3, 1, 4, 2, 5).reshape(8, 4, 8)
    torch.testing.assert_close(mine, theirs)


def test_matrix_is_that_of_torchtt():
    torchtt = pytest.importorskip("torchtt")
    cores = random_cores((2, 3, 2), (3, 1, 2), (2, 4))
    torch.testing.assert_close(tt_matrix(cores), torchtt.TT(cores).full().reshape(12, 6))
