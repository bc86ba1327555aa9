"""Attacks: (model, inputs, targets) -> adversarial inputs."""

from lightning_trust.attacks.apgd import APGD, APGDTargeted
from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.auto_attack import AutoAttack, AutoAttackResult
from lightning_trust.attacks.carlini_wagner import CWL2
from lightning_trust.attacks.deepfool import DeepFool
from lightning_trust.attacks.external import ExternalAttack
from lightning_trust.attacks.fab import FAB
from lightning_trust.attacks.fgsm import FGSM, RFGSM, FastFGSM
from lightning_trust.attacks.gradient_masking import GradientMaskingWarning, check_gradient_masking
from lightning_trust.attacks.msd import MSD
from lightning_trust.attacks.pgd import MIFGSM, PGD
from lightning_trust.attacks.planted_weakness import PlantedWeakness, SelfTest, find_planted_weakness
from lightning_trust.attacks.routed import RoutedPGD
from lightning_trust.attacks.search import SearchAttack
from lightning_trust.attacks.simba import SimBA
from lightning_trust.attacks.square import Square
from lightning_trust.attacks.without_prompt import WithoutPrompt
from lightning_trust.attacks.worst_of import WorstOf
from lightning_trust.attacks.zeroth_order import NES, ZOSignAttack

__all__ = [
    "APGD",
    "CWL2",
    "FAB",
    "FGSM",
    "MIFGSM",
    "MSD",
    "NES",
    "PGD",
    "RFGSM",
    "APGDTargeted",
    "Attack",
    "AutoAttack",
    "AutoAttackResult",
    "DeepFool",
    "ExternalAttack",
    "FastFGSM",
    "GradientMaskingWarning",
    "PlantedWeakness",
    "Problem",
    "RoutedPGD",
    "SearchAttack",
    "SelfTest",
    "SimBA",
    "Square",
    "WithoutPrompt",
    "WorstOf",
    "ZOSignAttack",
    "check_gradient_masking",
    "find_planted_weakness",
]
