"""Which rows of a source data set to keep whatever the target: baselines beside a choice of classes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import gather_rows, rank, world_size
from lightning_trust.datamodules.prompting.prune_result import PruneResult
from lightning_trust.datamodules.prompting.source_features import device_of, inputs_of
from lightning_trust.datamodules.prompting.source_pruner import Data, SourcePruner, Transform, source_features
from lightning_trust.functional.prompting.source_scores import (
    check_finite,
    grad_norm_scores,
    moderate_rows,
    rank_groups,
)


class ModeratePruner(SourcePruner):
    """Keep of each class the rows that are neither near to its median nor far from it, whatever the target.

    Paper: Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient Deep Learning (ICLR
    2023); see :func:`lightning_trust.functional.prompting.moderate_rows`.

    Args:
        keep_ratio: Share of the rows of each class to keep, in (0, 1].
        layer: Where features are taken; see :func:`extract_features`.
        eval_transform: Takes the place of the source's ``transform`` where its rows are measured: no augmentation.
        batch_spec: Where inputs and targets sit in a batch.
        batch_size: Rows a batch.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> source = TensorDataset(torch.tensor([[0.0], [1.0], [2.0], [4.0], [20.0]]), torch.zeros(5).long())
        >>> ModeratePruner(0.6, layer="").fit(nn.Identity(), source).kept_indices
        tensor([0, 1, 3])

    """

    needs_target = False

    def __init__(
        self,
        keep_ratio: float = 0.5,
        layer: str | None = None,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(keep_ratio, eval_transform, batch_spec, batch_size)
        self.layer = layer

    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        labels = self._labels(source)
        own = source_features(self._one(surrogates), self._source_batches(source), self.layer, self.batch_spec)
        features = check_finite(gather_rows(own).cpu(), "features of the source")
        return self._keep_rows(source, labels, moderate_rows(features, labels, self.keep_ratio))


class GradNormPruner(SourcePruner):
    r"""Keep the rows with the largest gradients early in training (GraNd), whatever the target.

    Paper: Deep Learning on a Data Diet: Finding Important Examples Early in Training (NeurIPS 2021, arXiv:2107.07075):
    the mean of :math:`\|\nabla_\theta \ell(f_\theta(x_i), y_i)\|_2` over networks. There, ten seeds; five in DP4TL,
    after at most four epochs. Of equal rows the first are kept.

    Args:
        keep_ratio: Share of the rows to keep, in (0, 1].
        eval_transform: Takes the place of the source's ``transform`` where its rows are measured: no augmentation.
        batch_spec: Where inputs and targets sit in a batch.
        batch_size: Rows a batch; as many gradients are in memory at a time.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> layer = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        >>> source = TensorDataset(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 1, 1]))
        >>> GradNormPruner(0.67).fit([layer, layer], source).kept_indices
        tensor([1, 2])

    """

    needs_target = False

    def __init__(
        self,
        keep_ratio: float = 0.5,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(keep_ratio, eval_transform, batch_spec, batch_size)

    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        labels = self._labels(source)
        # batches of this rank hold its rows in order
        own_labels = labels[rank() :: world_size()].split(self.batch_size)
        found = []
        for batch, targets in zip(self._source_batches(source), own_labels, strict=True):
            inputs = inputs_of(batch, self.batch_spec)
            norms = [
                grad_norm_scores(network, inputs.to(device_of(network)), targets.to(device_of(network))).cpu()
                for network in surrogates
            ]
            found.append(torch.stack(norms).mean(dim=0))
        scores = check_finite(gather_rows(torch.cat(found or [torch.zeros(0)])), "norms of gradients")
        count = self._count(len(scores), "a row")
        return self._keep_rows(source, labels, rank_groups(scores, torch.zeros_like(scores))[:count].sort().values)
