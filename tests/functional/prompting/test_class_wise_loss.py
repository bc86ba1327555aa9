import torch
import torch.nn.functional as F

from lightning_trust.functional.prompting import class_mean_sum, class_wise_cross_entropy, class_wise_interrelation


def logits_of(q):
    return q.clamp_min(1e-30).log()


def by_words(q, targets, tau):
    """The three terms, one class and sample at a time."""
    total, count = 0.0, q.shape[1]
    for j in range(count):
        own, other = [], []
        for n, y in enumerate(targets.tolist()):
            if y == j:
                loudest = max(q[n, i, i] for i in range(count) if i != j)
                seen = max(q[n, i, j] for i in range(count) if i != j)
                own.append(max(loudest - q[n, j, j], -tau) + max(seen - q[n, j, j], -tau))
            else:
                other.append(max(q[n, j, j] - max(q[n, j, k] for k in range(count) if k != j), -tau))
        total += sum(own) / len(own) if own else 0.0
        total += sum(other) / len(other) if other else 0.0
    return total


def test_uniform_confidences_cost_nothing():
    assert float(class_wise_interrelation(torch.zeros(6, 3, 3), torch.tensor([0, 1, 2, 2, 1, 0]))) == 0.0


def test_perfect_prompts_reach_the_least():
    targets = torch.tensor([0, 1, 2, 3])
    q = torch.zeros(4, 4, 4)
    for n, y in enumerate(targets.tolist()):
        for i in range(4):
            # a wrong prompt puts all on a class that is neither its own nor the right one
            q[n, i, y if i == y else next(k for k in range(4) if k not in (i, y))] = 1.0
    found = class_wise_interrelation(logits_of(q), targets, tau=0.1)
    torch.testing.assert_close(found, torch.tensor(-3 * 4 * 0.1))


def test_the_terms_equal_their_words():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, 4, generator=generator, dtype=torch.float64)
    # class 3 is not in the batch
    targets = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 0])
    for tau in (0.0, 0.1, 5.0):
        found = class_wise_interrelation(logits, targets, tau)
        expected = torch.as_tensor(by_words(logits.softmax(dim=2), targets, tau), dtype=torch.float64)
        torch.testing.assert_close(found, expected)
    parts = [
        class_wise_interrelation(logits, targets, 0.1, terms)
        for terms in ((True, False, False), (False, True, False), (False, False, True))
    ]
    torch.testing.assert_close(sum(parts), class_wise_interrelation(logits, targets, 0.1))


def test_one_prompt():
    logits = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 2, 1, 1, 0])
    q = logits[:, 0].softmax(dim=1)
    margins = [max(float(q[n, k]) for k in range(3) if k != y) - float(q[n, y]) for n, y in enumerate(targets.tolist())]
    expected = sum(max(margin, -0.1) for margin in margins) / 5
    torch.testing.assert_close(class_wise_interrelation(logits, targets), torch.tensor(expected))
    torch.testing.assert_close(class_wise_cross_entropy(logits, targets), F.cross_entropy(logits[:, 0], targets))


def test_cross_entropy_of_the_right_prompts():
    logits = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([2, 0, 2, 2])
    own = F.cross_entropy(logits[torch.arange(4), targets], targets, reduction="none")
    expected = own[1] + own[[0, 2, 3]].mean()
    torch.testing.assert_close(class_wise_cross_entropy(logits, targets), expected)


def test_permuted_classes_and_prompts_change_nothing():
    logits = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 1, 2, 3, 3, 1])
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    permuted = logits[:, order][:, :, order]
    torch.testing.assert_close(
        class_wise_interrelation(permuted, inverse[targets]), class_wise_interrelation(logits, targets)
    )


def test_means_over_classes():
    assert float(class_mean_sum(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5, 5, 1]))) == 7.5
