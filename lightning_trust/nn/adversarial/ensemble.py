"""An ensemble of networks that votes with probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_trust.nn.adversarial.curve import CurveNetwork


class WeightEnsemble(nn.Module):
    r"""Networks that vote with their probabilities; it puts out the logarithm of the mean, so that attacks go through.

    .. math:: f(x) = \log \frac1K \sum_k \mathrm{softmax}(f_k(x))

    Paper: Bridging Models to Defend: A Population-Based Strategy for Robust Adversarial Defense (arXiv 2303.10225),
    where the networks are points of a curve.

    Shape:
        - Input: that of the networks.
        - Output: log-probabilities ``(N, K)``, which serve as logits.

    Args:
        networks: The networks, of the same classes.

    Raises:
        ValueError: If there is no network; in the call, if they differ in the number of classes.

    Example:
        >>> one, other = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> ensemble = WeightEnsemble([one, other])
        >>> x = torch.ones(1, 1)
        >>> bool(torch.allclose(ensemble(x).exp(), (one(x).softmax(1) + other(x).softmax(1)) / 2))
        True

    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not len(networks):
            raise ValueError("Expected argument `networks` to hold at least one network, but got none.")
        self.networks = nn.ModuleList(networks)

    @classmethod
    def of_curve(cls, curve: CurveNetwork, ts: Sequence[float] = (0.2, 0.5, 0.8)) -> WeightEnsemble:
        """The networks at some positions of a curve, as ordinary networks of their own.

        All have the BatchNorm statistics that the curve has at the moment: re-estimate those of the ensemble, e.g. with
        ``torch.optim.swa_utils.update_bn``, which does so for each network.

        Args:
            curve: The curve.
            ts: Positions in [0, 1].

        Raises:
            ValueError: If there is no position, or one is out of [0, 1].

        """
        if not len(ts):
            raise ValueError("Expected argument `ts` to hold at least one position, but got none.")
        return cls([curve.export(t) for t in ts])

    def forward(self, x: Tensor) -> Tensor:
        """Inputs -> log-probabilities ``(N, K)``."""
        votes = [network(x).log_softmax(dim=1) for network in self.networks]
        shapes = {tuple(vote.shape) for vote in votes}
        if len(shapes) > 1:
            raise ValueError(f"Expected the networks to have the same classes, but got outputs {sorted(shapes)}.")
        return torch.stack(votes).logsumexp(dim=0) - math.log(len(votes))
