"""Coordinate-wise gradient estimation."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.core.modes import unused_running_statistics
from lightning_trust.core.weights import substituted
from lightning_trust.functional.zeroth_order import signal_to_noise
from lightning_trust.optim.zeroth_order.block_queries import BlockQueries
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator, gradient_of
from lightning_trust.optim.zeroth_order.oracle import (
    Estimate,
    LossOracle,
    check_count,
    check_finite,
    check_mu,
    resolution,
)

_MIB = 1 << 20


class CGE(GradientEstimator):
    r"""Coordinate-wise gradient estimation: a difference of the loss for every weight.

    .. math:: \hat g_i = \frac{l(\theta + \mu e_i) - l(\theta)}{\mu}
        \quad\text{or}\quad \frac{l(\theta + \mu e_i) - l(\theta - \mu e_i)}{2 \mu}

    for the entries :math:`i` that masks leave active; the others' estimate is 0. It costs one query, at the
    weights as they are, and one for every active weight; two with central differences. There is no sampling error, and
    the bias is about :math:`\mu / 2` times the second derivative (one-sided).

    Coordinates are evaluated many at a time. Where the network is a chain of blocks (``nn.Sequential``, this package's
    and torchvision's ResNets, or a network with a method ``blocks``; see
    :class:`lightning_trust.core.blocks.SplitModule`), a coordinate is evaluated from the input of its block that the
    clean pass left, and of the layers after a convolution or linear layer only what one changed channel changes.
    Otherwise the whole loss is evaluated for many weights at once by ``torch.func.vmap``, where it can be, and for one
    after the other where it cannot.

    Paper: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training (ICLR 2024, arXiv:2310.02025).

    Args:
        mu: Length :math:`\mu` of a difference.
        central: Whether differences are central.
        feature_reuse: Whether a coordinate is evaluated from the input of its block: ``"auto"`` where the network is a
            chain of blocks, True to be told where it is not.
        chunk: How many coordinates are evaluated at a time where the network is no chain of blocks: a number, 1 for one
            after the other, or ``"auto"``, as many as fit ``memory``.
        memory: About how many MiB the coordinates that are evaluated at a time may take.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If ``feature_reuse`` is True and the network is no chain of blocks.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> found = CGE(mu=0.1, central=True).estimate(lambda: weight.square().sum(), [weight])
        >>> weight.grad, found.queries
        (tensor([2.0000, 4.0000], dtype=torch.float64), 5)

    """

    def __init__(
        self,
        mu: float = 5e-3,
        central: bool = False,
        feature_reuse: bool | Literal["auto"] = "auto",
        chunk: int | Literal["auto"] = "auto",
        memory: float = 64.0,
    ) -> None:
        check_mu(mu)
        if feature_reuse not in (True, False, "auto"):
            raise ValueError(
                f"Expected argument `feature_reuse` to be True, False or 'auto', but got {feature_reuse!r}."
            )
        if chunk != "auto":
            check_count("chunk", chunk)
        if not memory > 0.0:
            raise ValueError(f"Expected argument `memory` to be a positive number of MiB, but got {memory}.")
        self.mu = mu
        self.central = central
        self.feature_reuse = feature_reuse
        self.chunk = chunk
        self.memory = memory
        # what a loss was found not to bear
        self._vectorized_outputs = True
        self._vectorized_weights = True
        self._reads_through_module: bool | None = None

    def add(self, oracle: LossOracle, scale: float = 1.0) -> Estimate:
        """Add ``scale`` times the estimate to the ``.grad`` of the oracle's parameters."""
        places = {name: _active(oracle, name) for name in oracle.parameters}
        queries = self._queries(oracle)
        base = oracle.base() if queries is None else queries.base
        costs = _costs(oracle, queries, places)
        share = oracle.share(costs)
        found: list[Tensor] = []
        start = 0
        for name, every in places.items():
            mine = every[max(share.start - start, 0) : max(share.stop - start, 0)]
            start += len(every)
            if len(mine):
                found.append(self._slopes(oracle, queries, base, name, mine))
        own = torch.cat(found) if found else base.new_zeros(0)
        slopes = oracle.combined(own, costs)
        check_finite(slopes, lambda place: self._words(places, place))
        for (name, every), some in zip(
            places.items(), slopes.split([len(each) for each in places.values()]), strict=True
        ):
            gradient = gradient_of(oracle.parameters[name])
            flat = gradient.view(-1) if gradient.is_contiguous() else gradient.flatten()
            flat.index_add_(0, every, (scale * some).to(gradient.dtype))
            if flat.data_ptr() != gradient.data_ptr():
                gradient.copy_(flat.view_as(gradient))
        forwards = float(oracle.queries)
        if queries is not None:
            self._vectorized_outputs = queries.vectorized
            # the clean pass, and the coordinates that ran through no block
            forwards = 1.0 + queries.evaluations / len(queries.blocks) + queries.outside
        return oracle.estimate(base, self._snr(slopes, base), forwards)

    def _queries(self, oracle: LossOracle) -> BlockQueries | None:
        if self.feature_reuse is False:
            return None
        queries = BlockQueries.of(oracle, int(self.memory * _MIB), self._vectorized_outputs)
        if queries is None and self.feature_reuse is True:
            found = "no network" if oracle.network is None else type(oracle.network).__name__
            raise MisconfigurationException(
                "feature_reuse=True needs a network that is nn.Sequential or implements SplitModule (a method `blocks`"
                " that returns the modules its forward pass is a chain of), has no hooks, is called with one tensor"
                " that does not depend on what it gave before, and whose outputs are all that the loss reads of the"
                f" weights, but got {found}. Leave feature_reuse='auto'."
            )
        return queries

    def _slopes(
        self, oracle: LossOracle, queries: BlockQueries | None, base: Tensor, name: str, places: Tensor
    ) -> Tensor:
        def losses(by: float) -> Tensor:
            if queries is not None and name in queries.block_of:
                return queries.losses(name, places, by)
            if queries is not None:
                queries.outside += len(places)
            return self._whole_losses(oracle, name, places, by)

        above = losses(self.mu)
        if self.central:
            return (above - losses(-self.mu)) / (2.0 * self.mu)
        return (above - base) / self.mu

    # -- without blocks ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _whole_losses(self, oracle: LossOracle, name: str, places: Tensor, by: float) -> Tensor:
        chunk = self._chunk(oracle, name)
        if chunk > 1 and oracle.module is not None and self._reads_through_module is None:
            self._reads_through_module = oracle.reads_through(oracle.module)
        if chunk > 1 and oracle.module is not None and self._vectorized_weights and self._reads_through_module:
            try:
                return torch.cat([_vectorized(oracle, oracle.module, name, some, by) for some in places.split(chunk)])
            except (RuntimeError, TypeError, ValueError):
                # a loss that asks for the value of a tensor, or writes to one, cannot be vectorised; one that is wrong
                # says so below
                self._vectorized_weights = False
        flat = oracle.parameters[name].data
        found = []
        for place in places.tolist():
            at = torch.unravel_index(torch.tensor(place), flat.shape) if flat.ndim else ()
            # the old value is put back as it was: adding and subtracting would let it drift
            kept = flat[at].clone()
            try:
                flat[at] += by
                found.append(oracle())
            finally:
                flat[at] = kept
        return torch.stack(found)

    def _chunk(self, oracle: LossOracle, name: str) -> int:
        if self.chunk != "auto":
            return self.chunk
        if oracle.module is None:
            return 1
        parameter = oracle.parameters[name]
        # as many activations as weights is a guess, and what is batched holds both a few times
        weights = sum(each.numel() for each in oracle.parameters.values()) + parameter.numel()
        return max(1, min(256, int(self.memory * _MIB / (4 * weights * parameter.element_size()))))

    def _words(self, places: dict[str, Tensor], place: int) -> str:
        for name, every in places.items():
            if place < len(every):
                return f"at coordinate {int(every[place])} of '{name}' (mu={self.mu:g})"
            place -= len(every)
        return ""

    def _snr(self, slopes: Tensor, base: Tensor) -> float:
        lost = (0.5 if self.central else 2.0) * (resolution(base) / self.mu) ** 2 * len(slopes)
        return signal_to_noise(float(slopes.double().square().sum()), lost, 0.0, lost)


def _active(oracle: LossOracle, name: str) -> Tensor:
    """Flat indices of a parameter's active entries, int64."""
    mask = oracle.masks.get(name)
    if mask is None:
        return torch.arange(oracle.parameters[name].numel(), device=oracle.device)
    return mask.to(oracle.device).flatten().nonzero().flatten()


def _costs(oracle: LossOracle, queries: BlockQueries | None, places: dict[str, Tensor]) -> Tensor | int:
    if queries is None or oracle.parallel == "data":
        return sum(len(every) for every in places.values())
    whole = max(queries.costs(name) for name in queries.block_of)
    each = [
        torch.full((len(every),), queries.costs(name) if name in queries.block_of else whole, dtype=torch.float64)
        for name, every in places.items()
    ]
    return torch.cat(each)


def _vectorized(oracle: LossOracle, module: nn.Module, name: str, places: Tensor, by: float) -> Tensor:
    parameter = oracle.parameters[name]
    own = next(key for key, value in module.named_parameters() if value is parameter)
    moved = parameter.detach().reshape(1, -1).repeat(len(places), 1)
    moved.scatter_add_(1, places[:, None], torch.full_like(moved[:, :1], by))

    def loss(value: Tensor) -> Tensor:
        with substituted(module, {own: value}), unused_running_statistics(module):
            return oracle.value()

    found = torch.func.vmap(loss, randomness="same")(moved.view(-1, *parameter.shape))
    if found.numel() != len(places):
        raise ValueError("Expected one loss a coordinate.")
    oracle.queries += len(places)
    found = found.reshape(-1)
    return found if found.dtype.itemsize >= 4 else found.float()
