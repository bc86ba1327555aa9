"""A prompt before a frozen network and a mapping of its outputs after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_trust.core.wrapping import Surround
from lightning_trust.nn.prompting.prompts import Prompt


class VisualPrompt(Surround):
    """What visual prompting puts around a network: inputs are prompted, outputs mapped to classes of another task.

    Args:
        prompt: Inputs to inputs of the network, such as :class:`PadPrompt`.
        mapping: The network's outputs to those of the task, such as :class:`LabelMapping`; they stay as they are if
            None.

    Example:
        >>> import torch
        >>> from lightning_trust.core.wrapping import Surrounded
        >>> from lightning_trust.nn import AdditivePrompt, LabelMapping
        >>> part = VisualPrompt(AdditivePrompt((4,)), LabelMapping(3, 2, "fixed", indices=[2, 0]))
        >>> network = Surrounded(nn.Linear(4, 3), part)
        >>> network(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
        >>> with part.outputs_as_they_are():
        ...     network(torch.zeros(5, 4)).shape
        torch.Size([5, 3])

    """

    def __init__(self, prompt: nn.Module, mapping: nn.Module | None = None) -> None:
        super().__init__()
        self.prompt = prompt
        self.mapping = mapping

    def parameter_groups(self, others_lr: float | None = None) -> list[dict[str, Any]]:
        """What is trained, for an optimizer: patterns at the input, and apart from them scale and mapping.

        Args:
            others_lr: Learning rate of what is no pattern; that of the optimizer if None.

        """
        patterns = {id(module.delta) for module in self.modules() if isinstance(module, Prompt)}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if others_lr is None or not patterns:
            return [{"params": trained}]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if id(parameter) in patterns]},
            {"params": [parameter for parameter in trained if id(parameter) not in patterns], "lr": others_lr},
        ]
        return [group for group in groups if group["params"]]

    def before(self, inputs: Tensor) -> Tensor:
        """Prompted inputs."""
        return self.prompt(inputs)

    def after(self, outputs: Tensor) -> Tensor:
        """Outputs of the task."""
        return outputs if self.mapping is None else self.mapping(outputs)
