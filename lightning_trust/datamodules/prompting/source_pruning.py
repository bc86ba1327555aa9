"""Which part of a source data set is worth pretraining on, given a target: pruners with one interface."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import from_first_rank, gather_rows, rank, sum_over_ranks_, world_size
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.datamodules.prompting.prune_result import PruneResult, Unit, class_labels, dataset_hash
from lightning_trust.datamodules.prompting.source_features import (
    dataset_of,
    device_of,
    features_by_batch,
    inputs_of,
    is_iterable,
    shard_in_order,
)
from lightning_trust.datamodules.rows import with_transform
from lightning_trust.functional.prompting.source_scores import (
    check_finite,
    check_no_empty_group,
    feature_mapping_evidence,
    grad_norm_scores,
    group_sums,
    label_mapping_evidence,
    moderate_rows,
    rank_groups,
)

Data = DataLoader[Any] | Dataset[Any]
Transform = Callable[[Any], Any]
#: what a source is called large from, for the number of clusters
_LARGE, _CLUSTERS_OF_LARGE = 1_000_000, 1000


class SourcePruner(ABC):
    """Base of pruners: ``fit(surrogate, source, target)`` gives a :class:`PruneResult`.

    On several ranks each reads the rows r::W, counts are summed, and all get what rank 0 chose.

    Args:
        keep_ratio: Share of classes, clusters or rows to keep, in (0, 1].
        eval_transform: Takes the place of the source's ``transform`` where its rows are measured: no augmentation.
        batch_spec: Where inputs and targets sit in a batch.
        batch_size: Rows a batch in passes over the data.

    Raises:
        ValueError: If a number is out of its range.

    """

    #: whether a target is looked at
    needs_target: ClassVar[bool] = True
    #: whether a surrogate is asked
    needs_surrogate: ClassVar[bool] = True

    def __init__(
        self,
        keep_ratio: float = 0.5,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 256,
    ) -> None:
        if isinstance(keep_ratio, bool) or not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"Expected argument `keep_ratio` to lie in (0, 1], but got {keep_ratio!r}.")
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be a positive integer, but got {batch_size}.")
        self.keep_ratio = keep_ratio
        self.eval_transform = eval_transform
        self.batch_spec = batch_spec or BatchSpec()
        self.batch_size = batch_size

    def fit(
        self, surrogate: nn.Module | Sequence[nn.Module] | None, source: Data, target: Data | None = None
    ) -> PruneResult:
        """Choose what to keep.

        Args:
            surrogate: A small network trained on the source, on the device where it shall compute; several for
                GradNormPruner, None for RandomClassPruner.
            source: The source: a map-style data set, or a loader over one, whose order does not matter.
            target: The training data of the target, likewise; its labels are not used.

        Returns:
            The result, equal on all ranks.

        Raises:
            ValueError: If the target is empty, the source lacks labels where they are needed, nothing would be kept, or
                logits or features are not finite or of the wrong shape.
            MisconfigurationException: If the source is an IterableDataset, or something that is needed was not given.

        Warns:
            UserWarning: If classes are kept to which no target image was mapped: they were chosen by what decides ties.

        """
        owner = type(self).__name__
        surrogates = [] if surrogate is None else [surrogate] if isinstance(surrogate, nn.Module) else list(surrogate)
        for name, needed, given in (
            ("surrogate", self.needs_surrogate, surrogates),
            ("target", self.needs_target, target is not None),
        ):
            if needed and not given:
                raise MisconfigurationException(f"{owner} needs argument `{name}`, but got None.")
        if is_iterable(source):
            raise MisconfigurationException(
                f"{owner} chooses rows by number, but got a source over an IterableDataset, whose rows have none."
            )
        start = time.perf_counter()
        with untouched_random_state(), ExitStack() as modes:
            for network in surrogates:
                modes.enter_context(eval_mode(network))
            result = self._select(surrogates, source, target)
        # one choice for all; rounding may differ between machines
        result = from_first_rank(result)
        object.__setattr__(result, "seconds", time.perf_counter() - start)
        rank_zero_info(f"{result}, in {result.seconds:.2f} s")
        # where all are kept, or the last ones, none was chosen by mistake
        if result.zero_scores_kept and self.keep_ratio < 1.0 and not getattr(self, "reverse", False):
            rank_zero_warn(
                f"{owner} keeps {result.zero_scores_kept} of {len(result.kept_classes)} classes to which no target"
                f" image was mapped. A smaller `keep_ratio` than {self.keep_ratio} would leave them out."
            )
        return result

    @abstractmethod
    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        """Choose, networks being in eval mode."""

    # -- for subclasses ------------------------------------------------------------------------------------------------
    def _labels(self, source: Data) -> Tensor:
        return class_labels(dataset_of(source), self.batch_spec, type(self).__name__)

    def _one(self, surrogates: list[nn.Module]) -> nn.Module:
        if len(surrogates) != 1:
            raise ValueError(f"Expected argument `surrogate` to be one network, but got {len(surrogates)}.")
        return surrogates[0]

    def _source_batches(self, source: Data) -> DataLoader[Any]:
        dataset = with_transform(dataset_of(source), self.eval_transform)
        return shard_in_order(source, dataset, self.batch_size)

    def _target_batches(self, target: Data | None) -> Iterable[Any]:
        if target is None or not is_iterable(target):
            return () if target is None else shard_in_order(target, dataset_of(target), self.batch_size)
        if world_size() > 1:
            raise MisconfigurationException(
                "A target over an IterableDataset cannot be counted once on several ranks. Choose on one rank, save the"
                " result, and read it: SourcePruning(coreset=...)."
            )
        return target if isinstance(target, DataLoader) else DataLoader(target, batch_size=self.batch_size)

    def _result(self, source: Data, unit: Unit, scores: Tensor, kept_classes: Tensor, kept_rows: Tensor) -> PruneResult:
        dataset: Any = dataset_of(source)
        return PruneResult(
            pruner=type(self).__name__,
            unit=unit,
            class_scores=scores.cpu(),
            kept_classes=kept_classes.cpu().sort().values,
            kept_indices=kept_rows.cpu().sort().values,
            source_rows=len(dataset),
            source_hash=dataset_hash(dataset, self.batch_spec),
        )

    def _count(self, whole: int, what: str) -> int:
        count = round(self.keep_ratio * whole)
        if not count:
            raise ValueError(
                f"Expected argument `keep_ratio` to leave {what}, but {self.keep_ratio} of {whole} are none."
            )
        return count

    def _keep_groups(
        self, source: Data, unit: Unit, groups: Tensor, scores: Tensor, ties: Tensor, reverse: bool
    ) -> PruneResult:
        """Keep the groups with the highest scores, or with the lowest."""
        order = rank_groups(scores, ties).cpu()
        count = self._count(len(order), "a class")
        kept = order[-count:] if reverse else order[:count]
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[kept] = True
        return self._result(source, unit, scores, kept, keep[groups.cpu()].nonzero().flatten())

    def _keep_rows(self, source: Data, labels: Tensor, rows: Tensor) -> PruneResult:
        """Keep rows; the scores of classes are how many rows they keep."""
        scores = torch.bincount(labels[rows], minlength=int(labels.max()) + 1)
        return self._result(source, "row", scores, scores.nonzero().flatten(), rows)


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
        batches = [inputs_of(batch, self.batch_spec) for batch in self._target_batches(target)]
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
        loader = DataLoader(dataset_of(source), batch_size=1)
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
        reverse: bool = False,
        seed: int = 0,
        eval_transform: Transform | None = None,
        batch_spec: BatchSpec | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(keep_ratio, eval_transform, batch_spec, batch_size)
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
        self.reverse = reverse
        self.seed = seed

    def _select(self, surrogates: list[nn.Module], source: Data, target: Data | None) -> PruneResult:
        surrogate = self._one(surrogates)
        unit: Unit = "class" if self.groups == "labels" else "cluster"
        groups = self._labels(source) if unit == "class" else None
        features = _features(surrogate, self._source_batches(source), self.layer, self.batch_spec)
        if groups is None:
            groups = self._clusters(gather_rows(features), dataset_of(source))
        count = int(groups.max()) + 1
        sums, counts = group_sums(features, groups[rank() :: world_size()].to(features.device), count)
        sum_over_ranks_([sums, counts])
        check_no_empty_group(counts)
        evidence = torch.zeros(2, count, dtype=torch.float64, device=sums.device)
        means = sums / counts[:, None]
        for found, _ in features_by_batch(surrogate, self._target_batches(target), self.layer, self.batch_spec):
            evidence += feature_mapping_evidence(means, found)
        sum_over_ranks_([evidence])
        check_target(evidence)
        return self._keep_groups(source, unit, groups, evidence[0].long(), -evidence[1], self.reverse)

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
        own = _features(self._one(surrogates), self._source_batches(source), self.layer, self.batch_spec)
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


def check_target(evidence: Tensor) -> None:
    """Raise ValueError where no target image was counted, on any rank."""
    if not int(evidence[0].sum()):
        raise ValueError("Expected argument `target` to hold images, but got none.")


def _features(model: nn.Module, batches: Iterable[Any], layer: str | None, batch_spec: BatchSpec) -> Tensor:
    """Features of this rank's rows; a rank may have none."""
    parts = [features for features, _ in features_by_batch(model, batches, layer, batch_spec)]
    if not parts:
        raise ValueError("Expected the source to hold at least a row for every rank, but got fewer.")
    return torch.cat(parts)
