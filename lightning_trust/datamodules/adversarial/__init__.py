"""Data for adversarial training."""

from lightning_trust.datamodules.adversarial.pseudo_labeled_data import PseudoLabeledData, pseudo_labels
from lightning_trust.datamodules.adversarial.repeat_batches import RepeatBatches

__all__ = ["PseudoLabeledData", "RepeatBatches", "pseudo_labels"]
