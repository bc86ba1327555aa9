"""The network, the samples and the arguments of the golden tensors, for the script that makes them and their test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_trust.attacks import CWL2, FGSM, MIFGSM, PGD, RFGSM, DeepFool, FastFGSM
from lightning_trust.core.randomness import SampleDraws

FILE = Path(__file__).parent / "golden" / "torchattacks.safetensors"

#: name -> our attack, and the class and arguments of torchattacks
CASES = {
    "fgsm": (FGSM(eps=0.1), "FGSM", {"eps": 0.1}),
    "fast_fgsm": (FastFGSM(eps=0.1, step_size=0.125), "FFGSM", {"eps": 0.1, "alpha": 0.125}),
    "rfgsm": (RFGSM(eps=0.1, step_size=0.05, steps=3), "RFGSM", {"eps": 0.1, "alpha": 0.05, "steps": 3}),
    "pgd_linf": (PGD(eps=0.1, step_size=0.03, steps=7), "PGD", {"eps": 0.1, "alpha": 0.03, "steps": 7}),
    "pgd_linf_clean_start": (
        PGD(eps=0.1, step_size=0.03, steps=7, random_start=False),
        "PGD",
        {"eps": 0.1, "alpha": 0.03, "steps": 7, "random_start": False},
    ),
    "pgd_l2": (
        PGD(eps=0.5, step_size=0.15, steps=7, norm="l2"),
        "PGDL2",
        {"eps": 0.5, "alpha": 0.15, "steps": 7},
    ),
    "mifgsm": (MIFGSM(eps=0.1, step_size=0.03, steps=5), "MIFGSM", {"eps": 0.1, "alpha": 0.03, "steps": 5}),
    "cw": (CWL2(c=1.0, steps=30, lr=0.02), "CW", {"c": 1.0, "kappa": 0, "steps": 30, "lr": 0.02}),
    "deepfool": (DeepFool(steps=20), "DeepFool", {"steps": 20, "overshoot": 0.02}),
}


class Network(nn.Module):
    """A smooth network in float64 with fixed weights and positive logits.

    Smooth and in double precision: no kink amplifies rounding. Positive: the C&W of torchattacks takes 0 for the logit
    of the true class when it looks for the largest other one.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.first = nn.Parameter(draw(16, 12) / 4)
        self.second = nn.Parameter(draw(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 1, 4, 4)`` -> logits ``(N, 5)``."""
        return 10.0 + torch.tanh((x.to(self.first.dtype) - 0.5).flatten(1) @ self.first * 4) @ self.second


def samples() -> tuple[Tensor, Tensor]:
    """Eight images off the faces of the box, and the classes that the network gives them."""
    generator = torch.Generator().manual_seed(12)
    images = 0.1 + 0.8 * torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, Network()(images).argmax(dim=1)


class GivenDraws(SampleDraws):
    """Draws whose numbers are given, so that two libraries start from the same point."""

    def __init__(self, rows: int) -> None:
        super().__init__(torch.arange(rows), 0)
        generator = torch.Generator().manual_seed(13)
        self.numbers = {
            kind: torch.rand(rows, 16, generator=generator, dtype=torch.float64)
            if kind == "uniform"
            else torch.randn(rows, 16, generator=generator, dtype=torch.float64)
            for kind in ("uniform", "normal")
        }
        self.radius = torch.rand(rows, generator=generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """The numbers given; without a shape, one radius a sample."""
        return self.numbers["uniform"].view(-1, *shape) if shape else self.radius

    def normal(self, *shape: int) -> Tensor:
        """The numbers given."""
        return self.numbers["normal"].view(-1, *shape)

    def signs(self, *shape: int) -> Tensor:
        """Signs of the normal numbers."""
        return self.normal(*shape).sign()
