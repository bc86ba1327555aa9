"""An ensemble of networks that votes with probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_trust.core.saved_weights import load_weights
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
        weights: Files with the weights of each, as :class:`~lightning_trust.callbacks.CurveEvaluation` exports them:
            Lightning checkpoints, files with a state dict, or safetensors files, of the network or of a module that
            holds it. A single network is copied for each file. Those that the networks have if None.

    Raises:
        FileNotFoundError: If there is no file of that name.
        ValueError: If there is no network, their number is not that of the files, or a file is of another architecture;
            in the call, if they differ in the number of classes.

    Example:
        >>> one, other = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> ensemble = WeightEnsemble([one, other])
        >>> x = torch.ones(1, 1)
        >>> bool(torch.allclose(ensemble(x).exp(), (one(x).softmax(1) + other(x).softmax(1)) / 2))
        True

    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[str] | None = None) -> None:
        super().__init__()
        if not len(networks):
            raise ValueError("Expected argument `networks` to hold at least one network, but got none.")
        if weights is not None:
            if len(networks) == 1:
                networks = [networks[0], *(copy.deepcopy(networks[0]) for _ in weights[1:])]
            if len(networks) != len(weights):
                raise ValueError(
                    "Expected argument `weights` to name a file for each network, or several for a single one, but got"
                    f" {len(weights)} for {len(networks)} networks."
                )
            for network, file in zip(networks, weights, strict=True):
                load_weights(network, file, inside=True)
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
