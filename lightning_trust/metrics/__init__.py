"""torchmetrics metrics."""

from lightning_trust.metrics.expert_routing import ExpertUtilisation, RouterRobustness
from lightning_trust.metrics.membership_inference import MembershipInference
from lightning_trust.metrics.robust_accuracy import RobustAccuracy

__all__ = ["ExpertUtilisation", "MembershipInference", "RobustAccuracy", "RouterRobustness"]
