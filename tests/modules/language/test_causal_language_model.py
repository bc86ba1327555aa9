"""CausalLanguageModel: its loss and logs, what it trains, checkpoints, YAML."""

from __future__ import annotations

import math
import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_trust.callbacks import ExactResume
from lightning_trust.core.schedules import LinearWarmup
from lightning_trust.datamodules import CodeOrProse
from lightning_trust.modules import CausalLanguageModel
from lightning_trust.nn import LoRA
from tests.conformance import Kill
from tests.two_ranks import assert_equal_states, fit_on_two_ranks

pytest.importorskip("transformers")
pytest.importorskip("peft")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 258, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
ADAPTER = LoRA(r=2, alpha=4.0, dropout=0.1, target_modules=["q_proj", "v_proj"])
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def data(**settings: Any) -> CodeOrProse:
    defaults = {"packages": ("email", "json"), "characters": 24, "max_length": 40, "batch_size": 8}
    rows = {"train_rows": 32, "val_rows": 20, "test_rows": 12}
    return CodeOrProse(**{**defaults, **rows, **settings})


def made(**settings: Any) -> CausalLanguageModel:
    torch.manual_seed(5)
    return CausalLanguageModel(**{"config": LLAMA, **settings})


def batch_of(module: CodeOrProse) -> dict[str, torch.Tensor]:
    module.setup()
    return next(iter(module.val_dataloader()))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_loss_is_that_of_transformers(config):
    host = made(config=config).eval()
    batch = batch_of(data())
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[0, :9] = -100
    batch["labels"] = labels
    host.log = lambda *args, **kwargs: None
    expected = host.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(host.training_step(batch, 0), expected)


def test_evaluation_counts_labels_and_classes():
    """By hand, over batches of unequal size and rows of unequal length."""
    host, module = made(), data()
    module.setup()
    # candidates as likely as the other tokens
    (found,) = pl.Trainer(**QUIET).validate(host, module, verbose=False)
    losses, right = [], []
    with torch.no_grad():
        for row in module.val_dataset:
            tokens = row["input_ids"]
            logits = host(tokens[None])[0, -2]
            losses.append(-logits.log_softmax(0)[tokens[-1]])
            right.append(logits[module.val_dataset.candidates].argmax() == (tokens[-1] == ord("p")).long())
    mean = torch.stack(losses).mean().item()
    assert found["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["val/acc"] == pytest.approx(torch.stack(right).float().mean().item())
    (found,) = pl.Trainer(**QUIET).test(host, module, verbose=False)
    assert set(found) == {"test/loss", "test/perplexity", "test/acc"}


def test_perplexity_of_a_network_that_knows_nothing():
    host = made()
    with torch.no_grad():
        host.network.lm_head.weight.zero_()
    (found,) = pl.Trainer(**QUIET).validate(host, data(), verbose=False)
    assert found["val/perplexity"] == pytest.approx(258.0, rel=1e-5)


def test_loss_that_is_no_number_is_seen():
    host = made()
    with torch.no_grad():
        host.network.lm_head.weight.fill_(math.nan)
    (found,) = pl.Trainer(**QUIET).validate(host, data(), verbose=False)
    assert math.isnan(found["val/loss"])


def test_prediction():
    host, module = made(), data()
    found = torch.cat(pl.Trainer(**QUIET).predict(host, module))
    assert found.shape == (12,)
    (measured,) = pl.Trainer(**QUIET).test(host, module, verbose=False)
    assert measured["test/acc"] == pytest.approx((found == module.test_dataset.targets).float().mean().item())
    batch = batch_of(module)
    del batch["candidates"]
    assert host.predict_step(batch, 0).shape == batch["input_ids"].shape


def test_an_adapter_alone_is_trained():
    host = made(lora=ADAPTER, optimizer=partial(torch.optim.AdamW, lr=0.03))
    (start,) = pl.Trainer(**QUIET).validate(host, data(), verbose=False)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    run = pl.Trainer(max_epochs=6, **QUIET)
    run.fit(host, data())
    for name, value in host.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    groups = run.optimizers[0].param_groups
    assert all("lora_" in name for name in groups[0]["param_names"])
    # little can be done about random weights
    assert run.callback_metrics["val/loss"] < start["val/loss"] - 0.05


def test_the_words_of_the_classes_are_learned():
    host = made(optimizer=partial(torch.optim.AdamW, lr=0.02))
    run = pl.Trainer(max_epochs=6, **QUIET)
    run.fit(host, data(train_rows=64))
    # one of 258 tokens costs 5.6, one of the two words a coin's 0.69
    assert run.callback_metrics["val/loss"] < 0.8


def test_weight_decay_goes_by_names():
    """MeZO's `undecayed` sees the names that the module hands over."""
    from lightning_trust.optim import MeZO

    host = made(config=GPT2, optimizer=partial(MeZO, weight_decay=0.5, lr=0.1))
    host.trainer = pl.Trainer(**QUIET)
    optimizer = host.configure_optimizers()
    assert set(optimizer.named()) == {name for name, _ in host.named_parameters()}


def test_schedule_and_bad_input():
    host = made(schedule=LinearWarmup(0.0, 1.0, epochs=2), optimizer=partial(torch.optim.SGD, lr=1.0))
    run = pl.Trainer(max_epochs=1, **QUIET)
    run.fit(host, data())
    # four steps an epoch
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="`schedule` to be 'cosine', .* but got 'linear'"):
        made(schedule="linear")
    with pytest.raises(MisconfigurationException, match="schedule='cosine' needs to know the number of steps"):
        pl.Trainer(max_epochs=-1, **QUIET).fit(made(schedule="cosine"), data())
    host = made()
    host.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="no parameter that requires a gradient"):
        pl.Trainer(max_epochs=1, **QUIET).fit(host, data())


@pytest.mark.parametrize("schedule", ["cosine", "cyclic", "constant"])
def test_schedules_are_those_of_the_image_classifier(schedule):
    from lightning_trust.modules import ImageClassifier

    rates = []
    for host in (made(schedule=schedule), ImageClassifier(schedule=schedule)):
        host._make_optimizer = lambda params: torch.optim.SGD(params, lr=0.5)
        # what `estimated_stepping_batches` is for seven steps
        host._trainer = SimpleNamespace(estimated_stepping_batches=7)
        host._fabric = None
        found = host.configure_optimizers()
        if schedule == "constant":
            rates.append(found.param_groups[0]["lr"])
            continue
        each = []
        for _ in range(7):
            each.append(found["optimizer"].param_groups[0]["lr"])
            found["optimizer"].step()
            found["lr_scheduler"]["scheduler"].step()
        rates.append(each)
    assert rates[0] == rates[1]


# -- checkpoints -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["whole", "lora"])
def test_a_checkpoint_loads_by_itself(tmp_path, lora):
    host = made(lora=lora)
    run = pl.Trainer(max_epochs=1, **QUIET)
    run.fit(host, data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.manual_seed(77)
    loaded = CausalLanguageModel.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal_states(loaded.state_dict(), host.state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in host.parameters()]
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(loaded.eval()(tokens), host.eval()(tokens), rtol=0.0, atol=0.0)


def test_a_checkpoint_needs_no_folder_that_the_network_came_from(tmp_path):
    made(config=GPT2).network.save_pretrained(tmp_path / "base")
    host = made(config=None, model=str(tmp_path / "base"), lora=LoRA(2, target_modules=["c_attn"]))
    run = pl.Trainer(max_epochs=1, **QUIET)
    run.fit(host, data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    shutil.rmtree(tmp_path / "base")
    loaded = CausalLanguageModel.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal_states(loaded.state_dict(), host.state_dict())


def test_an_adapter_on_the_network_of_a_checkpoint(tmp_path):
    first = made()
    run = pl.Trainer(max_epochs=1, **QUIET)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    second = CausalLanguageModel(str(tmp_path / "first.ckpt"), lora=ADAPTER)
    tokens = torch.arange(10)[None]
    # an adapter is zero at first
    torch.testing.assert_close(second.eval()(tokens), first.eval()(tokens))
    run = pl.Trainer(max_epochs=1, **QUIET)
    run.fit(second, data())
    run.save_checkpoint(tmp_path / "second.ckpt")
    with pytest.raises(ValueError, match="without an adapter, but got one with an adapter in '.*second.ckpt'"):
        CausalLanguageModel(str(tmp_path / "second.ckpt"))
    with pytest.raises(FileNotFoundError, match="`model` to be a checkpoint, but 'nowhere.ckpt' does"):
        CausalLanguageModel("nowhere.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"without an adapter, but got the arguments \[\] in"):
        CausalLanguageModel(str(tmp_path / "foreign.ckpt"))


@pytest.mark.parametrize("after", [2, 6])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, after):
    def run(folder, *extra, **kwargs):
        host = made(lora=LoRA(2, dropout=0.3, target_modules=["q_proj"]), schedule="cosine")
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 2, "default_root_dir": folder}
        pl.Trainer(callbacks=[ExactResume(), saver, *extra], **settings).fit(host, data(), **kwargs)
        return host

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(after))
    torch.rand(3)
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_states(whole.state_dict(), resumed.state_dict())


def test_two_ranks_are_equal_and_log_what_one_logs(tmp_path):
    def result(run, module):
        return {**module.state_dict(), "loss": run.callback_metrics["val/loss"], "acc": run.callback_metrics["val/acc"]}

    first, second = fit_on_two_ranks(tmp_path, made(lora=ADAPTER), data(), [], result, max_epochs=1)
    assert_equal_states(first, second)
    host = made(lora=ADAPTER)
    host.load_state_dict({name: value for name, value in first.items() if name.startswith("network")})
    (found,) = pl.Trainer(**QUIET).validate(host, data(), verbose=False)
    assert found["val/loss"] == pytest.approx(first["loss"].item(), rel=1e-5)
    assert found["val/acc"] == pytest.approx(first["acc"].item())


def test_next_token_data_have_no_accuracy():
    host = made()
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
    loader = DataLoader(rows, batch_size=2)
    run = pl.Trainer(max_epochs=1, **QUIET)
    run.fit(host, loader, loader)
    assert "val/perplexity" in run.callback_metrics
    assert "val/acc" not in run.callback_metrics


def test_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(CausalLanguageModel, "model")
    arguments = {
        "config": LLAMA,
        "lora": {"r": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }
    text = yaml.safe_dump({"model": {"class_path": "CausalLanguageModel", "init_args": arguments}})
    config = parser.parse_string(text)
    assert parser.dump(parser.parse_string(parser.dump(config))) == parser.dump(config)
    host = parser.instantiate(config).model
    assert sum(parameter.numel() for parameter in host.parameters() if parameter.requires_grad) == 2 * 2 * 2 * 16
    with pytest.raises(Exception, match="rank"):
        parser.parse_string(text.replace("r: 2", "rank: 2"))
