"""Prompting: source tasks, and what a source data set is pruned to before a network is pretrained on it."""

from lightning_trust.datamodules.prompting.biased_fashion_mnist import BiasedFashionMNIST, GroupedImageRows
from lightning_trust.datamodules.prompting.captions import CaptionedRows, FashionMNISTCaptions
from lightning_trust.datamodules.prompting.celeba import CelebA
from lightning_trust.datamodules.prompting.diabetes import Diabetes
from lightning_trust.datamodules.prompting.fashion_mnist_subset import (
    FashionMNISTSubset,
)
from lightning_trust.datamodules.prompting.prune_result import PruneResult
from lightning_trust.datamodules.prompting.pruned_data import PrunedDataModule, PrunedDataset, remap_labels
from lightning_trust.datamodules.prompting.rotated_fashion_mnist import RotatedFashionMNIST
from lightning_trust.datamodules.prompting.row_pruning import GradNormPruner, ModeratePruner
from lightning_trust.datamodules.prompting.source_features import extract_features
from lightning_trust.datamodules.prompting.source_pruner import SourcePruner
from lightning_trust.datamodules.prompting.source_pruning import (
    ClassMeanPruner,
    FeatureMappingPruner,
    LabelMappingPruner,
    RandomClassPruner,
)

__all__ = [
    "BiasedFashionMNIST",
    "CaptionedRows",
    "CelebA",
    "ClassMeanPruner",
    "Diabetes",
    "FashionMNISTCaptions",
    "FashionMNISTSubset",
    "FeatureMappingPruner",
    "GradNormPruner",
    "GroupedImageRows",
    "LabelMappingPruner",
    "ModeratePruner",
    "PruneResult",
    "PrunedDataModule",
    "PrunedDataset",
    "RandomClassPruner",
    "RotatedFashionMNIST",
    "SourcePruner",
    "extract_features",
    "remap_labels",
]
