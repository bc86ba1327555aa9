"""Splits of a training set for machine unlearning."""

from lightning_trust.datamodules.unlearning.forget_set import ForgetClass, ForgetIndices, ForgetRandom, ForgetSet
from lightning_trust.datamodules.unlearning.forget_split import ForgetSplit

__all__ = ["ForgetClass", "ForgetIndices", "ForgetRandom", "ForgetSet", "ForgetSplit"]
