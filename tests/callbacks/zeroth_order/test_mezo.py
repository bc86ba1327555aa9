"""A language model with LoRA, unchanged, trained from forward passes: MeZO, and RGE in place of back-propagation."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_trust.core.randomness
from lightning_trust.callbacks import ExactResume, SaveAdapter, ZerothOrderGradient
from lightning_trust.modules import CausalLanguageModel
from lightning_trust.nn import LoRA, create_causal_network
from lightning_trust.optim import RGE, MeZO
from tests.conformance import Kill
from tests.modules.language.test_causal_language_model import LLAMA, QUIET, data
from tests.two_ranks import assert_equal_states, fit_on_two_ranks

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

#: about 60,000 parameters, of which the adapter has 2,048
NETWORK = {**LLAMA, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
MEZO = partial(MeZO, lr=0.02, mu=1e-3, seed=1)
ADAM = partial(torch.optim.Adam, lr=0.02)
SOURCES = {
    "mezo": (MEZO, ZerothOrderGradient),
    "mezo without clean forwards": (MEZO, partial(ZerothOrderGradient, clean_forward=False)),
    "mezo of four directions": (partial(MEZO, q=4), ZerothOrderGradient),
    "rge": (ADAM, partial(ZerothOrderGradient, RGE(q=4), seed=1)),
}


def made(optimizer: Any = MEZO, dropout: float = 0.2, **settings: Any) -> CausalLanguageModel:
    torch.manual_seed(5)
    lora = LoRA(r=4, alpha=16.0, dropout=dropout, target_modules=["q_proj", "v_proj"])
    return CausalLanguageModel(config=NETWORK, lora=lora, optimizer=optimizer, **settings)


def fitted(host: pl.LightningModule, *callbacks: Any, **settings: Any) -> pl.Trainer:
    run = pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, "limit_val_batches": 0, **settings})
    run.fit(host, data())
    return run


def loss_of(host: pl.LightningModule) -> float:
    (found,) = pl.Trainer(**QUIET).validate(host, data(), verbose=False)
    return found["val/loss"]


@pytest.mark.parametrize("name", list(SOURCES))
def test_the_adapter_of_an_unchanged_model_is_trained(name):
    optimizer, source = SOURCES[name]
    host = made(optimizer)
    before, start = {key: value.clone() for key, value in host.state_dict().items()}, loss_of(host)
    run = fitted(host, source(), max_epochs=10)
    assert run.global_step == 40
    # a loss of 5.6, of which little is the adapter's
    assert loss_of(host) < start - 0.02
    moved = {key for key, value in host.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, parameter in host.named_parameters() if parameter.requires_grad}
    assert all("lora_" in key for key in moved)
    assert 0.0 < run.callback_metrics["trust/zo_snr"] < 1.0
    if "mezo" in name:
        assert all(parameter.grad is None for parameter in host.parameters())


@pytest.mark.parametrize("name", ["mezo", "mezo without clean forwards", "rge"])
def test_all_evaluations_of_a_step_have_the_same_dropout(name, monkeypatch):
    optimizer, source = SOURCES[name]
    host = made(optimizer, dropout=0.5)
    kept: dict[int, list[torch.Tensor]] = {}
    dropout = next(module for module in host.modules() if isinstance(module, nn.Dropout))
    # which entries of its inputs came through
    dropout.register_forward_hook(
        lambda _, args, out: kept.setdefault(host.trainer.fit_loop.total_batch_idx, []).append((out != 0).int())
    )
    fitted(host, source())
    assert len(kept) == 4
    for masks in kept.values():
        assert len(masks) >= 2
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        assert 0.3 < masks[0].float().mean() < 0.7
    assert not torch.equal(kept[0][0][:, :20], kept[1][0][:, :20])
    # without the replay of random numbers the loss is seen to be a stochastic one
    monkeypatch.setattr(lightning_trust.core.randomness.RepeatedDraws, "rewind", lambda self: None)
    host = made(optimizer, dropout=0.5)
    for key, parameter in host.named_parameters():
        if "lora_B" in key:
            # an adapter that is zero does not see its dropout
            nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="stochastic closure"):
        fitted(host, source())


def test_a_budget_far_below_the_published_one_is_warned_of():
    with pytest.warns(UserWarning, match="MeZO makes little progress in a step: .* 20,000 or more, .* this one has 4"):
        fitted(made(), ZerothOrderGradient())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*makes little progress")
        # first-order runs, and those of estimators without such a budget, are not warned
        fitted(made(ADAM), ZerothOrderGradient(RGE()), max_steps=1)
        fitted(made(), ZerothOrderGradient(), fast_dev_run=True)


def test_peft_loads_the_adapter(tmp_path):
    host = made(partial(MeZO, lr=0.5))
    fitted(host, ZerothOrderGradient(), SaveAdapter(str(tmp_path)))
    torch.manual_seed(5)
    # the base as it was drawn
    loaded = peft.PeftModel.from_pretrained(create_causal_network(config=NETWORK), tmp_path)
    tokens = torch.arange(12).view(2, 6)
    found = loaded.eval()(tokens).logits
    torch.testing.assert_close(found, host.network.eval()(tokens).logits, rtol=0.0, atol=0.0)
    assert not torch.allclose(found, made().network.eval()(tokens).logits)


@pytest.mark.parametrize("name", ["mezo", "rge"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, name):
    optimizer, source = SOURCES[name]

    def run(folder, *extra, **kwargs):
        host = made(optimizer, dropout=0.3, schedule="cosine")
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        each = pl.Trainer(
            callbacks=[source(), ExactResume(), saver, *extra],
            **{**QUIET, "enable_checkpointing": True, "max_epochs": 2, "default_root_dir": folder},
        )
        each.fit(host, data(), **kwargs)
        return host

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(3))
    torch.rand(3)
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_states(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", ["mezo", "rge"])
def test_two_ranks_are_equal(tmp_path, name):
    optimizer, source = SOURCES[name]
    first, second = fit_on_two_ranks(tmp_path, made(optimizer), data(batch_size=4), [source()], max_epochs=1)
    assert_equal_states(first, second)
    assert any(not torch.equal(first[key], value) for key, value in made(optimizer).state_dict().items())


def test_gradient_checkpointing_does_no_harm():
    found = []
    for on in (False, True):
        host = made(gradient_checkpointing=on)
        fitted(host, ZerothOrderGradient())
        found.append(host.state_dict())
    assert_equal_states(*found)


def test_bf16():
    host = made(partial(MeZO, lr=0.02, mu=1e-2))
    with pytest.warns(UserWarning, match="below what half precision can tell apart"):
        run = fitted(host, ZerothOrderGradient(), precision="bf16-true")
    assert {value.dtype for value in host.state_dict().values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in host.state_dict().values())
    assert any(not torch.equal(p, q) for p, q in zip(host.parameters(), made().bfloat16().parameters(), strict=True))
    # the loss has single precision
    assert run.optimizers[0].last.loss.dtype == torch.float32


def test_all_weights_are_trained_where_there_is_no_adapter():
    torch.manual_seed(5)
    host = CausalLanguageModel(config=NETWORK, optimizer=partial(MeZO, lr=1e-3))
    start = loss_of(host)
    fitted(host, ZerothOrderGradient(), max_epochs=10)
    assert loss_of(host) < start - 0.1
