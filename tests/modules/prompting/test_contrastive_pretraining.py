"""Contrastive pre-training: the loss in NumPy, two ranks as one, and files that load like published models."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as pl
import numpy as np
import open_clip
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from open_clip import factory
from torch.utils.data import DataLoader, DistributedSampler

from lightning_trust.modules import ContrastivePretraining
from lightning_trust.nn import ClipClassifier, create_backbone, create_clip
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CONFIG = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}}
NAMES = ["left", "right", "Top_half"]


class Halves(pl.LightningDataModule):
    """Images with one bright half, and captions that say which."""

    class_names = NAMES

    def __init__(self, rows=24, batch_size=8, sharded=False, captions=True):
        super().__init__()
        self.batch_size, self.sharded = batch_size, sharded
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(rows) % 3
        images = 0.2 * torch.rand(rows, 1, 8, 8, generator=generator)
        images[targets == 0, :, :, :4] += 0.8
        images[targets == 1, :, :, 4:] += 0.8
        images[targets == 2, :, :4] += 0.8
        words = ("left", "right", "top half")
        forms = ("This is a photo of a {}.", "{}")
        texts = [forms[row % 2].format(words[target]) for row, target in enumerate(targets.tolist())]
        columns = (images, targets.tolist(), texts) if captions else (images, targets.tolist())
        self.rows = list(zip(*columns, strict=True))

    def train_dataloader(self):
        # each rank's batch and the other's make the batch of one process
        sampler = DistributedSampler(self.rows, shuffle=False) if self.sharded else None
        return DataLoader(self.rows, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def model(**arguments):
    torch.manual_seed(0)
    return ContrastivePretraining(config=copy.deepcopy(CONFIG), **arguments)


def fast(params):
    return torch.optim.AdamW(params, lr=0.001)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def trainer(folder, **arguments):
    return pl.Trainer(**{**QUIET, "default_root_dir": folder, "max_epochs": 1, **arguments})


# -- the loss ----------------------------------------------------------------------------------------------------------
def test_loss_is_the_symmetric_cross_entropy_of_the_formula(tmp_path):
    host = model()
    data = Halves(rows=6, batch_size=6)
    images, _, captions = next(iter(data.train_dataloader()))
    tokens = host.tokenizer(list(captions))
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        u = host.network.encode_image((images.repeat(1, 3, 1, 1) - mean) / std).double().numpy()
        v = host.network.encode_text(tokens).double().numpy()
    u, v = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (u, v))
    exponentials = np.exp(u @ v.T / 0.07)  # the scale that CLIP begins with
    expected = -0.5 * np.mean(
        [
            math.log(exponentials[i, i] / exponentials[i].sum())
            + math.log(exponentials[i, i] / exponentials[:, i].sum())
            for i in range(6)
        ]
    )
    fitting = trainer(tmp_path)
    fitting.fit(host, data)
    assert fitting.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    assert fitting.callback_metrics["train/scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_equal_texts_have_one_embedding():
    host = model()
    embeddings = host.embed_texts(["a", "b", "a", "a b"])
    assert torch.equal(embeddings[0], embeddings[2])
    torch.testing.assert_close(embeddings[3], host.embed_texts(["a b"])[0])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


def test_two_ranks_compute_what_one_process_with_the_whole_batch_does(tmp_path):
    start = model(optimizer=sgd, schedule="constant")
    single = copy.deepcopy(start)
    data = Halves(rows=24, batch_size=8)
    # one process sees the rows of rank 0, then those of rank 1
    order = [row for first in (0, 8, 16) for rank in range(2) for row in range(first + rank, first + 8, 2)]
    data.rows = [data.rows[row] for row in order]
    trainer(tmp_path / "one").fit(single, data)
    ranks = fit_on_two_ranks(
        tmp_path / "two", start, Halves(rows=24, batch_size=4, sharded=True), [], max_epochs=1, limit_val_batches=0
    )
    assert_equal_states(*ranks)
    assert_equal_states(ranks[0], single.state_dict(), rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(value, model().state_dict()[name]) for name, value in ranks[0].items())


# -- training ----------------------------------------------------------------------------------------------------------
def test_it_learns_which_caption_belongs_to_which_image(tmp_path):
    host = model(optimizer=fast)
    fitting = trainer(tmp_path, max_epochs=70)
    fitting.fit(host, Halves())
    assert fitting.callback_metrics["val/acc"].item() == 1.0
    (tested,) = fitting.test(host, Halves(captions=False), verbose=False)
    assert tested == {"test/acc": 1.0}
    logits = torch.cat(fitting.predict(host, Halves()))
    assert logits.shape == (24, 3)
    assert logits.argmax(dim=1).tolist() == [0, 1, 2] * 8


def test_validation_before_training_leaves_nothing_behind(tmp_path):
    host = model(optimizer=fast, class_names=NAMES)
    fitting = trainer(tmp_path)
    first = fitting.validate(host, Halves(), verbose=False)
    assert 0.0 <= first[0]["val/acc"] <= 1.0
    fitting.fit(host, Halves())


def test_the_scale_is_held_at_a_hundred(tmp_path):
    for start, end in ((5.0, math.log(100.0)), (-1.0, 0.0), (2.0, 2.0)):
        host = model(optimizer=lambda params: torch.optim.SGD(params, lr=1e-8))
        with torch.no_grad():
            host.network.logit_scale.fill_(start)
        trainer(tmp_path).fit(host, Halves(rows=3, batch_size=3))
        assert host.network.logit_scale.item() == pytest.approx(end, abs=1e-5)


def test_gains_biases_and_the_scale_are_not_decayed(tmp_path):
    host = model()
    fitting = trainer(tmp_path)
    fitting.fit(host, Halves(rows=3, batch_size=3))
    decayed, others = fitting.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.2, 0.0)
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.98), 1e-6)
    assert {id(p) for p in others["params"]} == {id(p) for p in host.parameters() if p.ndim < 2}
    assert len(decayed["params"]) + len(others["params"]) == len(list(host.parameters()))


# -- what it writes ----------------------------------------------------------------------------------------------------
@pytest.fixture
def _registry_restored(monkeypatch):
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))


@pytest.mark.usefixtures("_registry_restored")
def test_the_model_is_written_and_loads_like_a_published_one(tmp_path):
    folder = tmp_path / "halves"
    host = model(optimizer=fast, schedule="constant", folder=str(folder))
    trainer(tmp_path, max_epochs=2).fit(host, Halves())
    open_clip.add_model_config(folder / "halves.json")
    published = open_clip.create_model("halves", pretrained=str(folder / "open_clip_model.safetensors"))
    assert_equal_states(published.state_dict(), host.network.state_dict())
    backbone = create_backbone(f"open_clip:{folder}", class_names=NAMES, templates=["This is a photo of a {}."])
    assert isinstance(backbone.network, ClipClassifier)
    images = next(iter(Halves().val_dataloader()))[0]
    mine = backbone(backbone.spec.input_space.from_raw(images.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(mine, host.eval().zero_shot(images, NAMES), rtol=1e-4, atol=1e-4)
    # and training goes on from it
    again = ContrastivePretraining(model=str(folder))
    assert_equal_states(again.network.state_dict(), host.network.state_dict())


def test_a_fast_dev_run_writes_nothing(tmp_path):
    host = model(folder=str(tmp_path / "model"))
    trainer(tmp_path, fast_dev_run=True).fit(host, Halves())
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_needs_nothing_but_itself(tmp_path):
    folder = tmp_path / "gone"
    first = model()
    first.export(folder)
    host = ContrastivePretraining(model=str(folder), templates=["{}"])
    fitting = trainer(tmp_path)
    fitting.fit(host, Halves(rows=3, batch_size=3))
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    for path in folder.iterdir():
        path.unlink()
    again = ContrastivePretraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.templates == ("{}",)
    assert again.input_space == host.input_space
    assert_equal_states(again.network.state_dict(), host.network.state_dict())


@pytest.mark.usefixtures("_registry_restored")
def test_the_activation_of_the_weights_is_written_down(tmp_path):
    config = {**MODEL, "quick_gelu": True}
    host = ContrastivePretraining(config={**CONFIG, "model_cfg": config})
    factory._MODEL_CONFIGS["plain-halves"] = MODEL
    host.export(tmp_path / "quick")
    quick, _ = create_clip(str(tmp_path / "quick"))
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in quick.modules())
    by_name = ContrastivePretraining(model="plain-halves")
    assert "quick_gelu" not in by_name.config["model_cfg"]
    assert by_name.config["preprocess_cfg"]["size"] == 8 or by_name.config["preprocess_cfg"]["size"] == (8, 8)


# -- refused -----------------------------------------------------------------------------------------------------------
def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of arguments `model` and `config`, but got model=None and config=None"):
        ContrastivePretraining()
    with pytest.raises(ValueError, match="Close names: 'ViT-B-32'"):
        ContrastivePretraining(model="ViT-B-23")
    with pytest.raises(ValueError, match="one slot '{}' for the name of a class, but got 'photo'"):
        model(templates=["photo"])
    with pytest.raises(ValueError, match="`schedule` to be"):
        model(schedule="linear")
    with pytest.raises(MisconfigurationException, match="needs batches .*, but got 2 parts"):
        trainer(tmp_path, limit_val_batches=0).fit(model(), Halves(captions=False))
    with pytest.raises(MisconfigurationException, match="names of the classes. Pass `class_names`"):
        trainer(tmp_path).validate(model(), Halves().val_dataloader())
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) or \(B, 1, H, W\), but got \(1, 2, 8, 8\)"):
        model()(torch.zeros(1, 2, 8, 8), ["a"])
    long = [(image, target, " ".join(["word"] * 20)) for image, target, _ in Halves().rows]
    with pytest.raises(ValueError, match="at most 14 tokens, the context of the model, but got 'word"):
        trainer(tmp_path).fit(model(), DataLoader(long, batch_size=4))
