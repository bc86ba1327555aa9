"""torchmetrics metrics."""

from lightning_trust.metrics.expert_routing import ExpertUtilisation, RouterRobustness
from lightning_trust.metrics.group_bootstrap import GroupBootstrap
from lightning_trust.metrics.group_fairness import DemographicParityGap, EqualizedOddsGap, WorstGroupAccuracy
from lightning_trust.metrics.macro_auroc import MacroAUROC
from lightning_trust.metrics.membership_inference import MembershipInference
from lightning_trust.metrics.relative_l2 import RelativeL2
from lightning_trust.metrics.robust_accuracy import RobustAccuracy
from lightning_trust.metrics.saliency_fidelity import SaliencyFidelity
from lightning_trust.metrics.saliency_mass import SaliencyMass
from lightning_trust.metrics.shortcut_reliance import ShortcutReliance

__all__ = [
    "DemographicParityGap",
    "EqualizedOddsGap",
    "ExpertUtilisation",
    "GroupBootstrap",
    "MacroAUROC",
    "MembershipInference",
    "RelativeL2",
    "RobustAccuracy",
    "RouterRobustness",
    "SaliencyFidelity",
    "SaliencyMass",
    "ShortcutReliance",
    "WorstGroupAccuracy",
]
