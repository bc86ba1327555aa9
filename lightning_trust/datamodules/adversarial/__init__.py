"""Data for adversarial training."""

from lightning_trust.datamodules.adversarial.repeat_batches import RepeatBatches

__all__ = ["RepeatBatches"]
