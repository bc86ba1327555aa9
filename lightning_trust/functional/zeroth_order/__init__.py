"""Zeroth-order training: gradients from values alone."""

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

__all__ = [
    "DISTRIBUTIONS",
    "Distribution",
    "central_difference_gradient",
    "coordinate_gradient",
    "draw_direction_",
    "forward_difference_gradient",
    "forward_gradient",
    "signal_to_noise",
]
