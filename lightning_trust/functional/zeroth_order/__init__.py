"""Zeroth-order training: gradients from values alone."""

from lightning_trust.functional.zeroth_order.deepzero import (
    grasp_masks,
    grasp_scores,
    layer_pruning_ratios,
    zo_grasp_scores,
)
from lightning_trust.functional.zeroth_order.estimates import (
    DISTRIBUTIONS,
    Distribution,
    central_difference_gradient,
    coordinate_gradient,
    draw_direction_,
    forward_difference_gradient,
    forward_gradient,
    signal_to_noise,
)
from lightning_trust.functional.zeroth_order.sparse_grid import (
    PointDerivatives,
    count_grid_nodes,
    smolyak_gauss_hermite,
    smoothed_derivatives,
)
from lightning_trust.functional.zeroth_order.tensor_train import (
    Contraction,
    contraction,
    largest_ranks,
    tt_linear,
    tt_matrix,
    tt_svd,
)
from lightning_trust.functional.zeroth_order.vector_jacobian import VJPEstimate, coordinate_vjp, random_vjp

__all__ = [
    "DISTRIBUTIONS",
    "Contraction",
    "Distribution",
    "PointDerivatives",
    "VJPEstimate",
    "central_difference_gradient",
    "contraction",
    "coordinate_gradient",
    "coordinate_vjp",
    "count_grid_nodes",
    "draw_direction_",
    "forward_difference_gradient",
    "forward_gradient",
    "grasp_masks",
    "grasp_scores",
    "largest_ranks",
    "layer_pruning_ratios",
    "random_vjp",
    "signal_to_noise",
    "smolyak_gauss_hermite",
    "smoothed_derivatives",
    "tt_linear",
    "tt_matrix",
    "tt_svd",
    "zo_grasp_scores",
]
