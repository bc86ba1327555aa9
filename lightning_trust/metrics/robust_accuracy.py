"""Robust accuracy under several attacks as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class RobustAccuracy(Metric):
    r"""Share of samples that are classified correctly: clean, under each attack, and under all of them.

    .. math:: \mathrm{acc}_a = \frac1n \sum_i 1[f(x_i^{(a)}) = y_i], \qquad
        \mathrm{acc}_{\mathrm{union}} = \frac1n \sum_i \min_a 1[f(x_i^{(a)}) = y_i]

    A sample that is missed clean counts as not robust. Every sample counts once, by its key, however often a sampler
    deals it to pad the last batch of a rank.

    Args:
        attacks: Names of the attacks.

    Raises:
        ValueError: If there is no attack, a name comes twice, or one is called ``"clean"`` or ``"union"``.

    Example:
        >>> metric = RobustAccuracy(["fgsm", "pgd"])
        >>> clean, held = torch.tensor([True, True, False, True]), torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1]]).bool()
        >>> metric.update(torch.arange(4), clean, held)
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'clean': 0.75, 'fgsm': 0.5, 'pgd': 0.5, 'union': 0.25}

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    keys: list[Tensor]
    verdicts: list[Tensor]

    def __init__(self, attacks: Sequence[str]) -> None:
        super().__init__()
        check_names(attacks)
        self.attacks = list(attacks)
        #: number of samples behind the last ``compute``, each once
        self.samples = 0
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("verdicts", default=[], dist_reduce_fx="cat")

    def update(self, keys: Tensor, clean: Tensor, held: Tensor) -> None:
        """Add samples.

        Args:
            keys: What tells the samples apart, int64, shape ``(N,)``.
            clean: Whether the clean input is classified correctly, boolean, shape ``(N,)``.
            held: Whether the prediction under each attack is correct, boolean, shape ``(N, A)``.

        Raises:
            ValueError: If the shapes do not fit.

        """
        if held.shape != (len(keys), len(self.attacks)) or clean.shape != keys.shape:
            raise ValueError(
                f"Expected arguments `clean` and `held` to have shapes ({len(keys)},) and"
                f" ({len(keys)}, {len(self.attacks)}), but got {tuple(clean.shape)} and {tuple(held.shape)}."
            )
        self.keys.append(keys.long())
        self.verdicts.append(torch.cat([clean[:, None], held & clean[:, None]], dim=1))

    def table(self) -> tuple[Tensor, Tensor]:
        """Each sample once, by key: keys ``(n,)`` ascending and verdicts ``(n, 1 + A)``, clean first."""
        if not len(self.keys):
            return torch.empty(0, dtype=torch.long), torch.empty(0, 1 + len(self.attacks), dtype=torch.bool)
        keys, verdicts = dim_zero_cat(self.keys), dim_zero_cat(self.verdicts)
        order = keys.argsort(stable=True)
        keys, verdicts = keys[order], verdicts[order]
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        return keys[first], verdicts[first].bool()

    def compute(self) -> dict[str, Tensor]:
        """Accuracies in [0, 1] by name; NaN where there was no sample."""
        _, verdicts = self.table()
        self.samples = len(verdicts)
        columns = ["clean", *self.attacks]
        shares = verdicts.double().mean(dim=0).float()
        return {**dict(zip(columns, shares, strict=True)), "union": verdicts.all(dim=1).double().mean().float()}


def check_names(attacks: Sequence[str]) -> None:
    """Raise ValueError where attacks cannot be told apart by these names."""
    names = list(attacks)
    if not names:
        raise ValueError("Expected argument `attacks` to name at least one attack, but got none.")
    if len(set(names)) != len(names) or {"clean", "union"} & set(names):
        raise ValueError(
            f"Expected argument `attacks` to have different names other than 'clean' and 'union', but got {names}."
        )
