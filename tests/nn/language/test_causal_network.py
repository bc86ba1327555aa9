"""Causal networks: built at random or from a folder; adapters; bad input."""

from __future__ import annotations

import importlib

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.nn import LoRA, create_causal_network, find_adapter, with_lora
from lightning_trust.nn.language.libraries import language_library

GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOKENS = torch.arange(12).view(2, 6)

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_random_weights_follow_the_global_seed(config):
    first, second = [(torch.manual_seed(3), create_causal_network(config=config))[1] for _ in range(2)]
    assert first.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert first(TOKENS).logits.shape == (2, 6, 40)
    assert create_causal_network(config=config, dtype="bfloat16")(TOKENS).logits.dtype == torch.bfloat16


def test_a_folder_is_loaded(tmp_path):
    torch.manual_seed(0)
    network = create_causal_network(config=LLAMA)
    network.save_pretrained(tmp_path)
    loaded = create_causal_network(str(tmp_path))
    torch.testing.assert_close(loaded(TOKENS).logits, network(TOKENS).logits, rtol=0.0, atol=0.0)


def test_an_adapter_is_what_its_formula_says():
    torch.manual_seed(0)
    network = create_causal_network(config=LLAMA, lora=LoRA(r=3, alpha=6.0, target_modules=["q_proj"])).eval()
    layer = network.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        x = torch.randn(5, 16)
        torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 6.0 / 3 * (x @ a.T @ b.T))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    assert find_adapter(torch.nn.ModuleDict({"net": network})) is network
    assert find_adapter(torch.nn.Linear(1, 1)) is None


def test_an_adapter_of_any_network():
    network = with_lora(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), LoRA(2, target_modules=["0"]))
    assert network(torch.ones(1, 4)).shape == (1, 3)
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == 2 * (4 + 3)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = create_causal_network(
            config=LLAMA, lora=LoRA(target_modules=["v_proj"]), gradient_checkpointing=checkpointing
        )
        network(TOKENS).logits.float().square().sum().backward()
        found.append([parameter.grad for parameter in network.parameters() if parameter.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert one is not None


def test_bad_input():
    for arguments in ({}, {"model": "gpt2", "config": GPT2}):
        with pytest.raises(MisconfigurationException, match="Expected one of the arguments `model`"):
            create_causal_network(**arguments)
    with pytest.raises(ValueError, match=r"`config` to have the key 'model_type', but got \['hidden_size'\]"):
        create_causal_network(config={"hidden_size": 3})
    with pytest.raises(ValueError, match="`dtype` to be one of .* but got 'int8'"):
        create_causal_network(config=GPT2, dtype="int8")
    with pytest.raises(ValueError, match="nowhere"):
        create_causal_network(config=GPT2, lora=LoRA(target_modules=["nowhere"]))
    for arguments, words in (
        ({"r": 0}, "`r` to be an integer of at least 1, but got 0"),
        ({"alpha": 0.0}, "`alpha` to be positive, but got 0.0"),
        ({"dropout": 1.0}, r"`dropout` to be in \[0, 1\), but got 1.0"),
        ({"target_modules": []}, r"`target_modules` to name a layer, or to be None, but got \[\]"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRA(**arguments)


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_missing_library_names_the_extra(name, monkeypatch):
    real = importlib.import_module

    def missing(wanted, *args):
        if wanted == name:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=rf'{name}: pip install "lightning_trust\[language\]"'):
        create_causal_network(config=GPT2, lora=LoRA(target_modules=["c_attn"]))


def test_a_library_that_is_broken_says_so_itself(monkeypatch):
    def broken(wanted, *args):
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="No module named 'safetensors'"):
        language_library("peft", "LoRA")
