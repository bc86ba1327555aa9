"""Named random streams, derived anew for every draw and never advanced.

A draw names its stream and is keyed by (seed, state key of the callback, total batch index or whatever else places it
in the run). It touches no global generator, gives the same numbers after a resume, and is

* ``shared``: equal on all ranks (masks, directions);
* ``sample``: drawn for the global batch, of which rank r of W takes the rows r::W, or keyed by the index of the sample
  in its dataset (attack starts, label redraws);
* ``rank``: different on every rank (quantisers).

The global step is no key: it does not change inside an accumulation window.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from lightning_trust.core.distributed import rank, world_size

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def default_seed() -> int:
    """The seed that ``seed_everything`` set, or 0 where it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derived_seed(*key: object) -> int:
    """A 63-bit seed from a key of primitives; equal keys give equal seeds in every process and version of Python."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed number that torch wants."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_bits(seed: int, keys: Tensor) -> Tensor:
    """63 random bits for each integer key (splitmix64), the same for a key wherever it stands in the tensor.

    Args:
        seed: Any integer.
        keys: int64, any shape, such as the indices of samples in their dataset.

    Returns:
        Non-negative int64 of the same shape.

    Example:
        >>> a = keyed_bits(1, torch.tensor([3, 5]))
        >>> b = keyed_bits(1, torch.tensor([5, 9]))
        >>> bool(a[1] == b[0])
        True

    """
    x = keys.long() * _signed(_GOLDEN) + _signed(seed * _FACTORS[0] + _GOLDEN)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return _shifted(x ^ _shifted(x, 31), 1)


def keyed_integers(seed: int, keys: Tensor, high: int) -> Tensor:
    """An integer in ``[0, high)`` for each key, uniform up to a bias below ``high / 2**63``."""
    if high < 1:
        raise ValueError(f"Expected argument `high` to be at least 1, but got {high}.")
    return keyed_bits(seed, keys) % high


class SampleDraws:
    """Random numbers for samples, the same for a sample wherever it stands: in any batch, order, subset, or rank.

    Every draw is a hash of (seed, number of the draw, key of the sample, position): counter-based, so that nothing is
    shared between the rows of a batch. Rows that are taken out with :meth:`rows` go on with the same numbers that they
    would have got in the whole.

    Args:
        keys: int64, shape ``(N,)``: what tells the samples apart, such as their row in the global batch or their index
            in the dataset.
        seed: Seed of the stream; drawn from torch's global generator at the first draw if None.

    Example:
        >>> draws = SampleDraws(torch.arange(4), seed=1)
        >>> some = draws.rows(torch.tensor([3, 1]))
        >>> bool((draws.uniform(2)[[3, 1]] == some.uniform(2)).all())
        True

    """

    def __init__(self, keys: Tensor, seed: int | None = None) -> None:
        self.keys = keys
        self._seed = seed
        self._count = 0

    @property
    def seed(self) -> int:
        """Seed of the stream."""
        if self._seed is None:
            self._seed = int(torch.randint(2**62, ()))
        return self._seed

    def rows(self, rows: Tensor) -> SampleDraws:
        """The draws of some samples, by index or by a boolean mask."""
        some = SampleDraws(self.keys[rows], self.seed)
        some._count = self._count
        return some

    def stream(self, *key: object) -> SampleDraws:
        """Another stream for the same samples, such as that of one attack out of several."""
        return SampleDraws(self.keys, derived_seed("stream", self.seed, *key))

    def bits(self, *shape: int) -> Tensor:
        """63 random bits an entry: int64, shape ``(N, *shape)``."""
        sample = keyed_bits(derived_seed("draw", self.seed, self._count), self.keys)
        self._count += 1
        if not shape:
            return sample
        places = torch.arange(math.prod(shape), device=self.keys.device)
        return keyed_bits(self.seed, sample[:, None] + places).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in [0, 1), shape ``(N, *shape)``."""
        return (self.bits(*shape) >> 39).float() * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32, shape ``(N, *shape)``."""
        # the middle of one of 2^40 cells: never 0 or 1, where the inverse is infinite
        cells = ((self.bits(*shape) >> 23).double() + 0.5) * 2.0**-40
        return torch.special.ndtri(cells).float()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in ``[low, high)``, shape ``(N, *shape)``."""
        if high <= low:
            raise ValueError(f"Expected argument `high` to be greater than `low` ({low}), but got {high}.")
        return low + self.bits(*shape) % (high - low)

    def signs(self, *shape: int) -> Tensor:
        """Float32, -1 or 1, shape ``(N, *shape)``."""
        return (self.bits(*shape) >> 40 & 1).float() * 2.0 - 1.0


@dataclass(frozen=True)
class RandomStreams:
    """The random streams of one callback.

    Args:
        seed: Seed of the run, equal on all ranks.
        owner: State key of the callback, so that two callbacks never share numbers.

    """

    seed: int
    owner: str

    def shared(self, *key: object, device: torch.device | str = "cpu") -> Generator:
        """A generator that is equal on all ranks."""
        return self._generator(device, "shared", *key)

    def rank(self, *key: object, device: torch.device | str = "cpu") -> Generator:
        """A generator of this rank's own."""
        return self._generator(device, "rank", rank(), *key)

    def sample_rows(self, rows: int, draw: Callable[[int, Generator], Tensor], *key: object) -> Tensor:
        """Rows for the samples of this rank, cut from a draw for the global batch.

        Two ranks with ``rows`` samples each, whose batches interleave as a distributed sampler deals them, get the
        rows that one rank would have drawn for the whole batch.

        Args:
            rows: Number of samples on this rank.
            draw: Given a number of rows and a CPU generator, returns a tensor with so many rows.
            key: Places the draw in the run.

        """
        ranks = world_size()
        whole = draw(rows * ranks, self._generator("cpu", "sample", *key))
        return whole[rank() :: ranks]

    def samples(self, rows: int, *key: object, device: torch.device | str = "cpu") -> SampleDraws:
        """Draws for the samples of this rank's batch, of which the global batch holds the rows r::W."""
        places = torch.arange(rows, device=device) * world_size() + rank()
        return SampleDraws(places, self.sample_seed(*key))

    def sample_seed(self, *key: object) -> int:
        """Seed for :func:`keyed_bits` and its kin, equal on all ranks."""
        return derived_seed("sample", self.seed, self.owner, *key)

    def _generator(self, device: torch.device | str, *key: object) -> Generator:
        return Generator(device).manual_seed(derived_seed(self.seed, self.owner, *key))


def random_state() -> dict[str, Any]:
    """State of the global generators (Python, NumPy, torch, CUDA), as tensors and primitives.

    It loads under ``weights_only=True``.
    """
    version, words, gauss = random.getstate()
    # the legacy generator is the global one that users' augmentations draw from
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *(float(value) for value in rest)],
    }
    # not `is_available`: asking a GPU that the run does not use would initialise it, and forks could not follow
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_state(states: dict[str, Any]) -> None:
    """Put the global generators in a state that :func:`random_state` returned, or those that are in a part of it."""
    if "torch" in states:
        torch.set_rng_state(states["torch"].cpu())
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
    if "numpy" in states:
        name, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


class RepeatedDraws:
    """Evaluates code again and again with the same numbers from the global generators.

    Python's and NumPy's generators are slow to set; they are left alone once an evaluation was seen not to draw from
    them. :meth:`finish` puts all of them back where they were when this was made.

    Args:
        states: Where each evaluation starts: what :func:`random_state` returned.

    """

    def __init__(self, states: dict[str, Any]) -> None:
        self._start = states
        self._outer = random_state()
        self._drawn: set[str] | None = None

    def rewind(self) -> None:
        """Put the generators where an evaluation starts."""
        if self._drawn is None:
            set_random_state(self._start)
        else:
            set_random_state({name: self._start[name] for name in self._drawn})

    def look(self) -> None:
        """After an evaluation: see which generators it drew from."""
        if self._drawn is None:
            now = random_state()
            slow = {"python": now["python"] != self._start["python"], "numpy": not _same(now, self._start)}
            # torch's are quick, and what most steps draw from
            quick = {name for name in self._start if name not in slow}
            self._drawn = quick | {name for name, drew in slow.items() if drew}

    def finish(self) -> None:
        """Put the generators back where they were in the beginning."""
        set_random_state(self._outer)


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two states of NumPy's generator are equal."""
    (name, words, *rest), (other, others, *more) = first["numpy"], second["numpy"]
    return name == other and rest == more and torch.equal(words.cpu(), others.cpu())


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Let code draw from the global generators and put them back as they were."""
    states = random_state()
    try:
        yield
    finally:
        set_random_state(states)
