"""Which classes of a source data set are worth pretraining on, given a target."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_first_rank, gather_rows, rank, sum_over_ranks_, world_size
from lightning_trust.datamodules.prompting.prune_result import PruneResult, Unit, class_labels
from lightning_trust.datamodules.prompting.source_features import (
    dataset_of,
    device_of,
    features_by_batch,
    inputs_of,
    is_iterable,
)
from lightning_trust.datamodules.prompting.source_pruner import (
    Data,
    SourcePruner,
    Transform,
    check_target,
    source_features,
)
from lightning_trust.functional.prompting.source_scores import (
    check_finite,
    check_no_empty_group,
    feature_mapping_evidence,
    group_means,
    group_sums,
    label_mapping_evidence,
    moderate_rows,
)

#: what a source is called large from, for the number of clusters
_LARGE, _CLUSTERS_OF_LARGE = 1_000_000, 1000


class LabelMappingPruner(SourcePruner):
    r"""Keep the source classes that a classifier of the source sees most often in the target (LM).

    Paper: Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning (NeurIPS 2023). One
    forward pass of the target through a small classifier, in eval mode; the labels of the target are not used:

    .. math:: s_k = |\{i : \arg\max_j f_j(x_i) = k\}|

    Kept are the :math:`\mathrm{round}(r K)` classes with the highest scores. Of equal scores that with the higher total
    probability over the target is first, then the lower class.

    Args:
        num_source: Number of source classes :math:`K`, the width of the logits; that of the logits if None.
        keep_ratio: Share :math:`r` of the classes to keep, in (0, 1].
        reverse: Whether to keep the classes with the lowest scores, as a control.
        eval_transform: Not used, for rows of the source are not looked at.
        batch_spec: Where inputs and targets sit in a batch.
        batch_size: Rows a batch.

    Raises:
        ValueError: If a number is out of its range; in ``fit``, if logits are of another width, or labels of the source
            are not in [0, K).

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> source = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 3]))
        >>> target = TensorDataset(torch.eye(4)[[2, 2, 1]], torch.zeros(3))
        >>> LabelMappingPruner(4, keep_ratio=0.5).fit(nn.Identity(), source, target).kept_classes
        tensor([1, 2])

    """

    def __init__(
        self,
        num_source: int | None = None,
        keep_ratio: float = 0.5,
        reverse: bool = False,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(keep_ratio, eval_transform, batch_spec, batch_size)
        if num_source is not None and num_source < 1:
            raise ValueError(f"Expected argument `num_source` to be a positive integer, but got {num_source}.")
        self.num_source = num_source
        self.reverse = reverse

    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        surrogate, labels = self._one(surrogates), self._labels(source)
        batches = (inputs_of(batch, self.batch_spec) for batch in self._target_batches(target))
        width = self.num_source or self._width(surrogate, source)
        if len(labels) and int(labels.max()) >= width:
            raise ValueError(
                f"Expected labels of the source to lie in [0, {width}), the classes of the surrogate, but got"
                f" {int(labels.max())}."
            )
        evidence = label_mapping_evidence(surrogate, batches, width)
        sum_over_ranks_([evidence])
        check_target(evidence)
        return self._keep_groups(source, "class", labels, evidence[0].long(), evidence[1], self.reverse)

    @torch.no_grad()
    def _width(self, surrogate: nn.Module, source: Data) -> int:
        # of a row of the source, which every rank has
        collate = source.collate_fn if isinstance(source, DataLoader) else None
        loader = DataLoader(dataset_of(source), batch_size=1, collate_fn=collate)
        row = inputs_of(next(iter(loader)), self.batch_spec).to(device_of(surrogate))
        return int(surrogate(row).shape[-1])


class FeatureMappingPruner(SourcePruner):
    r"""Keep the source classes, or clusters, whose mean features are nearest to most of the target (FM).

    Paper: Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning (NeurIPS 2023). For
    surrogates without a classifier of the source, such as self-supervised ones, and sources without labels:

    .. math:: s_g = |\{i : \arg\min_h \|\phi(x_i) - \mu_h\|_2 = g\}|

    Kept are the :math:`\mathrm{round}(r G)` groups with the highest scores. Of equal scores that with the smaller mean
    distance to the target is first, then the lower number.

    Args:
        keep_ratio: Share :math:`r` of the groups to keep, in (0, 1].
        groups: ``"labels"``, the classes of the source; or ``"kmeans"``, clusters of its features, which need no
            labels.
        n_clusters: Number of clusters. If None, 1000 for a source of a million rows or more, else as many as it says
            it has ``classes``, else the square root of the number of its rows.
        layer: Where features are taken; see :func:`extract_features`. ``""`` for a surrogate that gives features.
        middle: Share of the rows of each group over which its mean is taken, in (0, 1]: those whose distance to the
            group's median is neither small nor large. 1 for all, as in the paper.
        reverse: Whether to keep the groups with the lowest scores, as a control.
        seed: Seed of the clustering.
        eval_transform: Takes the place of the source's ``transform`` where its rows are measured: no augmentation.
        batch_spec: Where inputs and targets sit in a batch.
        batch_size: Rows a batch.

    Raises:
        ValueError: If an argument is out of its range; in ``fit``, if a class of the source has no rows, or there are
            more clusters than rows.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> source = TensorDataset(torch.tensor([[0.0], [1.0], [9.0], [5.0]]), torch.tensor([0, 0, 1, 2]))
        >>> target = TensorDataset(torch.tensor([[6.0], [7.5], [4.0]]))
        >>> FeatureMappingPruner(0.3, layer="").fit(nn.Identity(), source, target).kept_indices
        tensor([3])

    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        groups: Literal["labels", "kmeans"] = "labels",
        n_clusters: int | None = None,
        layer: str | None = None,
        middle: float = 1.0,
        reverse: bool = False,
        seed: int = 0,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(keep_ratio, eval_transform, batch_spec, batch_size)
        if not 0.0 < middle <= 1.0:
            raise ValueError(f"Expected argument `middle` to lie in (0, 1], but got {middle}.")
        if groups not in ("labels", "kmeans"):
            raise ValueError(f"Expected argument `groups` to be 'labels' or 'kmeans', but got {groups!r}.")
        if n_clusters is not None and (n_clusters < 1 or groups == "labels"):
            raise ValueError(
                "Expected argument `n_clusters` to be a positive integer, and groups='kmeans', but got"
                f" {n_clusters} and groups={groups!r}."
            )
        self.groups = groups
        self.n_clusters = n_clusters
        self.layer = layer
        self.middle = middle
        self.reverse = reverse
        self.seed = seed

    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        surrogate = self._one(surrogates)
        unit: Unit = "class" if self.groups == "labels" else "cluster"
        groups = self._labels(source) if unit == "class" else None
        features = source_features(surrogate, self._source_batches(source), self.layer, self.batch_spec)
        if groups is None:
            groups = self._clusters(gather_rows(features), dataset_of(source))
        means = self._means(features, groups)
        evidence = torch.zeros(2, len(means), dtype=torch.float64, device=means.device)
        for found, _ in features_by_batch(surrogate, self._target_batches(target), self.layer, self.batch_spec):
            evidence += feature_mapping_evidence(means, found)
        sum_over_ranks_([evidence])
        check_target(evidence)
        return self._keep_groups(source, unit, groups, evidence[0].long(), -evidence[1], self.reverse)

    def _means(self, features: Tensor, groups: Tensor) -> Tensor:
        """Means of the groups from this rank's features and all rows' groups."""
        if self.middle < 1.0:
            features, groups = gather_rows(features), groups.to(features.device)
            rows = moderate_rows(check_finite(features, "features of the source"), groups, self.middle)
            return group_means(features[rows], groups[rows], int(groups.max()) + 1)
        return means_over_ranks(features, groups)

    def _clusters(self, features: Tensor, dataset: Any) -> Tensor:
        """Cluster of each row; one clustering for all ranks."""
        rows, count = len(features), self.n_clusters
        if count is None:
            named = len(getattr(dataset, "classes", ()))
            count = _CLUSTERS_OF_LARGE if rows >= _LARGE else named or max(1, round(rows**0.5))
        if count > rows:
            raise ValueError(f"Expected argument `n_clusters` to be at most the {rows} rows, but got {count}.")
        check_finite(features, "features of the source")
        found = None
        if rank() == 0:
            from sklearn.cluster import KMeans

            found = torch.from_numpy(
                KMeans(count, n_init=1, random_state=self.seed).fit_predict(features.cpu().numpy())
            )
        clusters: Tensor = from_first_rank(found)
        return clusters.long()


class ClassMeanPruner(SourcePruner):
    r"""Keep the source classes whose mean features are nearest to those of the target's classes on average.

    A baseline beside feature mapping, which needs labels of the target: with the means :math:`\nu_c` of its :math:`C`
    classes, the score of a source class is

    .. math:: s_k = -\frac1C \sum_c \|\mu_k - \nu_c\|_2

    Args:
        keep_ratio: Share of the classes to keep, in (0, 1].
        layer: Where features are taken; see :func:`extract_features`.
        eval_transform: Takes the place of the source's ``transform`` where its rows are measured: no augmentation.
        batch_spec: Where inputs and targets sit in a batch, of the source and of the target.
        batch_size: Rows a batch.

    Raises:
        ValueError: If a number is out of its range; in ``fit``, if a class has no rows, or labels are missing.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> source = TensorDataset(torch.tensor([[0.0], [1.0], [9.0], [5.0]]), torch.tensor([0, 0, 1, 2]))
        >>> target = TensorDataset(torch.tensor([[6.0], [8.0], [4.0]]), torch.tensor([0, 0, 1]))
        >>> ClassMeanPruner(0.3, layer="").fit(nn.Identity(), source, target).class_scores.tolist()
        [-5.0, -3.5, -1.5]

    """

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
        surrogate, labels = self._one(surrogates), self._labels(source)
        if target is None or is_iterable(target):
            raise MisconfigurationException(
                "ClassMeanPruner reads the labels of the target by number, but got an IterableDataset, whose rows have"
                " none."
            )
        theirs = class_labels(dataset_of(target), self.batch_spec, "ClassMeanPruner")
        means = [
            means_over_ranks(source_features(surrogate, batches, self.layer, self.batch_spec), groups)
            for batches, groups in (
                (self._source_batches(source), labels),
                (self._target_batches(target), theirs.unique(return_inverse=True)[1]),
            )
        ]
        scores = -torch.cdist(means[0], means[1], compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)
        return self._keep_groups(source, "class", labels, scores, torch.zeros_like(scores), reverse=False)


class RandomClassPruner(SourcePruner):
    """Keep source classes drawn at random, beside which a choice for a target is to be seen.

    Args:
        keep_ratio: Share of the classes to keep, in (0, 1]; of one seed, fewer are a part of more.
        seed: Seed of the draw.
        batch_spec: Where targets sit in a sample, for data sets without ``targets``.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> source = TensorDataset(torch.zeros(8, 1), torch.arange(8) % 4)
        >>> len(RandomClassPruner(0.5, seed=1).fit(None, source).kept_indices)
        4

    """

    needs_target = False
    needs_surrogate = False

    def __init__(self, keep_ratio: float = 0.5, seed: int = 0, batch_spec: BatchSpec | None = None) -> None:
        super().__init__(keep_ratio, None, batch_spec)
        self.seed = seed

    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        labels = self._labels(source)
        classes = int(labels.max()) + 1
        # 1 is the lowest place: a score of 0 would mean that no target image was mapped there
        places = torch.randperm(classes, generator=torch.Generator().manual_seed(self.seed)) + 1
        return self._keep_groups(source, "class", labels, places, torch.zeros(classes), reverse=False)


def means_over_ranks(features: Tensor, groups: Tensor) -> Tensor:
    """Means of all groups from this rank's features (rows r::W) and all rows' groups."""
    own = groups[rank() :: world_size()].to(features.device)
    sums, counts = group_sums(features, own, int(groups.max()) + 1)
    sum_over_ranks_([sums, counts])
    check_no_empty_group(counts)
    return sums / counts[:, None]
