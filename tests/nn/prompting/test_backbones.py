"""Backbones by name: what is known of them, what is frozen, and what is refused. No weights are downloaded."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.nn import Backbone, BackboneSpec, ClipClassifier, create_backbone, create_clip, save_clip
from lightning_trust.nn.prompting import backbones

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CLIP_CONFIG = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.3] * 3, "std": [0.4] * 3}}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, create_clip(config=CLIP_CONFIG)[0], CLIP_CONFIG)
    return folder


# -- what is known -----------------------------------------------------------------------------------------------------
def test_timm_networks_are_known_by_their_configuration():
    backbone = create_backbone("timm:vit_tiny_patch16_224")
    assert backbone.spec == BackboneSpec(
        name="timm:vit_tiny_patch16_224",
        kind="classifier",
        num_outputs=1000,
        image_size=(224, 224),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    assert create_backbone("timm:vit_tiny_patch16_224.augreg_in21k").num_source == 21843
    tiny = create_backbone("timm:vit_tiny_patch16_224", num_classes=12, image_size=32)
    assert tiny.spec.image_size == (32, 32)
    assert tiny(torch.zeros(2, 3, 32, 32)).shape == (2, 12)


def test_torchvision_networks_are_known_by_their_preset():
    backbone = create_backbone("torchvision:resnet18")
    assert (backbone.num_source, backbone.spec.image_size) == (1000, (224, 224))
    assert backbone.spec.mean == (0.485, 0.456, 0.406)
    # of random weights, the outputs mean nothing
    assert backbone.source_names is None
    assert isinstance(backbone.network, torchvision.models.ResNet)
    # the size belongs to the weights
    assert create_backbone("torchvision:efficientnet_b1", num_classes=3).spec.image_size == (240, 240)


def test_published_weights_of_torchvision_are_asked_for_by_name(monkeypatch):
    asked = []

    def get_model(name, weights=None, **arguments):
        asked.append(weights)
        return nn.Linear(2, 2)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    plain = create_backbone("torchvision:resnet50")
    tagged = create_backbone("torchvision:resnet50/IMAGENET1K_V1")
    default = create_backbone("torchvision:resnet50", pretrained=True)
    weights = torchvision.models.ResNet50_Weights
    assert asked == [None, weights.IMAGENET1K_V1, weights.DEFAULT]
    assert plain.source_names is None
    assert tagged.source_names[1] == default.source_names[1] == "goldfish"
    assert len(default.source_names) == 1000


def test_published_weights_of_timm_are_asked_for(monkeypatch):
    create = timm.create_model
    asked = []

    def create_model(name, pretrained=False, **arguments):
        asked.append((name, pretrained))
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    backbone = create_backbone("timm:test_resnet.r160_in1k", pretrained=True)
    create_backbone("timm:test_resnet")
    assert asked == [("test_resnet.r160_in1k", True), ("test_resnet", False)]
    assert backbone.source_names[:2] == ("tench", "goldfish")
    assert len(backbone.source_names) == 1000


def test_networks_of_one_channel_have_statistics_of_one():
    backbone = create_backbone("torchvision:squeezenet1_1", num_classes=3, in_channels=1)
    assert backbone.spec.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert backbone(backbone.spec.input_space.from_raw(torch.rand(2, 1, 64, 64))).shape == (2, 3)


def test_own_networks_and_import_paths_take_what_they_are_told(tmp_path):
    first = create_backbone("SmallCNN", num_classes=4, in_channels=1, class_names="abcd", mean=[0.2], std=[0.3])
    assert first.source_names == ("a", "b", "c", "d")
    assert (first.spec.mean, first.spec.std, first.spec.image_size) == ((0.2,), (0.3,), None)
    # a checkpoint of a module that holds the network
    state = {f"net.{name}": value for name, value in first.network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "host.ckpt")
    second = create_backbone(
        "lightning_trust.nn.SmallCNN",
        checkpoint=str(tmp_path / "host.ckpt"),
        num_classes=4,
        in_channels=1,
    )
    assert second.sha256() == first.sha256()


def test_clip_is_a_classifier_whose_classes_are_texts(clip_folder):
    backbone = create_backbone(
        f"open_clip:{clip_folder}", class_names=["Bag", "Coat"], templates=["a {}.", "the {}.", "my {}."]
    )
    assert isinstance(backbone.network, ClipClassifier)
    assert (backbone.kind, backbone.num_source) == ("clip", 6)
    assert backbone.source_names[:3] == ("a bag.", "a coat.", "the bag.")
    assert backbone.spec.image_size == (28, 28)
    assert (backbone.spec.mean, backbone.spec.std) == ((0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(backbone(x), backbone.network(x), rtol=0.0, atol=0.0)
    # the hash is of the model, and not of the texts
    other = create_backbone(f"open_clip:{clip_folder}", class_names=["Dress"], templates=["a {}."])
    assert other.sha256() == backbone.sha256()
    random = create_backbone(f"open_clip:{clip_folder / (clip_folder.name + '.json')}", class_names=["Dress"])
    assert random.num_source == 81
    assert random.sha256() != backbone.sha256()


def test_what_is_known_is_plain_data():
    spec = create_backbone("SmallCNN", num_classes=4, in_channels=1).spec
    again = json.loads(json.dumps(spec.as_dict()))
    assert BackboneSpec(**{key: tuple(v) if isinstance(v, list) else v for key, v in again.items()}) == spec


# -- frozen ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5", "open_clip"])
def test_a_frozen_network_is_not_changed_by_training_through_it(name, clip_folder):
    clip = {"class_names": ["Bag", "Coat"], "templates": ["a {}."]}
    path = f"open_clip:{clip_folder}" if name == "open_clip" else name
    torch.manual_seed(0)
    backbone = create_backbone(path, **(clip if name == "open_clip" else {"num_classes": 3}))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = backbone.sha256()
    nn.Sequential(backbone).train()
    assert backbone.training
    assert not any(module.training for module in backbone.network.modules() if module is not backbone.network)
    side = 28 if name == "open_clip" else 64
    x = torch.randn(2, 3, side, side, requires_grad=True)
    for _ in range(2):
        backbone.source_logits(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert backbone.sha256() == before


def test_a_network_that_is_not_frozen_trains():
    backbone = create_backbone("timm:test_resnet", num_classes=3, frozen=False)
    before = backbone.sha256()
    backbone.train()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    backbone(torch.randn(4, 3, 64, 64))
    # BatchNorm has seen a batch
    assert backbone.sha256() != before


def test_of_a_clip_that_is_not_frozen_the_image_tower_trains(clip_folder):
    backbone = create_backbone(f"open_clip:{clip_folder}", class_names=["Bag", "Coat"], frozen=False)
    backbone(torch.randn(2, 3, 28, 28)).softmax(dim=1)[:, 0].sum().backward()
    trained = {name.split(".")[2] for name, each in backbone.named_parameters() if each.requires_grad}
    assert trained == {"visual"}
    assert all(each.grad is not None for each in backbone.parameters() if each.requires_grad)


# -- refused -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm:resnet19", "a network of timm, but got 'timm:resnet19'. Close names: 'resnet18'|'resnet10t'"),
        ("timm:resnet18.a9_in1k", "but got 'timm:resnet18.a9_in1k'. Close names: 'resnet18.a"),
        ("torchvision:resnet19", "a network of torchvision, but got .* Close names: 'resnet1"),
        ("torchvision:resnet50/IMAGENET1K_V3", "Close names: 'IMAGENET1K_V"),
        ("resnet18", "'<library>:<model>' with one of .*, but got 'resnet18'. Close names: .*'timm:resnet18'"),
        ("tim:resnet18", "but got 'tim:resnet18'. Close names: 'timm:resnet18'"),
        ("timm:", "but got 'timm:'"),
        ("SmalCNN", "Close names: 'SmallCNN'"),
        ("nowhere.Net", "cannot be imported"),
        ("open_clip:ViT-B-23", "Close names: 'ViT-B-32'"),
    ],
)
def test_unknown_names_are_refused_with_close_ones(name, match):
    with pytest.raises(ValueError, match=match):
        create_backbone(name, num_classes=3) if "open_clip" not in name else create_backbone(name, class_names=["a"])


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("SmallCNN", {"pretrained": True, "num_classes": 3}, "'SmallCNN' has no published weights"),
        ("SmallCNN", {}, "Pass `num_classes`"),
        ("timm:test_resnet", {"pretrained": True, "num_classes": 3}, "have 1000 classes, but got num_classes=3"),
        ("torchvision:resnet50/IMAGENET1K_V1", {"num_classes": 3}, "have 1000 classes, but got num_classes=3"),
        ("timm:test_resnet", {"pretrained": True, "checkpoint": "a.pt"}, "one of arguments `pretrained` and"),
        ("timm:vit_base_patch14_dinov2", {}, "has features and no classes"),
        ("open_clip:ViT-B-32", {}, "Pass `class_names`"),
        ("open_clip:ViT-B-32", {"class_names": ["a"], "num_classes": 3}, "but got num_classes=3"),
        ("open_clip:ViT-B-32", {"class_names": ["a"], "in_channels": 1}, "but got in_channels=1"),
        ("open_clip:ViT-B-32", {"class_names": ["a"], "pretrained": True}, "but got pretrained=True"),
    ],
)
def test_what_does_not_go_together_is_refused(name, arguments, match):
    with pytest.raises(MisconfigurationException, match=match):
        create_backbone(name, **arguments)


def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name the 3 outputs of 'SmallCNN', but got 2 names"):
        create_backbone("SmallCNN", num_classes=3, class_names=["a", "b"])
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        create_backbone("SmallCNN", num_classes=3, checkpoint="nowhere.pt")
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), as 'SmallCNN' takes them, but got \(2, 1, 8, 8\)"):
        create_backbone("SmallCNN", num_classes=3)(torch.zeros(2, 1, 8, 8))


def test_any_network_can_be_a_backbone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    backbone = Backbone(network, BackboneSpec("mine", "classifier", 5))
    assert backbone(torch.zeros(1, 3, 2, 2)).shape == (1, 5)
    assert backbones.checksum(network) == backbone.sha256()
