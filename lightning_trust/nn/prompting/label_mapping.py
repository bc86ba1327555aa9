"""What a frozen classifier's outputs mean in another task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn

from lightning_trust.functional.prompting import (
    check_enough_sources,
    frequency_label_mapping,
    semantic_label_mapping,
)
from lightning_trust.functional.prompting.label_mapping import Solver

Method = Literal["random", "identity", "fixed", "frequency", "iterative", "semantic"]
_METHODS = ("random", "identity", "fixed", "frequency", "iterative", "semantic")


class LabelMapping(nn.Module, HyperparametersMixin):
    r"""Logits of target classes from those of the source classes that stand for them.

    From "Understanding and Improving Visual Prompting: A Label-Mapping Perspective" (CVPR 2023).

    .. math:: z_t = \frac{1}{m} \sum_{s \in \pi(t)} f(x)_s

    Which source classes :math:`\pi(t)` stand for a target class is drawn at random (``"random"``), taken in order
    (``"identity"``), given (``"fixed"``), counted before training (``"frequency"``), counted again and again as the
    prompt is trained (``"iterative"``), or read off the names (``"semantic"``). What is counted is counted by
    :class:`lightning_trust.callbacks.IterativeLabelMapping`.

    Shape:
        - Input: source logits, ``(B, num_source)``.
        - Output: target logits, ``(B, num_target)``.

    Args:
        num_source: Source classes of the frozen network.
        num_target: Classes of the task.
        method: Where the mapping comes from.
        sources_per_target: Source classes of each target class, whose logits are averaged.
        solver: How counts are turned into a mapping, ``"greedy"`` or ``"hungarian"``.
        indices: The mapping, for ``"fixed"``: source class of each target class, or a list of them.
        seed: Seed of the random mapping.

    Attributes:
        indices: Source classes of each target class, int64, shape ``(num_target, sources_per_target)``.

    Raises:
        ValueError: If there are too few source classes, or an argument is out of its range.

    Example:
        >>> mapping = LabelMapping(num_source=4, num_target=2, method="fixed", indices=[3, 0])
        >>> mapping(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[4., 1.]])
        >>> mapping.explain(["ant", "bee", "cat", "dog"], ["wolf", "insect"])
        {'dog': 'wolf', 'ant': 'insect'}

    """

    indices: Tensor
    fitted: Tensor

    def __init__(
        self,
        num_source: int,
        num_target: int,
        method: Method = "iterative",
        sources_per_target: int = 1,
        solver: Solver = "greedy",
        indices: Sequence[int] | Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_enough_sources(num_source, num_target, sources_per_target)
        if method not in _METHODS:
            raise ValueError(f"Expected argument `method` to be one of {list(_METHODS)}, but got {method!r}.")
        if solver not in ("greedy", "hungarian"):
            raise ValueError(f"Expected argument `solver` to be 'greedy' or 'hungarian', but got {solver!r}.")
        if (method == "fixed") != (indices is not None):
            raise ValueError(
                f"Expected argument `indices` with method='fixed' and with no other, but got method={method!r} and"
                f" indices={indices}."
            )
        self.save_hyperparameters()
        self.num_source = num_source
        self.num_target = num_target
        self.method = method
        self.sources_per_target = sources_per_target
        self.solver: Solver = solver
        count = num_target * sources_per_target
        first = torch.arange(count)
        if method == "random":
            first = torch.randperm(num_source, generator=torch.Generator().manual_seed(seed))[:count]
        elif indices is not None:
            first = torch.as_tensor(indices, dtype=torch.int64).flatten()
            self._check(first, count)
        self.register_buffer("indices", first.view(num_target, sources_per_target).clone())
        self.register_buffer("fitted", torch.tensor(method in ("random", "identity", "fixed")))

    def _check(self, indices: Tensor, count: int) -> None:
        if len(indices) != count or len(indices.unique()) != count:
            raise ValueError(
                f"Expected argument `indices` to hold {count} different source classes, but got {indices.tolist()}."
            )
        if int(indices.min()) < 0 or int(indices.max()) >= self.num_source:
            raise ValueError(
                f"Expected argument `indices` to hold classes in [0, {self.num_source}), but got {indices.tolist()}."
            )

    @property
    def is_counted(self) -> bool:
        """Whether the mapping comes from counts of predictions."""
        return self.method in ("frequency", "iterative")

    def fit_counts(self, counts: Tensor) -> float:
        """Take the mapping from counts.

        Args:
            counts: How often each source class is predicted for each target class, of all ranks, int64, shape
                ``(num_source, num_target)``; see :func:`lightning_trust.functional.prompting.count_predictions`.

        Returns:
            Share of target classes whose source classes changed.

        Raises:
            ValueError: If counts have another shape.

        """
        if tuple(counts.shape) != (self.num_source, self.num_target):
            raise ValueError(
                f"Expected argument `counts` to have shape (num_source, num_target) = ({self.num_source},"
                f" {self.num_target}), but got {tuple(counts.shape)}."
            )
        return self._take(frequency_label_mapping(counts, self.sources_per_target, self.solver))

    def fit_similarity(self, similarity: Tensor) -> float:
        """Take the mapping from similarities of names, shape ``(num_target, num_source)``; returns what changed."""
        if tuple(similarity.shape) != (self.num_target, self.num_source):
            raise ValueError(
                f"Expected argument `similarity` to have shape (num_target, num_source) = ({self.num_target},"
                f" {self.num_source}), but got {tuple(similarity.shape)}."
            )
        return self._take(semantic_label_mapping(similarity, self.sources_per_target))

    def _take(self, found: Tensor) -> float:
        changed = (found.to(self.indices.device) != self.indices).any(dim=1).double().mean()
        self.indices.copy_(found)
        self.fitted.fill_(True)
        return float(changed)

    def forward(self, logits: Tensor) -> Tensor:
        """Source logits to target logits."""
        if logits.ndim != 2 or logits.shape[1] != self.num_source:
            raise ValueError(
                f"Expected the network to give source logits of shape (B, num_source={self.num_source}), but got"
                f" {tuple(logits.shape)}."
            )
        if self.sources_per_target == 1:
            return logits[:, self.indices[:, 0]]
        return logits[:, self.indices].mean(dim=2)

    def explain(self, source_names: Sequence[str], target_names: Sequence[str]) -> dict[str, str]:
        """Names of source classes to the target classes that they stand for.

        Raises:
            ValueError: If there are too many or too few names.

        """
        for name, names, count in (
            ("source_names", source_names, self.num_source),
            ("target_names", target_names, self.num_target),
        ):
            if len(names) != count:
                raise ValueError(f"Expected argument `{name}` to hold {count} names, but got {len(names)}.")
        return {
            source_names[source]: target_names[target]
            for target, some in enumerate(self.indices.tolist())
            for source in some
        }


def check_fitted(mapping: nn.Module | None, owner: str) -> None:
    """Refuse to train through a mapping that has no source classes yet.

    Args:
        mapping: The mapping of a prompt, of whatever kind.
        owner: Who trains, for the message.

    Raises:
        MisconfigurationException: If it is to be counted or read off names, and nobody has.

    """
    if isinstance(mapping, LabelMapping) and not bool(mapping.fitted):
        remedy = (
            "Call `mapping.fit_similarity(...)` first."
            if mapping.method == "semantic"
            else "Add the callback IterativeLabelMapping."
        )
        raise MisconfigurationException(
            f"LabelMapping(method='{mapping.method}') has no source classes yet and {owner} does not find them."
            f" {remedy}"
        )
