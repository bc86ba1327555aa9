"""torchmetrics metrics."""

from lightning_trust.metrics.membership_inference import MembershipInference

__all__ = ["MembershipInference"]
