"""Weights in files: every kind of file, names of holders and of compiled modules, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_trust.core.saved_weights import fitting_weights, load_weights, read_weights


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("kind", ["checkpoint", "state dict", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "host.net.", "_orig_mod."])
def test_every_kind_of_file(tmp_path, kind, prefix):
    trained, fresh = net(), net()
    trained(torch.rand(5, 2))
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    if prefix == "host.net.":
        state["other.weight"] = torch.zeros(1)
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1} if kind == "checkpoint" else state, path)
    assert read_weights(str(path)).keys() == state.keys()
    if prefix == "host.net.":
        with pytest.raises(ValueError, match=r"another architecture: 7 missing: 0\.weight"):
            load_weights(fresh, path)
    load_weights(fresh, path, inside=prefix == "host.net.")
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = dict(net().state_dict(), extra=torch.zeros(1))
    found.pop("0.bias")
    found["0.weight"] = torch.zeros(3, 4)
    words = r"a\.ckpt to hold the weights of Sequential, .* 1 missing: 0\.bias; 1 unexpected: extra; 1 of another shape"
    with pytest.raises(ValueError, match=words + r": 0\.weight \(\(3, 4\) instead of \(3, 2\)\)"):
        fitting_weights(found, module, "a.ckpt")
    torch.save(found, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="another architecture"):
        load_weights(module, tmp_path / "a.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_files_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="but 'none.ckpt' does not exist"):
        read_weights("none.ckpt")
    for content, words in (({}, "an empty dict"), ([1], "a list"), ({"a": 1, "b": 2}, "no tensors: a, b")):
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=words):
            read_weights(tmp_path / "a.ckpt")
    for name in ("a.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=r"loads as weights only|whole safetensors file"):
            read_weights(tmp_path / name)
