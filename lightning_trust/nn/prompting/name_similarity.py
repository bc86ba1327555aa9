"""How alike the names of classes are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_trust.nn.prompting.text_encoder import TextEncoder, unit_rows


def name_similarity(source_names: Sequence[str], target_names: Sequence[str], text_encoder: TextEncoder) -> Tensor:
    r"""Cosines between embeddings of target names and of source names, for ``LabelMapping.fit_similarity``.

    The semantic mapping of "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024):
    :math:`S_{ts} = \langle e(t), e(s) \rangle / (\lVert e(t) \rVert \lVert e(s) \rVert)`, with the bare names.

    Args:
        source_names: Names of the frozen network's classes.
        target_names: Names of the classes of the task.
        text_encoder: Names to embeddings, such as :class:`~lightning_trust.nn.ClipTextEncoder`.

    Returns:
        Float, shape ``(len(target_names), len(source_names))``, in [-1, 1].

    Raises:
        ValueError: If there are no names, or an embedding is zero or not finite.

    Example:
        >>> import torch
        >>> from lightning_trust.nn import LabelMapping
        >>> letters = lambda names: torch.stack([torch.tensor([float(n.count(c)) for c in "abc"]) for n in names])
        >>> similarity = name_similarity(["a", "bb", "cab"], ["b", "ac"], letters)
        >>> [[round(value, 2) for value in row] for row in similarity.tolist()]
        [[0.0, 1.0, 0.58], [0.71, 0.0, 0.82]]
        >>> mapping = LabelMapping(3, 2, "semantic")
        >>> _ = mapping.fit_similarity(similarity)
        >>> mapping.indices.flatten().tolist()
        [1, 2]

    """
    for argument, names in (("source_names", source_names), ("target_names", target_names)):
        if isinstance(names, str) or not len(names):
            raise ValueError(f"Expected argument `{argument}` to be a list of at least one name, but got {names!r}.")
    source, target = (unit_rows(text_encoder(names), names) for names in (source_names, target_names))
    return target @ source.T
