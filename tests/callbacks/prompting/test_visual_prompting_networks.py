"""VisualPrompting on networks of timm, torchvision and open_clip: the conformance suite, and nothing frozen moves."""

from __future__ import annotations

from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.callbacks import IterativeLabelMapping, VisualPrompting
from lightning_trust.core.wrapping import checksum
from lightning_trust.nn import ClipClassifier, LabelMapping, PadPrompt, create_backbone, create_clip
from tests.callbacks.prompting.test_ilm_vp import trainer
from tests.conformance import BATCH, CallbackConformance, Data

SIZE, CANVAS, TARGETS = 12, 16, 3
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": CANVAS, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def timm_network():
    return create_backbone("timm:test_resnet", num_classes=7)


def torchvision_network():
    return create_backbone("torchvision:mobilenet_v3_small", num_classes=7)


def open_clip_network():
    model, tokenizer = create_clip(config=CLIP)
    return ClipClassifier(model, tokenizer, ["a", "b", "c"], ["one {}", "two {}"])


class ImageHost(pl.LightningModule):
    """A user's module around a network of a library: its loss is that of the task."""

    network = staticmethod(timm_network)

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = self.network().requires_grad_(True)
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)


class TorchvisionHost(ImageHost):
    network = staticmethod(torchvision_network)


class OpenClipHost(ImageHost):
    network = staticmethod(open_clip_network)


class ImageData(Data):
    """Few images with three channels."""

    def _loader(self, count, seed, shuffle=False):
        generator = torch.Generator().manual_seed(seed)
        dataset = TensorDataset(torch.rand(count, 3, SIZE, SIZE, generator=generator), torch.arange(count) % TARGETS)
        if not torch.distributed.is_initialized() or count != 48:
            return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=DistributedSampler(dataset, shuffle=shuffle))

    def train_dataloader(self):
        return self._loader(48, 3, self.shuffle)

    def val_dataloader(self):
        return self._loader(16, 4)

    def test_dataloader(self):
        return self._loader(16, 5)


def arguments(sources):
    prompt = {"class_path": "PadPrompt", "init_args": {"image_size": SIZE, "out_size": CANVAS}}
    mapping = {"num_source": sources, "num_target": TARGETS, "method": "identity"}
    return {"prompt": prompt, "mapping": {"class_path": "LabelMapping", "init_args": mapping}}


class _OnImages(CallbackConformance):
    callback = VisualPrompting
    # sums of float32 in a deep network
    tolerance: ClassVar[float] = 1e-3

    def data(self, **kwargs):
        return ImageData(**kwargs)


class TestTimm(_OnImages):
    host = ImageHost
    arguments: ClassVar = arguments(7)


class TestTorchvision(_OnImages):
    host = TorchvisionHost
    arguments: ClassVar = arguments(7)


class TestOpenClip(_OnImages):
    host = OpenClipHost
    arguments: ClassVar = arguments(6)


del _OnImages


@pytest.mark.parametrize(("host", "sources"), [(ImageHost, 7), (TorchvisionHost, 7), (OpenClipHost, 6)])
def test_parameters_and_buffers_are_what_they_were(host, sources):
    module = host()
    before = checksum(module)
    prompting = VisualPrompting(PadPrompt(SIZE, CANVAS), LabelMapping(sources, TARGETS))
    run = trainer(prompting, IterativeLabelMapping(), max_epochs=2)
    run.fit(module, datamodule=ImageData(batch_size=BATCH))
    run.test(module, datamodule=ImageData(), verbose=False)
    assert checksum(module) == before
    assert bool((prompting.prompt.delta[prompting.prompt.mask.bool()] != 0).all())
