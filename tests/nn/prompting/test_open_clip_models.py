"""CLIP models by name, file, folder and configuration; files that open_clip itself loads."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from open_clip import factory

from lightning_trust.nn import create_clip, save_clip
from lightning_trust.nn.prompting.open_clip_models import load_open_clip, preprocessing, split_name
from tests.two_ranks import assert_equal_states

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CONFIG = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}


@pytest.fixture(autouse=True)
def _registry_restored(monkeypatch):
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    model, _ = create_clip(config=CONFIG)
    folder = tmp_path / "tiny_clip"
    weights = save_clip(folder, model, CONFIG)
    return model, folder, weights


def test_configuration_makes_the_model_its_tokenizer_and_its_preprocessing():
    model, tokenizer = create_clip(config=CONFIG)
    assert type(model) is open_clip.CLIP
    assert tokenizer(["a bag"]).shape == (1, 20)
    assert preprocessing(model) == ((28, 28), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    plain, _ = create_clip(config=MODEL)
    assert preprocessing(plain) == ((28, 28), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def test_every_way_to_load_what_was_saved_gives_the_same(saved):
    model, folder, weights = saved
    json_file = folder / "tiny_clip.json"
    for name in (
        str(folder),
        f"local-dir:{folder}",
        f"{json_file}/{weights}",
    ):
        again, tokenizer = create_clip(name)
        assert_equal_states(again.state_dict(), model.state_dict())
        assert tokenizer(["a bag"]).shape == (1, 20)
    assert preprocessing(create_clip(str(folder))[0])[1] == (0.1, 0.2, 0.3)


def test_open_clip_loads_what_was_saved_as_it_loads_published_models(saved):
    model, folder, weights = saved
    assert_equal_states(open_clip.create_model(f"local-dir:{folder}").state_dict(), model.state_dict())
    open_clip.add_model_config(folder / "tiny_clip.json")
    by_file, _, transform = open_clip.create_model_and_transforms("tiny_clip", pretrained=str(weights))
    assert_equal_states(by_file.state_dict(), model.state_dict())
    assert transform is not None
    # and so do we, by the registered name
    again, _ = create_clip(f"tiny_clip/{weights}")
    assert_equal_states(again.state_dict(), model.state_dict())


def test_saving_leaves_no_other_files_and_no_ties_to_the_model(saved):
    _, folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tiny_clip.json",
    ]
    assert json.loads((folder / "tiny_clip.json").read_text()) == MODEL


def test_names_are_taken_apart():
    assert split_name("ViT-B-32") == ("ViT-B-32", None)
    assert split_name("ViT-B/32/openai") == ("ViT-B-32", "openai")
    assert split_name("ViT-B-32/a/b.pt") == ("ViT-B-32", "a/b.pt")
    # a longer name of a model comes first
    assert split_name("ViT-B-32-quickgelu/openai") == ("ViT-B-32-quickgelu", "openai")


def test_published_weights_bring_their_activation(monkeypatch):
    calls = []

    def create_model(name, **arguments):
        calls.append((name, arguments))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag in ("openai", "laion2b_s34b_b79k"):
        create_clip(f"ViT-B-32/{tag}")
    assert [(name, each["pretrained"], each.get("force_quick_gelu", False)) for name, each in calls] == [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ]


def test_no_weights_are_asked_for_without_a_tag(monkeypatch):
    for name in ("download_pretrained", "download_pretrained_from_hf"):
        monkeypatch.setattr(factory, name, lambda *_, **__: pytest.fail("asked for weights"))
    model, tokenizer = create_clip("RN50", image_size=64)
    assert preprocessing(model)[0] == (64, 64)
    assert tokenizer.context_length == 77


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("ViT-B-23", "but got 'ViT-B-23'. Close names: 'ViT-B-32'"),
        ("ViT-B-32/opanai", "neither. Close names: 'openai'"),
        ("ViT-B-32/nowhere.pt", "'nowhere.pt' in 'ViT-B-32/nowhere.pt' to be a file or published weights of ViT-B-32"),
        ("local-dir:nowhere", "a folder with open_clip_config.json, but got 'local-dir:nowhere'"),
        ("nowhere.json", "a configuration file, but got 'nowhere.json'"),
    ],
)
def test_unknown_names_are_refused_with_close_ones(name, match):
    with pytest.raises(ValueError, match=match):
        create_clip(name)


def test_bad_configurations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="text_cfg is missing among \\['embed_dim', 'vision_cfg'\\]"):
        create_clip(config={"embed_dim": 8, "vision_cfg": {}})
    with pytest.raises(ValueError, match="one of arguments `model` and `config`, but got model=None and config=None"):
        create_clip()
    with pytest.raises(ValueError, match="one of arguments `model` and `config`"):
        create_clip("ViT-B-32", CONFIG)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.json to be a configuration of open_clip, but it is damaged"):
        create_clip(str(tmp_path / "model.json"))


def test_the_environment_stays_the_users(monkeypatch):
    import os
    import sys

    for value in (None, "true"):
        for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
            monkeypatch.delitem(sys.modules, name)
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        assert load_open_clip().__name__ == "open_clip"
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value
