"""Attacks: (model, inputs, targets) -> adversarial inputs."""

from lightning_trust.attacks.apgd import APGD, APGDTargeted
from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.auto_attack import AutoAttack, AutoAttackResult
from lightning_trust.attacks.fab import FAB
from lightning_trust.attacks.fgsm import FGSM, RFGSM, FastFGSM
from lightning_trust.attacks.pgd import MIFGSM, PGD
from lightning_trust.attacks.search import SearchAttack
from lightning_trust.attacks.square import Square

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "RFGSM",
    "APGDTargeted",
    "Attack",
    "AutoAttack",
    "AutoAttackResult",
    "FastFGSM",
    "Problem",
    "SearchAttack",
    "Square",
]
