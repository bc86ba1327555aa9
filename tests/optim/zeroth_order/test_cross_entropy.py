import pytest
import torch
import torch.nn.functional as F

from lightning_trust.optim.zeroth_order.cross_entropy import NearbyCrossEntropy

BATCH, CLASSES, COUNT = 7, 5, 300


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(BATCH, CLASSES, generator=generator, dtype=dtype)
    targets = torch.randint(CLASSES, (BATCH,), generator=generator)
    return logits, targets, generator


def losses(logits, changes, targets):
    """One at a time, changes of shape (K, C, B)."""
    return torch.stack([F.cross_entropy(logits + change.T, targets) for change in changes])


def test_the_loss_of_the_clean_pass():
    logits, targets, _ = case()
    torch.testing.assert_close(NearbyCrossEntropy(logits, targets).base, F.cross_entropy(logits, targets))


def test_all_logits():
    logits, targets, generator = case()
    changes = torch.randn(COUNT, CLASSES, BATCH, generator=generator, dtype=torch.float64)
    found = NearbyCrossEntropy(logits, targets).of_logits(logits + changes.transpose(1, 2))
    torch.testing.assert_close(found, losses(logits, changes, targets))


@pytest.mark.parametrize("entries", [1, 3])
def test_products(entries):
    logits, targets, generator = case()
    weight = torch.randn(COUNT, CLASSES, entries, generator=generator, dtype=torch.float64)
    by = torch.randn(COUNT, entries, BATCH, generator=generator, dtype=torch.float64)
    found = NearbyCrossEntropy(logits, targets).of_products(weight, by)
    torch.testing.assert_close(found, losses(logits, weight @ by, targets))


def test_one_logit():
    logits, targets, generator = case()
    classes = torch.randint(CLASSES, (COUNT,), generator=generator)
    by = torch.randn(COUNT, BATCH, generator=generator, dtype=torch.float64)
    changes = torch.zeros(COUNT, CLASSES, BATCH, dtype=torch.float64)
    changes[torch.arange(COUNT), classes] = by
    found = NearbyCrossEntropy(logits, targets).of_one_logit(classes, by)
    torch.testing.assert_close(found, losses(logits, changes, targets))


def test_exponentials_that_overflow():
    """Far from the clean pass the logits themselves are needed, and do."""
    logits, targets, _ = case(torch.float32)
    near = NearbyCrossEntropy(logits, targets)
    by = torch.full((1, BATCH), 200.0)
    assert near.of_one_logit(torch.tensor([2]), by) is None
    assert near.of_products(torch.ones(1, CLASSES, 1), by[:, None]) is None
    changes = torch.zeros(1, CLASSES, BATCH)
    changes[0, 2] = 200.0
    found = near.of_logits(logits + changes.transpose(1, 2))
    torch.testing.assert_close(found, losses(logits, changes, targets))


def test_a_logit_that_is_no_number_gives_a_loss_that_is_none():
    logits, targets, _ = case()
    outputs = logits.repeat(2, 1, 1)
    outputs[1, 0, 0] = float("nan")
    found = NearbyCrossEntropy(logits, targets).of_logits(outputs)
    torch.testing.assert_close(found[0], F.cross_entropy(logits, targets))
    assert torch.isnan(found[1])
