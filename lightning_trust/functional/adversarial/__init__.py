"""Adversarial robustness: projections, losses and objectives."""

from lightning_trust.functional.adversarial.confidence import wilson_interval
from lightning_trust.functional.adversarial.cosine_basis import dct_matrix
from lightning_trust.functional.adversarial.curve import (
    best_positions,
    bezier_coefficients,
    curve_coefficients,
    loss_barrier,
    polychain_coefficients,
)
from lightning_trust.functional.adversarial.grad_align import gradient_misalignment
from lightning_trust.functional.adversarial.group_bootstrap import group_bootstrap_interval
from lightning_trust.functional.adversarial.losses import dlr_loss, dlr_loss_targeted, kl_divergence, margin
from lightning_trust.functional.adversarial.mart import mart_loss
from lightning_trust.functional.adversarial.projections import (
    hyperplane_step,
    linear_minimiser,
    norm_of,
    project_l1,
    project_l1_box,
    project_l2,
    project_linf,
)
from lightning_trust.functional.adversarial.quantisation import (
    dequantise,
    pack_codes,
    quantisation_levels,
    quantise,
    unpack_codes,
)
from lightning_trust.functional.adversarial.router_losses import balance_loss, class_mod_router_loss, expert_shares
from lightning_trust.functional.adversarial.saliency import bernoulli_kl, class_score, masked_inputs, saliency_map
from lightning_trust.functional.adversarial.trades import trades_kl

__all__ = [
    "balance_loss",
    "bernoulli_kl",
    "best_positions",
    "bezier_coefficients",
    "class_mod_router_loss",
    "class_score",
    "curve_coefficients",
    "dct_matrix",
    "dequantise",
    "dlr_loss",
    "dlr_loss_targeted",
    "expert_shares",
    "gradient_misalignment",
    "group_bootstrap_interval",
    "hyperplane_step",
    "kl_divergence",
    "linear_minimiser",
    "loss_barrier",
    "margin",
    "mart_loss",
    "masked_inputs",
    "norm_of",
    "pack_codes",
    "polychain_coefficients",
    "project_l1",
    "project_l1_box",
    "project_l2",
    "project_linf",
    "quantisation_levels",
    "quantise",
    "saliency_map",
    "trades_kl",
    "unpack_codes",
    "wilson_interval",
]
