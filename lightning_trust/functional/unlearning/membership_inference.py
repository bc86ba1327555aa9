"""How many of the forgotten rows an attacker takes for rows that the model never saw."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Feature = Literal["confidence", "correctness", "entropy", "m_entropy", "probability"]


def check_feature(feature: str) -> None:
    """Refuse what is no feature."""
    if feature not in get_args(Feature):
        raise ValueError(
            "Expected argument `feature` to be 'confidence', 'correctness', 'entropy', 'm_entropy' or 'probability',"
            f" but got {feature!r}."
        )


def membership_feature(probabilities: Tensor, targets: Tensor, feature: Feature = "confidence") -> Tensor:
    r"""What an attacker looks at, one row a sample.

    * ``"confidence"``: :math:`p_y`, shape ``(N, 1)``;
    * ``"correctness"``: whether :math:`\arg\max p = y`, shape ``(N, 1)``;
    * ``"entropy"``: :math:`-\sum_k p_k \log p_k`, shape ``(N, 1)``;
    * ``"m_entropy"``: :math:`-(1 - p_y) \log p_y - \sum_{k \ne y} p_k \log(1 - p_k)`, shape ``(N, 1)``
      (Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021);
    * ``"probability"``: all of :math:`p`, shape ``(N, K)``.

    Args:
        probabilities: Softmax outputs, shape ``(N, K)``, in [0, 1].
        targets: True labels, shape ``(N,)``.
        feature: Which of them.

    Example:
        >>> membership_feature(torch.tensor([[0.9, 0.1]]), torch.tensor([1]))
        tensor([[0.1000]])

    """
    check_feature(feature)
    if feature == "probability":
        return probabilities
    true = probabilities.gather(1, targets.long().unsqueeze(1))
    if feature == "confidence":
        return true
    if feature == "correctness":
        return (probabilities.argmax(1, keepdim=True) == targets.unsqueeze(1)).float()
    tiny = torch.finfo(probabilities.dtype).tiny
    if feature == "entropy":
        return -(probabilities * probabilities.clamp(min=tiny).log()).sum(1, keepdim=True)
    complement = 1.0 - probabilities
    others = probabilities * complement.clamp(min=tiny).log()
    others = others.sum(1, keepdim=True) - others.gather(1, targets.long().unsqueeze(1))
    return -(1.0 - true) * true.clamp(min=tiny).log() - others


def membership_inference(
    retain: Tensor, test: Tensor, forget: Tensor, max_rows: int = 2000, seed: int = 0
) -> tuple[float, int]:
    r"""MIA-efficacy: the share of forgotten rows that an attacker takes for non-members, in percent.

    An RBF support vector machine (C = 3, gamma = 1 / number of features) learns to tell rows of the retain set
    (members) from as many rows of the test set (non-members); :math:`100 \cdot \mathrm{TN} / |D_f|` on the forget set.
    Retrain is the yardstick: bigger is not better by itself.

    Paper: Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023).

    Args:
        retain: Features of retain rows, shape ``(N_r, F)``.
        test: Features of test rows, shape ``(N_t, F)``.
        forget: Features of the rows to be forgotten, shape ``(N_f, F)``.
        max_rows: At most so many rows a side are drawn; the time of the fit grows with their square.
        seed: Seed of the draw.

    Returns:
        The efficacy in [0, 100], and the number of rows a side that were used.

    Raises:
        ValueError: If a set is empty or a feature is not finite.

    Example:
        >>> members, others = torch.full((50, 1), 0.9), torch.full((50, 1), 0.1)
        >>> membership_inference(members, others, others[:10])
        (100.0, 50)

    """
    from sklearn.svm import SVC

    for name, rows in (("retain", retain), ("test", test), ("forget", forget)):
        if len(rows) == 0:
            raise ValueError(f"Expected argument `{name}` to hold at least one row, but got none.")
        if not torch.isfinite(rows).all():
            raise ValueError(f"Expected argument `{name}` to be finite, but got NaN or infinite features.")
    count = min(len(retain), len(test), max_rows)
    generator = np.random.default_rng(seed)
    sides = []
    for rows in (retain, test):
        chosen = np.sort(generator.permutation(len(rows))[:count])
        sides.append(rows.detach().double().cpu().numpy()[chosen])
    labels = np.repeat([1, 0], count)
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate(sides), labels)
    predicted = attack.predict(forget.detach().double().cpu().numpy())
    return 100.0 * float((predicted == 0).mean()), count
