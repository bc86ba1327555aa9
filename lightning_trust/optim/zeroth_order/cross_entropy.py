r"""The mean cross-entropy of a classifier at many outputs that lie near those of one clean pass.

With the log-probabilities :math:`l_{cb}` of the clean pass, logits that moved by :math:`d_{cb}` have the loss
:math:`L + \mathrm{mean}_b \log \sum_c e^{l_{cb} + d_{cb}} - \mathrm{mean}_b d_{y_b b}`. Where one logit moves, the
sum is :math:`1 + p_{cb} (e^{d_{cb}} - 1)`: the number of classes costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: bytes of logits that are worked on at a time: on a processor, what stays in a cache
_CACHE = {"cpu": 1 << 19}
_MEMORY = 1 << 26


class NearbyCrossEntropy:
    """Mean cross-entropies of logits near those of a clean pass.

    Args:
        logits: Logits of the clean pass, shape ``(B, C)``.
        targets: Classes, int64, shape ``(B,)``.

    Attributes:
        base: The loss of the clean pass.

    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        # classes before samples: a softmax over a short last dimension takes many times longer
        self._normaliser = logits.logsumexp(dim=1)
        self._log_probabilities = (logits.T - self._normaliser).contiguous()
        # what the mean over samples of the right class's logit is a product with
        weights = torch.zeros_like(self._log_probabilities)
        self._chosen = weights.scatter_(0, targets[None], 1.0 / len(targets))
        self.base = -(self._log_probabilities * self._chosen).sum()

    def of_logits(self, outputs: Tensor) -> Tensor:
        """Losses of logits, shape ``(K, B, C)``."""
        moved = outputs.transpose(1, 2).sub(self._normaliser).contiguous()
        found = moved.exp().sum(dim=1).log_().mean(dim=1) - moved.flatten(1) @ self._chosen.flatten()
        if not _finite(found):
            # they are far from the clean pass, or no numbers
            chosen = torch.where(self._chosen != 0.0, moved * self._chosen, 0.0).flatten(1).sum(dim=1)
            found = moved.logsumexp(dim=1).mean(dim=1) - chosen
        return found

    def of_one_logit(self, classes: Tensor, by: Tensor) -> Tensor | None:
        """Losses where one logit moves.

        Args:
            classes: Which one, shape ``(K,)``.
            by: How far at each sample, shape ``(K, B)``.

        Returns:
            Losses, shape ``(K,)``, or None where the sums are not finite.

        """
        sums = self._log_probabilities.exp()[classes].mul_(by.expm1())
        found = self.base + sums.log1p_().mean(dim=1) - (self._chosen[classes] * by).sum(dim=1)
        return found if _finite(found) else None

    def of_products(self, weight: Tensor, by: Tensor) -> Tensor | None:
        """Losses where each logit moves by a product.

        Args:
            weight: Shape ``(K, C, S)``.
            by: Shape ``(K, S, B)``; the logits move by ``weight @ by``.

        Returns:
            Losses, shape ``(K,)``, or None where the sums are not finite.

        """
        clean, (count, _, batch_size) = self._log_probabilities, by.shape
        sums, changes = by.new_empty(count, batch_size), by.new_empty(count)
        chunk = max(8, _CACHE.get(clean.device.type, _MEMORY) // clean.nbytes)
        # memory that is new to the process costs more than the exponentials
        scratch = by.new_empty(min(chunk, count), *clean.shape)
        for start in range(0, count, chunk):
            some = slice(start, min(start + chunk, count))
            moved = scratch[: some.stop - start]
            if by.shape[1] == 1:
                torch.addcmul(clean, weight[some], by[some], out=moved)
            else:
                torch.baddbmm(clean.expand_as(moved), weight[some], by[some], out=moved)
            torch.mv(moved.flatten(1), self._chosen.flatten(), out=changes[some])
            torch.sum(moved.exp_(), dim=1, out=sums[some])
        found = sums.log_().mean(dim=1) - changes
        return found if _finite(found) else None


class CrossEntropyCalls(TorchFunctionMode):
    """Keeps the calls of cross-entropy: logits, targets, settings and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Tensor, dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.cross_entropy and len(args) == 2:
            self.calls.append((args[0], args[1], kwargs, result))
        return result

    def targets_of(self, logits: Tensor, loss: Any) -> Tensor | None:
        """The classes, if a loss is the mean cross-entropy of certain logits and nothing else was asked for."""
        if len(self.calls) != 1:
            return None
        given, targets, settings, result = self.calls[0]
        is_it = given is logits and result is loss and logits.ndim == 2 and _plain_mean(targets, settings)
        return targets if is_it else None


class SamplesLast(TorchFunctionMode):
    """Lets a mean cross-entropy over few classes run along the samples.

    The loss is the same; a softmax over a short last dimension takes many times longer than one over the first, and a
    batched negative log-likelihood is made of many small operations.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and len(args) == 2 and _plain_mean(args[1], kwargs):
            classes_first = args[0].T
            chosen = classes_first.gather(0, args[1][None])[0]
            return (classes_first.logsumexp(0) - chosen).mean()
        return func(*args, **kwargs)


def _finite(found: Tensor) -> bool:
    return math.isfinite(float(found.sum()))


def _plain_mean(targets: Tensor, settings: dict[str, Any]) -> bool:
    """Whether a cross-entropy is the mean over samples with one class each, none of which is ignored."""
    others = {
        "weight": None,
        "size_average": None,
        "ignore_index": -100,
        "reduce": None,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    plain = all(name in others and others[name] == value for name, value in settings.items())
    return plain and targets.ndim == 1 and not targets.is_floating_point() and bool((targets >= 0).all())
