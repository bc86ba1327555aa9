"""CLIP as a classifier, against its formula in NumPy and open_clip's own zero-shot classifier."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import nn

from lightning_trust.core.wrapping import checksum
from lightning_trust.functional.prompting import frequency_label_mapping
from lightning_trust.nn import (
    CLIP_TEMPLATES_81,
    ClipClassifier,
    ClipTextEncoder,
    TextEncoder,
    class_texts,
    clean_class_name,
    create_clip,
)

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NAMES = ["T-shirt/top", "Ankle_boot", "Bag"]
TEMPLATES = ["This is a photo of a {}.", "a {}", "the {}"]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return create_clip(config=CONFIG)


@pytest.fixture
def model(parts):
    return ClipClassifier(copy.deepcopy(parts[0]), parts[1], NAMES, TEMPLATES)


def images(rows=5):
    return torch.randn(rows, 3, 28, 28, generator=torch.Generator().manual_seed(3))


# -- texts -------------------------------------------------------------------------------------------------------------
def test_the_81_templates_are_the_default_one_and_the_published_ones():
    assert len(CLIP_TEMPLATES_81) == 81
    assert CLIP_TEMPLATES_81[0] == "This is a photo of a {}."
    assert [each.replace("{}", "x") for each in CLIP_TEMPLATES_81[1:]] == [t("x") for t in OPENAI_IMAGENET_TEMPLATES]


def test_names_are_cleaned_and_texts_are_template_major():
    assert [clean_class_name(name) for name in NAMES] == ["t shirt/top", "ankle boot", "bag"]
    texts = class_texts(NAMES, TEMPLATES)
    expected = [template.replace("{}", name) for template in TEMPLATES for name in ("t shirt/top", "ankle boot", "bag")]
    assert list(texts) == expected


def test_braces_of_a_name_are_no_slot():
    assert class_texts(["{x}"], ["a {}, {0}"]) == ("a {x}, {0}",)


@pytest.mark.parametrize(
    ("names", "templates", "match"),
    [
        (["bag", ""], ["a {}"], "names with a letter or digit, but got ''"),
        (["_-"], ["a {}"], "names with a letter or digit, but got '_-'"),
        ([], ["a {}"], "`class_names` to be a list of at least one text, but got \\[\\]"),
        ("bag", ["a {}"], "`class_names` to be a list of at least one text, but got 'bag'"),
        (["bag"], [], "`templates` to be a list"),
        (["bag"], ["a photo"], "one slot '{}' for the name of a class, but got 'a photo'"),
        (["bag"], ["{} or {}"], "one slot"),
    ],
)
def test_bad_texts_are_refused(names, templates, match):
    with pytest.raises(ValueError, match=match):
        class_texts(names, templates)


# -- logits ------------------------------------------------------------------------------------------------------------
def test_logits_are_scaled_cosines_of_images_and_texts(parts, model):
    clip, tokenizer = parts
    x = images()
    with torch.no_grad():
        image = clip.encode_image(x).double().numpy()
        texts = [t.replace("{}", n) for t in TEMPLATES for n in ("t shirt/top", "ankle boot", "bag")]
        text = np.stack([clip.encode_text(tokenizer([each]))[0].double().numpy() for each in texts])
    cosines = (image @ text.T) / np.linalg.norm(image, axis=1)[:, None] / np.linalg.norm(text, axis=1)
    expected = np.exp(clip.logit_scale.item()) * cosines
    np.testing.assert_allclose(model(x).numpy(), expected, atol=1e-5)
    assert model.num_source == len(model.source_names) == 9


def test_zero_shot_over_templates_is_open_clips(parts, model):
    clip, tokenizer = parts
    words = [clean_class_name(name) for name in NAMES]
    functions = [lambda name, t=template: t.replace("{}", name) for template in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(clip, tokenizer, words, functions)
    x = images()
    with torch.no_grad():
        expected = clip.logit_scale.exp() * clip.encode_image(x, normalize=True) @ weights
    torch.testing.assert_close(model.zero_shot(x), expected, rtol=0.0, atol=1e-5)


def test_zero_shot_of_one_template_is_its_part_of_the_logits(model):
    x = images()
    for place, template in enumerate(TEMPLATES):
        part = model(x)[:, 3 * place : 3 * place + 3]
        torch.testing.assert_close(model.zero_shot(x, place), part)
        torch.testing.assert_close(model.zero_shot(x, template), part)
    single = ClipClassifier(model.clip, open_clip.SimpleTokenizer(context_length=24), NAMES, TEMPLATES[:1])
    torch.testing.assert_close(single.zero_shot(x), single(x))


def test_unknown_templates_are_refused(model):
    with pytest.raises(ValueError, match=r"in \[0, 2\], but got 3"):
        model.zero_shot(images(), 3)
    with pytest.raises(ValueError, match=r"of the 3 templates, but got 'a {'. Close names: 'a {}'"):
        model.zero_shot(images(), "a {")


def test_a_bias_of_the_logits_is_added(parts, model):
    x = images()
    before = model(x)
    model.clip.logit_bias = nn.Parameter(torch.tensor(-3.0), requires_grad=False)
    torch.testing.assert_close(model(x), before - 3.0)


def test_the_bank_does_not_depend_on_how_many_texts_are_encoded_together(parts, model):
    other = ClipClassifier(*parts, NAMES, TEMPLATES, batch_size=2)
    torch.testing.assert_close(other.bank, model.bank)


# -- frozen ------------------------------------------------------------------------------------------------------------
def test_nothing_of_the_model_is_trained_and_gradients_reach_the_images(model):
    before = checksum(model)
    model.train()
    assert model.training
    assert not any(module.training for module in model.clip.modules())
    x = images().requires_grad_()
    model(x).square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert checksum(model) == before


def test_copies_and_pickles_compute_the_same(model):
    x = images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x), rtol=0.0, atol=0.0)
    assert "bank" in model.state_dict()


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 32, 28), (3, 28, 28)])
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"shape \(B, 3, 28, 28\), as the CLIP model takes them, but got \("):
        model(torch.zeros(shape))


# -- the choice of texts (oracle 7) ------------------------------------------------------------------------------------
class ToyClip(nn.Module):
    """Images are class directions; texts of one template are too, those of the others are drowned in noise."""

    def __init__(self, classes=4, clean=2, templates=3):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.visual = nn.Flatten()
        self.directions = nn.Parameter(torch.eye(3 * 16)[:classes])
        noise = 3.0 * torch.randn(templates, classes, 48, generator=torch.Generator().manual_seed(1))
        noise[clean] = 0.0
        self.texts = nn.Parameter((self.directions + noise).flatten(0, 1).detach())

    def encode_image(self, x):
        return x.flatten(1)

    def encode_text(self, tokens):
        return self.texts[tokens[:, 0]]


def test_every_class_chooses_the_template_without_noise():
    classes = 4
    texts = class_texts([f"c{k}" for k in range(classes)], ["zero {}", "one {}", "two {}"])
    model = ClipClassifier(
        ToyClip(classes),
        lambda given: torch.tensor([[texts.index(text)] for text in given]),
        [f"c{k}" for k in range(classes)],
        ["zero {}", "one {}", "two {}"],
    )
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(classes).repeat(50)
    x = torch.eye(48)[targets] + 0.2 * torch.randn(len(targets), 48, generator=generator)
    logits = model(x.view(-1, 3, 4, 4))
    counts = torch.zeros(model.num_source, classes, dtype=torch.long)
    counts.index_put_((logits.argmax(dim=1), targets), torch.tensor(1), accumulate=True)
    chosen = frequency_label_mapping(counts).flatten()
    assert chosen.tolist() == [2 * classes + k for k in range(classes)]
    accuracy = [
        (each.argmax(dim=1) == targets).float().mean().item()
        for each in (logits[:, chosen], model.zero_shot(x.view(-1, 3, 4, 4), 0))
    ]
    assert accuracy[0] > 0.95
    assert accuracy[0] > accuracy[1] + 0.1


# -- the encoder of texts ----------------------------------------------------------------------------------------------
def test_text_encoder_gives_embeddings_of_length_one_in_order(parts):
    clip, tokenizer = parts
    clip = copy.deepcopy(clip).train()
    encoder = ClipTextEncoder(clip, tokenizer, batch_size=2)
    found = encoder(["a bag", "a coat", "a bag"])
    assert found.shape == (3, 16)
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found[0], found[2], rtol=0.0, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert clip.training
    assert isinstance(encoder, TextEncoder)


def test_texts_that_would_be_cut_are_refused(parts):
    encoder = ClipTextEncoder(*parts)
    fits = " ".join(["bag"] * 22)
    assert encoder([fits]).shape == (1, 16)
    with pytest.raises(ValueError, match="at most 22 tokens, the context of the model, but got 'bag bag"):
        encoder(["bag", f"{fits} bag"])


def test_an_encoder_without_directions_is_refused():
    toy = ToyClip(2)
    with torch.no_grad():
        toy.texts[1] = 0.0
    encoder = ClipTextEncoder(toy, lambda given: torch.arange(len(given)).unsqueeze(1))
    with pytest.raises(ValueError, match="that of 'second' has the length 0.0"):
        encoder(["first", "second"])


def test_wrong_encoders_are_refused(parts):
    with pytest.raises(ValueError, match=r"`tokenizer` beside a model, .* model='CLIP' and tokenizer=None"):
        ClipTextEncoder(parts[0])
    with pytest.raises(ValueError, match="`tokenizer` beside a model, .* model='ViT-B-32'"):
        ClipTextEncoder("ViT-B-32", parts[1])
    with pytest.raises(ValueError, match="`batch_size` to be a positive integer, but got 0"):
        ClipTextEncoder(*parts, batch_size=0)
    with pytest.raises(ValueError, match="`names` to be a list of at least one text, but got 'bag'"):
        ClipTextEncoder(*parts)("bag")
