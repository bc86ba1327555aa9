"""Saliency maps, and inputs whose least salient features are filled with noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Saliency = Literal["grad", "abs_grad", "integrated"]
Fill = Literal["random", "mean", "zero"]
_INTEGRATION_STEPS = 16


def class_score(logits: Tensor, targets: Tensor) -> Tensor:
    r"""The logit of the true class of each sample; for several labels the sum of the positive ones.

    A sample without a positive label takes its predicted ones (logits above 0), and without those its largest logit.

    Args:
        logits: Shape ``(N, K)``.
        targets: Classes ``(N,)``, or multi-hot ``(N, K)``.

    Returns:
        Shape ``(N,)``.

    Example:
        >>> class_score(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0, 1], [0, 0]]))
        tensor([2., 3.])

    """
    if targets.ndim == 1:
        return logits.gather(1, targets[:, None]).squeeze(1)
    positive = targets > 0.5
    predicted = logits > 0.0
    largest = torch.zeros_like(predicted).scatter(1, logits.argmax(dim=1, keepdim=True), True)
    chosen = torch.where(predicted.any(dim=1, keepdim=True), predicted, largest)
    chosen = torch.where(positive.any(dim=1, keepdim=True), positive, chosen)
    return (logits * chosen).sum(dim=1)


def saliency_map(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    kind: Saliency = "grad",
    feature_dims: int | None = None,
) -> Tensor:
    r"""How the score of the true class changes with each feature, averaged over channels.

    ``"grad"``: :math:`S = \partial f_y(z) / \partial z`, with its sign; ``"abs_grad"``: its magnitude, averaged after;
    ``"integrated"``: integrated gradients from the zero input, 16 midpoints.

    Papers: Improving Deep Learning Interpretability by Saliency Guided Training (NeurIPS 2021); Axiomatic Attribution
    for Deep Networks (ICML 2017).

    Args:
        model: Maps inputs to logits; the caller chooses its mode.
        inputs: Shape ``(N, C, H, W)``, or others with ``feature_dims``.
        targets: Classes ``(N,)``, or multi-hot ``(N, K)``.
        kind: Which map.
        feature_dims: Number of last dimensions whose entries are features; two for images if None.

    Returns:
        Float32, shape ``(N, ...)`` with the feature dimensions, without a graph.

    Raises:
        ValueError: If inputs are no images and ``feature_dims`` is None, or the map is not finite.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
        >>> saliency_map(lambda z: z @ weight.T, torch.ones(1, 2), torch.tensor([0]), feature_dims=1)
        tensor([[ 1., -2.]])

    """
    dims = feature_dimensions(inputs, feature_dims)
    with torch.inference_mode(False), torch.enable_grad():
        base = inputs.detach().clone()

        def gradient(place: Tensor) -> Tensor:
            place = place.detach().requires_grad_()
            (found,) = torch.autograd.grad(class_score(model(place), targets.clone()).sum(), place)
            return found.float()

        if kind == "integrated":
            middles = [(step + 0.5) / _INTEGRATION_STEPS for step in range(_INTEGRATION_STEPS)]
            mean = torch.stack([gradient(base * middle) for middle in middles]).mean(dim=0)
            found = base.float() * mean
        else:
            found = gradient(base)
            if kind == "abs_grad":
                found = found.abs()
    channels = tuple(range(1, inputs.ndim - dims))
    found = found.mean(dim=channels) if channels else found
    if not bool(torch.isfinite(found).all()):
        raise ValueError("Expected the saliency map to be finite, but got NaN or infinite values.")
    return found


def masked_inputs(
    inputs: Tensor, saliency: Tensor, fraction: float, fill: Fill = "random", noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Inputs whose :math:`k = \lfloor \mathrm{fraction} \cdot n \rfloor` least salient features are filled.

    Paper: Improving Deep Learning Interpretability by Saliency Guided Training (NeurIPS 2021).

    Args:
        inputs: Shape ``(N, ..., features)``.
        saliency: Shape ``(N, features)``, as :func:`saliency_map` gives it.
        fraction: Share of the :math:`n` features to fill, in [0, 1).
        fill: ``"random"``: uniform between the sample's smallest and largest value; ``"mean"``: the sample's mean;
            ``"zero"``.
        noise: Uniform in [0, 1), shape of ``inputs``, for ``"random"``.

    Returns:
        New inputs without a graph, and a boolean mask of the shape of ``saliency``: True where features were filled.

    Raises:
        ValueError: If the fraction is out of its range, the fill is another word, or noise is missing.

    Example:
        >>> filled, mask = masked_inputs(torch.tensor([[5.0, 6.0]]), torch.tensor([[0.1, 0.9]]), 0.5, "zero")
        >>> filled, mask
        (tensor([[0., 6.]]), tensor([[ True, False]]))

    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"Expected argument `fraction` to be in [0, 1), but got {fraction}.")
    count = int(fraction * math.prod(saliency.shape[1:]))
    flat = saliency.flatten(1)
    lowest = flat.topk(count, dim=1, largest=False).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, lowest, True).view_as(saliency)
    over = mask.view(len(mask), *[1] * (inputs.ndim - saliency.ndim), *mask.shape[1:])
    clean = inputs.detach()
    rows = clean.flatten(1)
    shape = (-1, *[1] * (inputs.ndim - 1))
    if fill == "random":
        if noise is None:
            raise ValueError("Expected argument `noise` for fill='random', but got None.")
        low, high = rows.amin(dim=1).view(shape), rows.amax(dim=1).view(shape)
        value = low + (high - low) * noise.to(clean.dtype)
    elif fill == "mean":
        value = rows.mean(dim=1).view(shape).expand_as(clean)
    elif fill == "zero":
        value = torch.zeros_like(clean)
    else:
        raise ValueError(f"Expected argument `fill` to be 'random', 'mean' or 'zero', but got {fill!r}.")
    return torch.where(over, value, clean), mask


def bernoulli_kl(logits: Tensor, reference: Tensor) -> Tensor:
    r"""Sum over labels of the divergence of two Bernoulli distributions.

    .. math:: \sum_k p_k \log \frac{p_k}{q_k} + (1 - p_k) \log \frac{1 - p_k}{1 - q_k}, \qquad
        p = \sigma(\text{reference}), \; q = \sigma(\text{logits})

    Args:
        logits: Shape ``(N, K)``.
        reference: Shape ``(N, K)``.

    Returns:
        Shape ``(N,)``.

    Example:
        >>> round(bernoulli_kl(torch.zeros(1, 1), torch.tensor([[1.0986123]])).item(), 4)
        0.1308

    """
    log = torch.nn.functional.logsigmoid
    p, q = reference.float() if reference.dtype.itemsize < 4 else reference, logits
    q = q.to(p.dtype)
    positive = p.sigmoid() * (log(p) - log(q))
    negative = (-p).sigmoid() * (log(-p) - log(-q))
    return (positive + negative).sum(dim=1)


def feature_dimensions(inputs: Tensor, feature_dims: int | None) -> int:
    """How many last dimensions hold features: two for images, else as given.

    Raises:
        ValueError: If inputs are no images and nothing was given, or there are not so many dimensions.

    """
    if feature_dims is None:
        if inputs.ndim != 4:
            raise ValueError(
                "Expected images of shape (N, C, H, W), or argument `feature_dims`, but got inputs of shape"
                f" {tuple(inputs.shape)} and feature_dims=None."
            )
        return 2
    if not 1 <= feature_dims < inputs.ndim:
        raise ValueError(
            f"Expected argument `feature_dims` to be in [1, {inputs.ndim - 1}], but got {feature_dims} for inputs of"
            f" shape {tuple(inputs.shape)}."
        )
    return feature_dims
