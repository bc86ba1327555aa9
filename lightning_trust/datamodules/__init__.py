"""LightningDataModules and the data sets, splits and transforms that they are made of."""

from __future__ import annotations

from lightning_trust.datamodules.adversarial import (
    CXRDataModule,
    PseudoLabeledData,
    RepeatBatches,
    ShortcutFashionMNIST,
    pseudo_labels,
)
from lightning_trust.datamodules.cifar import CIFAR10
from lightning_trust.datamodules.digits import Digits
from lightning_trust.datamodules.fashion_mnist import FashionMNIST
from lightning_trust.datamodules.image_rows import ImageRows, ImageRowsDataModule, RandomShiftFlip
from lightning_trust.datamodules.language import (
    ByteTokenizer,
    CodeCorpus,
    CodeOrProse,
    LabeledText,
    PromptedText,
    TextDataModule,
    TokenRows,
    make_tokenizer,
)
from lightning_trust.datamodules.prompting import (
    FeatureMappingPruner,
    GradNormPruner,
    LabelMappingPruner,
    ModeratePruner,
    PrunedDataModule,
    PrunedDataset,
    PruneResult,
    RandomClassPruner,
    RotatedFashionMNIST,
    SourcePruner,
    extract_features,
    remap_labels,
)
from lightning_trust.datamodules.unlearning import ForgetClass, ForgetIndices, ForgetRandom, ForgetSplit
from lightning_trust.datamodules.zeroth_order import (
    HJB20,
    BlackScholes1D,
    CollocationPoints,
    ElementDensityDataModule,
    Heat,
    OscillatorDataModule,
    PDEDataModule,
    PDEProblem,
    Poisson,
    crystal_density,
    oscillator_trajectory,
)

__all__ = [
    "CIFAR10",
    "HJB20",
    "BlackScholes1D",
    "ByteTokenizer",
    "CXRDataModule",
    "CodeCorpus",
    "CodeOrProse",
    "CollocationPoints",
    "Digits",
    "ElementDensityDataModule",
    "FashionMNIST",
    "FeatureMappingPruner",
    "ForgetClass",
    "ForgetIndices",
    "ForgetRandom",
    "ForgetSplit",
    "GradNormPruner",
    "Heat",
    "ImageRows",
    "ImageRowsDataModule",
    "LabelMappingPruner",
    "LabeledText",
    "ModeratePruner",
    "OscillatorDataModule",
    "PDEDataModule",
    "PDEProblem",
    "Poisson",
    "PromptedText",
    "PruneResult",
    "PrunedDataModule",
    "PrunedDataset",
    "PseudoLabeledData",
    "RandomClassPruner",
    "RandomShiftFlip",
    "RepeatBatches",
    "RotatedFashionMNIST",
    "ShortcutFashionMNIST",
    "SourcePruner",
    "TextDataModule",
    "TokenRows",
    "crystal_density",
    "extract_features",
    "make_tokenizer",
    "oscillator_trajectory",
    "pseudo_labels",
    "remap_labels",
]
