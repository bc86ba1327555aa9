"""Data for adversarial training."""

from lightning_trust.datamodules.adversarial.chest_xray import CXRDataModule
from lightning_trust.datamodules.adversarial.pseudo_labeled_data import PseudoLabeledData, pseudo_labels
from lightning_trust.datamodules.adversarial.repeat_batches import RepeatBatches
from lightning_trust.datamodules.adversarial.shortcut_fashion_mnist import ShortcutFashionMNIST

__all__ = ["CXRDataModule", "PseudoLabeledData", "RepeatBatches", "ShortcutFashionMNIST", "pseudo_labels"]
