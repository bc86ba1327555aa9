"""AdversarialPrompting: class-wise prompts, their loss, and what an attack sees of them."""

from __future__ import annotations

from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.attacks import PGD, WithoutPrompt
from lightning_trust.callbacks import AdversarialPrompting, RobustEvaluation
from lightning_trust.core.wrapping import Surrounded, checksum, part_around
from lightning_trust.functional.prompting import class_wise_cross_entropy, class_wise_interrelation
from lightning_trust.nn import AntiAdversary, ClassWisePrompt
from tests.callbacks.prompting.test_ilm_vp import trainer
from tests.conformance import CLASSES, CallbackConformance, Data, Host

PROMPT = {
    "class_path": "ClassWisePrompt",
    "init_args": {"num_prompts": CLASSES, "image_size": 4, "channels": 1, "size": 1},
}


class Pictures(Host):
    """The host of the conformance suite, for images of four pixels a side."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__(dropout, lr)
        torch.manual_seed(7)
        layers = (nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))
        self.net = nn.Sequential(*layers)


class InPixels(Data):
    """Rows of the suite as images in [0, 1]."""

    def _seen(self, loader):
        dataset = loader.dataset
        x, y = dataset.tensors
        padded = F.pad(x.sigmoid(), (0, 10)).view(-1, 1, 4, 4)
        object.__setattr__(dataset, "tensors", (padded, y))
        return loader

    def train_dataloader(self):
        return self._seen(super().train_dataloader())

    def val_dataloader(self):
        return self._seen(super().val_dataloader())

    def test_dataloader(self):
        return self._seen(super().test_dataloader())


class TestAdversarialPrompting(CallbackConformance):
    callback = AdversarialPrompting
    host = Pictures
    arguments: ClassVar = {
        "prompt": PROMPT,
        "attack": {"class_path": "PGD", "init_args": {"eps": 0.05, "step_size": 0.02, "steps": 2}},
    }
    # means of classes are those of a rank's part of the batch
    equal_to_one_rank: ClassVar[bool] = False

    def data(self, **kwargs):
        return InPixels(**kwargs)


def images(count=24, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, size, size, generator=generator), torch.arange(count) % 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3))


def prompt(**kwargs):
    return ClassWisePrompt(**{"num_prompts": 3, "image_size": 8, "channels": 1, "size": 2, **kwargs})


def test_untrained_prompts_leave_the_network_its_answers():
    x, _ = images()
    net, part = network(), prompt()
    assert torch.equal(part.images(x), x[:, None].expand(-1, 3, -1, -1, -1))
    # every prompt sees the same, so each answers with its own class's confidence
    assert torch.equal(Surrounded(net, part)(x).argmax(dim=1), net(x).argmax(dim=1))


def test_no_gradient_inside_the_frame_and_where_pixels_are_clipped():
    part = prompt()
    x = torch.full((1, 1, 8, 8), 0.5)
    x[0, 0, 0, 0] = 1.0
    part.delta.data[0, 0, 0, 0] = 0.3
    part.images(x).sum().backward()
    assert (part.delta.grad[:, 0, 2:-2, 2:-2] == 0).all()
    assert part.delta.grad[0, 0, 0, 0] == 0
    assert part.delta.grad[0, 0, 0, 1] == 1
    # one pixel of the frame's 48 under one of three prompts
    assert float(prompt(num_prompts=1).saturated(x)) == pytest.approx(1 / 48)


def test_gradient_of_the_loss():
    torch.manual_seed(2)
    net, part = network().double(), prompt().double()
    part.delta.data.uniform_(-0.1, 0.1)
    x, y = images(6)
    x = 0.2 + 0.6 * x.double()

    def loss():
        logits = part.grouped(net(part.before(x)))
        return class_wise_cross_entropy(logits, y) + 3.0 * class_wise_interrelation(logits, y, 0.1)

    loss().backward()
    frame = part.mask.expand_as(part.delta).nonzero()
    for place in frame[torch.randperm(len(frame), generator=torch.Generator().manual_seed(0))[:20]]:
        at, step = tuple(place.tolist()), 1e-6
        values = []
        for by in (step, -2.0 * step):
            part.delta.data[at] += by
            values.append(float(loss()))
        part.delta.data[at] += step
        assert float(part.delta.grad[at]) == pytest.approx((values[0] - values[1]) / (2.0 * step), abs=1e-5)


def test_pieces_and_the_whole_agree():
    torch.manual_seed(1)
    part = prompt()
    part.delta.data.normal_(std=0.2)
    net, (x, _) = network(), images()
    whole, pieces = Surrounded(net, part)(x), Surrounded(net, part, chunk=7)(x)
    torch.testing.assert_close(whole, pieces, rtol=0.0, atol=1e-6)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    return DataLoader(TensorDataset(*images(48)), batch_size=24)


def test_only_prompts_are_trained_and_the_loss_falls():
    host, seen = Classifier(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]))

    before = checksum(host)
    callback = AdversarialPrompting(prompt(), PGD(eps=0.05, steps=3))
    run = trainer(callback, Watch(), max_epochs=20)
    run.fit(host, loader())
    assert checksum(host) == before
    assert sum(seen[-4:]) < sum(seen[:4])
    assert bool((callback.prompt.delta[:, 0, 0] != 0).all())


def test_without_attack_and_interrelations_one_prompt_is_plain_prompting():
    x, y = images(48)
    callback = AdversarialPrompting(prompt(num_prompts=1), beta=0.0, schedule="constant")
    trainer(callback, max_epochs=2).fit(Classifier(), loader())
    part, net = prompt(num_prompts=1), network().requires_grad_(False)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9)
    for start in (0, 24, 0, 24):
        rows = slice(start, start + 24)
        optimizer.zero_grad()
        F.cross_entropy(net(part.before(x[rows])), y[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(callback.prompt.delta, part.delta)


def test_blind_and_adaptive_attacks():
    torch.manual_seed(1)
    net, part = network(), prompt()
    part.delta.data.normal_(std=0.5)
    defended, (x, y) = Surrounded(net, part), images()
    attack = PGD(eps=0.1, steps=5, random_start=False)
    # blind: what the attack finds on the bare network
    assert torch.equal(WithoutPrompt(attack)(defended, x, y), attack(net, x, y))
    found = attack(defended, x, y)
    assert not torch.equal(found, attack(net, x, y))
    loss = F.cross_entropy(defended(found), y)
    assert float(loss) > float(F.cross_entropy(defended(WithoutPrompt(attack)(defended, x, y)), y))
    assert part_around(net) is None
    with pytest.raises(ValueError, match="WithoutPrompt .* there is none around the Sequential"):
        WithoutPrompt(attack)(net, x, y)


def test_evaluation_in_a_run_tells_both(tmp_path):
    host = Classifier()
    attack = PGD(eps=0.05, steps=3)
    evaluation = RobustEvaluation({"transfer": WithoutPrompt(attack), "adaptive": attack})
    callbacks = [AdversarialPrompting(prompt(), attack), evaluation]
    run = trainer(*callbacks, max_epochs=3, default_root_dir=tmp_path)
    run.fit(host, loader())
    (result,) = run.test(host, loader(), verbose=False)
    assert result["trust/robust_acc/adaptive"] <= result["trust/robust_acc/transfer"] + 1 / 48
    assert result["trust/robust_acc/transfer"] <= result["acc"] + 1e-6


def test_an_anti_adversary_makes_a_classifier_surer():
    net, (x, _) = network(), images()
    surer, plain = AntiAdversary(net, steps=2, lr=0.05)(x), net(x)
    assert torch.equal(surer.argmax(dim=1), plain.argmax(dim=1))
    assert (surer.softmax(1).amax(1) > plain.softmax(1).amax(1)).all()
    assert all(parameter.requires_grad for parameter in net.parameters())
    for arguments, words in (({"steps": 0}, "`steps` to be at least 1"), ({"lr": 0.0}, "`lr` to be positive")):
        with pytest.raises(ValueError, match=words):
            AntiAdversary(net, **arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prompt(size=4), "2 \\* size below image_size=8, but got 4"),
        (lambda: prompt(shape="round"), "'pad' or 'full', but got 'round'"),
        (lambda: prompt(num_prompts=0), "`num_prompts` to be at least 1, but got 0"),
        (lambda: prompt().images(torch.zeros(1, 3, 8, 8)), r"shape \(B, 1, 8, 8\), but got \(1, 3, 8, 8\)"),
        (lambda: prompt().after(torch.zeros(6, 4)), r"shape \(B, 3\), one class a prompt, but got \(6, 4\)"),
        (lambda: AdversarialPrompting(prompt(), tau=-0.1), "`tau` to be at least 0, but got -0.1"),
        (lambda: AdversarialPrompting(prompt(), beta=-1.0), "`beta` to be at least 0, but got -1.0"),
        (lambda: AdversarialPrompting(prompt(), terms=(True,)), "three booleans"),
        (lambda: Surrounded(network(), prompt(), chunk=0), "`chunk` to be at least 1, but got 0"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (lambda x, y: x * 255.0, lambda x, y: y, r"images in \[0, 1\], where prompts are clipped"),
        (lambda x, y: x, lambda x, y: y + 1, r"targets in \[0, num_prompts=3\), but got 1 to 3"),
        (lambda x, y: x, lambda x, y: F.one_hot(y).float(), "one class a sample as targets"),
    ],
)
def test_bad_data(x, y, words):
    data = images(24)
    rows = DataLoader(TensorDataset(x(*data), y(*data)), batch_size=24)
    with pytest.raises(ValueError, match=words):
        trainer(AdversarialPrompting(prompt()), max_epochs=1).fit(Classifier(), rows)
