"""FreeAdversarialTraining: the recurrence by hand, the case of one replay, state, ranks."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.attacks import FGSM
from lightning_trust.callbacks import FreeAdversarialTraining
from lightning_trust.core.space import InputSpace
from tests.callbacks.adversarial.test_adversarial_training import Images, fit, images, in_a_box
from tests.conformance import CallbackConformance


class TestFree(CallbackConformance):
    callback = FreeAdversarialTraining
    arguments: ClassVar = {"eps": 0.3}
    wrap_data = staticmethod(in_a_box)


def by_hand(net, batches, eps, size, lr=0.1):
    """The recurrence on a plain network; returns the perturbations that each step trained on."""
    used, delta = [], None
    for x, y in batches:
        if delta is None:
            delta = torch.zeros_like(x)
        place = (x + delta[: len(x)]).clamp(0, 1).requires_grad_()
        used.append((place - x).detach())
        *gradients, at_inputs = torch.autograd.grad(F.cross_entropy(net(place), y), [*net.parameters(), place])
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= lr * gradient
        delta[: len(x)] = (delta[: len(x)] + size * at_inputs.sign()).clamp(-eps, eps)
    return used


def test_weights_are_those_of_the_recurrence():
    x, y = (column[:20] for column in images().tensors)
    host = Images()
    net = copy.deepcopy(host.net)
    # batches of 8, 8 and 4 rows: a smaller last batch takes the first rows
    fit(host, [FreeAdversarialTraining(eps=0.1, step_size=0.06)], data=DataLoader(TensorDataset(x, y), batch_size=8))
    used = by_hand(net, [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)], 0.1, 0.06)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(host.net.state_dict()[name], value, rtol=0.0, atol=1e-6)
    assert used[0].abs().max() == 0.0
    assert used[2].abs().max().item() == pytest.approx(0.1, abs=1e-6)


def test_one_replay_is_fgsm_one_batch_late():
    """With a reset perturbation the second of two replays is FGSM from a zero start at the first replay's gradient."""
    x, y = (column[:8] for column in images().tensors)
    seen = []

    class Watches(Images):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].detach().clone())
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    host = Watches()
    data = DataLoader(TensorDataset(x.repeat(2, 1, 1, 1), y.repeat(2)), batch_size=8)
    fit(host, [FreeAdversarialTraining(eps=0.1)], batches=2, data=data)
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], FGSM(eps=0.1)(host.net, x, y))


def test_perturbation_of_another_shape_starts_anew():
    callback = FreeAdversarialTraining(eps=0.1)
    fit(Images(), [callback])
    wide = TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 3)
    fit(Images(), [callback], batches=1, data=DataLoader(wide, batch_size=16))
    assert callback.state()["delta"].shape == (16, 1, 8, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="`eps` to be at least 0, but got -1"):
        FreeAdversarialTraining(eps=-1.0)
    with pytest.raises(ValueError, match="`step_size` to be positive, but got 0"):
        FreeAdversarialTraining(step_size=0.0)
    with pytest.raises(ValueError, match="Did you mean 8/255"):
        fit(Images(), [FreeAdversarialTraining(eps=8.0)])
    with pytest.raises(ValueError, match="InputSpace"):
        fit(Images(), [FreeAdversarialTraining(eps=0.1, space=InputSpace(0.4, 0.6))])

    class Detaches(Images):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].detach(), batch[1]], batch_idx)

    with pytest.raises(MisconfigurationException, match="Detaches detaches or copies them"):
        fit(Detaches(), [FreeAdversarialTraining(eps=0.1)])
