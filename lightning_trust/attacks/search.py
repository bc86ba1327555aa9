"""Attacks that look for a misclassified point: they leave alone what is broken already, and drop what they break."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Attack, Problem


class SearchAttack(Attack):
    """Base of attacks whose aim is one misclassified point a sample, not the largest loss.

    Samples that the network gets wrong before anything is added come back as they were: they are broken. The others are
    searched, and leave the batch in the moment in which a point that counts is found.
    """

    def _perturb(self, problem: Problem) -> Tensor:
        outputs = problem.outputs(problem.inputs)
        right = (~problem.fooled(outputs)).nonzero().squeeze(1)
        if len(right) == len(problem):
            return self.search(problem, outputs)
        result = problem.inputs.clone()
        if len(right):
            result[right] = self.search(problem.rows(right), outputs[right])
        return result

    @abstractmethod
    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right.

        Args:
            problem: The samples.
            outputs: Outputs of the network on the clean inputs.

        Returns:
            Raw inputs of the same shape.

        """


class Remaining:
    """The samples that are still attacked, and one tensor that holds what was found for each.

    Args:
        found: What is returned for a sample if nothing better turns up; written to.

    """

    def __init__(self, found: Tensor) -> None:
        self.found = found
        self.rows = torch.arange(len(found), device=found.device)

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, chosen: Tensor, points: Tensor) -> None:
        """Note points for some of the remaining samples, by a boolean mask over them."""
        self.found[self.rows[chosen]] = points[chosen].to(self.found.dtype)

    def drop(self, done: Tensor) -> Tensor:
        """Let samples go, by a boolean mask over the remaining ones; the places of those that stay."""
        stay = (~done).nonzero().squeeze(1)
        self.rows = self.rows[stay]
        return stay
