"""A prompt before a frozen network and a mapping of its outputs after it."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_trust.core.wrapping import Surround


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

    def before(self, inputs: Tensor) -> Tensor:
        """Prompted inputs."""
        return self.prompt(inputs)

    def after(self, outputs: Tensor) -> Tensor:
        """Outputs of the task."""
        return outputs if self.mapping is None else self.mapping(outputs)
