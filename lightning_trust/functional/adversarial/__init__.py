"""Adversarial robustness: projections, losses and objectives."""

from lightning_trust.functional.adversarial.losses import dlr_loss, dlr_loss_targeted, kl_divergence, margin
from lightning_trust.functional.adversarial.projections import (
    linear_minimiser,
    norm_of,
    project_l1,
    project_l1_box,
    project_l2,
    project_linf,
)

__all__ = [
    "dlr_loss",
    "dlr_loss_targeted",
    "kl_divergence",
    "linear_minimiser",
    "margin",
    "norm_of",
    "project_l1",
    "project_l1_box",
    "project_l2",
    "project_linf",
]
