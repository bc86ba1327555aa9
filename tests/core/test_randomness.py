"""Streams against a pure-Python generator, uniformity, ranks, and the global generators."""

from __future__ import annotations

import copy
import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from lightning_trust.core.randomness import (
    RandomStreams,
    RepeatedDraws,
    default_seed,
    derived_seed,
    keyed_bits,
    keyed_integers,
    random_state,
    set_random_state,
    untouched_random_state,
)
from tests.two_ranks import run_on_two_ranks

MASK = (1 << 64) - 1


def splitmix64(seed: int, key: int) -> int:
    """Steele et al. (2014), the finaliser of Java's SplittableRandom, in integers of Python."""
    z = (key * 0x9E3779B97F4A7C15 + seed * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) >> 1


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**62 + 12345, derived_seed("a", 3)])
def test_keyed_bits_are_splitmix64(seed):
    keys = [0, 1, 2, 3, 17, 49_999, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -1, -(2**63)]
    expected = [splitmix64(seed, key) for key in keys]
    assert keyed_bits(seed, torch.tensor(keys)).tolist() == expected
    assert all(0 <= value < 2**63 for value in expected)


def test_first_output_of_the_reference_implementation():
    # splitmix64 with state 0 gives e220a8397b1dcdaf (Vigna's splitmix64.c)
    assert keyed_bits(0, torch.tensor([0])).item() == 0xE220A8397B1DCDAF >> 1


def test_keyed_bits_keep_shape_and_do_not_depend_on_the_place():
    keys = torch.arange(60).view(3, 4, 5)
    bits = keyed_bits(5, keys)
    order = torch.randperm(60)
    assert bits.shape == keys.shape
    assert torch.equal(keyed_bits(5, order), bits.flatten()[order])
    assert torch.equal(keyed_bits(5, keys.to(torch.int32)), bits)
    assert len(bits.unique()) == 60


def test_keyed_integers_are_uniform():
    # chi-square with 9 degrees of freedom: 99.99 % lie below 33.7
    for seed in range(5):
        counts = torch.bincount(keyed_integers(seed, torch.arange(20_000), 10), minlength=10).double()
        assert ((counts - 2000) ** 2 / 2000).sum() < 33.7
        assert len(counts) == 10


def test_neighbouring_keys_and_seeds_are_independent():
    # pairs of neighbours fill the 10 x 10 cells evenly: 99 degrees of freedom, 99.99 % below 161.3
    for other in (keyed_integers(3, torch.arange(1, 40_001), 10), keyed_integers(4, torch.arange(40_000), 10)):
        cells = keyed_integers(3, torch.arange(40_000), 10) * 10 + other
        counts = torch.bincount(cells, minlength=100).double()
        assert ((counts - 400) ** 2 / 400).sum() < 161.3


def test_keyed_integers_refuse_an_empty_range():
    with pytest.raises(ValueError, match=r"Expected argument `high` to be at least 1, but got 0\."):
        keyed_integers(0, torch.arange(3), 0)


def test_derived_seed_is_the_same_in_every_process():
    assert derived_seed(3, "SalUn", "labels", 12) == 4181918060525390343
    assert derived_seed(1, 23) != derived_seed(12, 3)
    assert 0 <= derived_seed("x") < 2**63


def test_default_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert default_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert default_seed() == 41


def draw(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(8, generator=generator)


def test_a_draw_is_keyed_and_never_advanced():
    streams = RandomStreams(3, "SalUn")
    first = draw(streams.shared("mask", 7))
    assert torch.equal(first, draw(streams.shared("mask", 7)))
    others = [
        draw(streams.shared("mask", 8)),
        draw(streams.shared("other", 7)),
        draw(streams.rank("mask", 7)),
        draw(RandomStreams(4, "SalUn").shared("mask", 7)),
        draw(RandomStreams(3, "SalUn[b]").shared("mask", 7)),
        streams.sample_rows(8, lambda rows, generator: torch.rand(rows, generator=generator), "mask", 7),
    ]
    assert len(torch.stack([first, *others]).unique(dim=0)) == 7
    assert streams.sample_seed("labels", 0) == streams.sample_seed("labels", 0)
    assert streams.sample_seed("labels", 0) != streams.sample_seed("labels", 1)


def whole_draw(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(rows, 3, generator=generator)


def streams_of(rank: int) -> dict[str, object]:
    streams = RandomStreams(3, "SalUn")
    before = random_state()
    found = {
        "shared": draw(streams.shared("mask", 7)),
        "rank": draw(streams.rank("mask", 7)),
        "rows": streams.sample_rows(6, whole_draw, 11),
        "seed": streams.sample_seed("labels", 0),
    }
    assert torch.equal(before["torch"], torch.get_rng_state())
    return found


def test_ranks_share_what_is_shared_and_deal_the_rows_of_the_whole_batch(tmp_path):
    zero, one = run_on_two_ranks(tmp_path, streams_of)
    assert torch.equal(zero["shared"], one["shared"])
    assert not torch.equal(zero["rank"], one["rank"])
    assert zero["seed"] == one["seed"]
    whole = RandomStreams(3, "SalUn").sample_rows(12, whole_draw, 11)
    assert torch.equal(zero["rows"], whole[0::2])
    assert torch.equal(one["rows"], whole[1::2])


def next_numbers() -> list[object]:
    return [
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
    ]


def test_global_generators_are_untouched():
    # an odd number of normal draws leaves one in reserve
    random.gauss(0, 1), np.random.randn()
    before = random_state()
    streams = RandomStreams(3, "SalUn")
    draw(streams.shared(1)), streams.sample_rows(4, whole_draw, 2), keyed_bits(1, torch.arange(3))
    with untouched_random_state():
        inside = next_numbers()
    assert next_numbers() == inside
    set_random_state(before)
    with suppress(RuntimeError), untouched_random_state():
        next_numbers()
        raise RuntimeError
    assert next_numbers() == inside


def test_random_state_comes_back_from_a_checkpoint(tmp_path):
    random.gauss(0, 1), np.random.randn()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = next_numbers()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert next_numbers() == expected


def test_saving_the_state_draws_nothing_and_aliases_nothing():
    state = random_state()
    kept = copy.deepcopy(state)
    numbers = next_numbers()
    assert torch.equal(state["torch"], kept["torch"])
    set_random_state(kept)
    assert next_numbers() == numbers


@pytest.mark.parametrize("draws", ["torch", "numpy", "python", "nothing"])
def test_repeated_draws_are_the_same_and_leave_the_generators(draws):
    kinds = {"torch": torch.rand, "numpy": np.random.rand, "python": lambda _: random.random(), "nothing": int}

    def evaluation():
        return kinds[draws](1)

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    start = random_state()
    first = evaluation()
    torch.rand(3), np.random.rand(3), random.random()
    outer = random_state()
    repeated = RepeatedDraws(start)
    for _ in range(3):
        repeated.rewind()
        assert evaluation() == first
        repeated.look()
    repeated.finish()
    now = random_state()
    assert torch.equal(now["torch"], outer["torch"])
    assert now["python"] == outer["python"]
    assert all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(now["numpy"], outer["numpy"], strict=True)
    )
