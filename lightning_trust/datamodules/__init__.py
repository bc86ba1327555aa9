"""LightningDataModules and the data sets, splits and transforms that they are made of."""

from __future__ import annotations

from lightning_trust.datamodules.digits import Digits
from lightning_trust.datamodules.fashion_mnist import FashionMNIST
from lightning_trust.datamodules.image_rows import ImageRows, ImageRowsDataModule, RandomShiftFlip

__all__ = ["Digits", "FashionMNIST", "ImageRows", "ImageRowsDataModule", "RandomShiftFlip"]
