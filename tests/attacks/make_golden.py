"""Make the golden tensors of the attacks with torchattacks 3.5.1: python -m tests.attacks.make_golden."""

from __future__ import annotations

import importlib
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.attacks.golden_cases import CASES, FILE, GivenDraws, Network, samples


def reference(name: str) -> Tensor:
    """What torchattacks finds from the start that :class:`GivenDraws` gives."""
    torchattacks = importlib.import_module("torchattacks")
    _, kind, arguments = CASES[name]
    images, targets = samples()
    draws = GivenDraws(len(images))
    network = Network().eval()

    # torchattacks draws its starts in place, with these methods of a tensor and this function
    def uniform_(self: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        numbers = draws.radius if self.numel() == len(images) else draws.numbers["uniform"]
        return self.copy_(low + (high - low) * numbers.view_as(self))

    def normal_(self: Tensor) -> Tensor:
        return self.copy_(draws.numbers["normal"].view_as(self))

    def randn_like(like: Tensor) -> Tensor:
        return draws.numbers["normal"].view_as(like).clone()

    attack = getattr(torchattacks, kind)(network, **arguments)
    with (
        mock.patch.object(Tensor, "uniform_", uniform_),
        mock.patch.object(Tensor, "normal_", normal_),
        mock.patch.object(torch, "randn_like", randn_like),
    ):
        return attack(images, targets).detach().contiguous()


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    save_file({name: reference(name) for name in CASES}, FILE)
