"""Attacks: (model, inputs, targets) -> adversarial inputs."""

from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.fgsm import FGSM, RFGSM, FastFGSM
from lightning_trust.attacks.pgd import MIFGSM, PGD

__all__ = ["FGSM", "MIFGSM", "PGD", "RFGSM", "Attack", "FastFGSM", "Problem"]
