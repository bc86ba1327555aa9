"""SaveAdapter: what it writes is what peft loads, from any module."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_trust.callbacks import SaveAdapter
from lightning_trust.modules import CausalLanguageModel
from lightning_trust.nn import LoRA, with_lora
from tests.conformance import CallbackConformance, Data, Host
from tests.modules.language.test_causal_language_model import ADAPTER, LLAMA, data, made
from tests.two_ranks import fit_on_two_ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}
FILES = ["adapter_config.json", "adapter_model.safetensors"]
TOKENS = torch.arange(12).view(2, 6)


class Adapted(Host):
    """A user's module with an adapter; everything is trained, as the conformance tests want."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__(dropout, lr)
        self.net = with_lora(self.net, LoRA(r=2, target_modules=["0", "3"])).requires_grad_(True)


class TestSaveAdapter(CallbackConformance):
    callback = SaveAdapter
    host = Adapted
    arguments: ClassVar = {"with_checkpoints": True}

    def arguments_in(self, folder: Path | None) -> dict[str, Any]:
        return {**self.arguments, "folder": None if folder is None else str(folder / "out" / "adapter")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def base() -> torch.nn.Module:
    torch.manual_seed(5)
    config = {name: value for name, value in LLAMA.items() if name != "model_type"}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **config))


def test_peft_loads_what_was_trained(tmp_path):
    host = made(lora=ADAPTER, optimizer=lambda params: torch.optim.AdamW(params, lr=0.05))
    callback = SaveAdapter(str(tmp_path / "mine"))
    pl.Trainer(callbacks=[callback], enable_checkpointing=False, **QUIET).fit(host, data())
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == FILES
    assert json.loads((tmp_path / "mine" / FILES[0]).read_text())["r"] == 2
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "mine").eval()
    # the base is the same random network
    torch.testing.assert_close(loaded(TOKENS).logits, host.network.eval()(TOKENS).logits, rtol=0.0, atol=0.0)
    untrained = made(lora=ADAPTER).network.eval()
    assert not torch.allclose(loaded(TOKENS).logits, untrained(TOKENS).logits)
    # the adapter alone
    saved = load_file(tmp_path / "mine" / FILES[1])
    assert len(saved) == sum(parameter.requires_grad for parameter in host.parameters())


def test_a_second_run_replaces_the_files(tmp_path):
    found = []
    for lr in (0.01, 0.05):
        host = made(lora=ADAPTER, optimizer=lambda params, lr=lr: torch.optim.AdamW(params, lr=lr))
        run = pl.Trainer(callbacks=[SaveAdapter()], enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
        run.fit(host, data())
        assert names(tmp_path / "adapter") == FILES
        found.append(load_file(tmp_path / "adapter" / FILES[1]))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    host = made(lora=ADAPTER)
    settings = {"enable_checkpointing": False, "default_root_dir": tmp_path, **QUIET}
    pl.Trainer(callbacks=[SaveAdapter()], **settings).fit(host, data())
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def fails(folder):
        Path(folder, FILES[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(host.network, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        pl.Trainer(callbacks=[SaveAdapter()], **settings).fit(host, data())
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert names(tmp_path) == ["adapter"]


def test_adapters_beside_checkpoints_come_and_go(tmp_path):
    host = made(lora=ADAPTER, optimizer=lambda params: torch.optim.AdamW(params, lr=0.05))
    saver = ModelCheckpoint(
        tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    callback = SaveAdapter(str(tmp_path / "end"), with_checkpoints=True)
    run = pl.Trainer(callbacks=[callback, saver], **QUIET)
    run.fit(host, data())
    assert names(tmp_path / "kept") == ["step=3.adapter", "step=3.ckpt", "step=4.adapter", "step=4.ckpt"]
    third = torch.load(tmp_path / "kept" / "step=3.ckpt", weights_only=True)["state_dict"]
    saved = load_file(tmp_path / "kept" / "step=3.adapter" / FILES[1])
    for name, value in saved.items():
        assert torch.equal(value, third["network." + name.replace(".weight", ".default.weight")])
    last = load_file(tmp_path / "end" / FILES[1])
    assert any(not torch.equal(saved[name], last[name]) for name in saved)
    # nothing is left on the Trainer
    assert "save_checkpoint" not in run.__dict__
    assert "remove_checkpoint" not in run.strategy.__dict__
    run.save_checkpoint(tmp_path / "later.ckpt")
    assert not (tmp_path / "later.adapter").exists()


def test_a_network_deep_inside(tmp_path):
    class Deep(Host):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(with_lora(self.net, LoRA(r=2, target_modules=["0"])), torch.nn.Identity())

    host = Deep()
    run = pl.Trainer(
        callbacks=[SaveAdapter(network="net.0")], enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    run.fit(host, Data())
    loaded = peft.PeftModel.from_pretrained(Host().net, tmp_path / "adapter")
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded.eval()(x), host.eval()(x))


def test_one_rank_writes(tmp_path):
    class Writes(SaveAdapter):
        def _write(self, trainer, host, folder):
            with pytest.MonkeyPatch.context() as patch:
                if not trainer.is_global_zero:
                    # a rank that wrote would fail
                    patch.delattr(tempfile, "TemporaryDirectory")
                super()._write(trainer, host, folder)

    callback = Writes(str(tmp_path / "out" / "adapter"))
    fit_on_two_ranks(tmp_path / "ranks", made(lora=ADAPTER), data(), [callback], max_epochs=1)
    assert names(tmp_path / "out") == ["adapter"]
    assert names(tmp_path / "out" / "adapter") == FILES


def test_hosts_without_an_adapter_are_refused(tmp_path):
    settings = {"enable_checkpointing": False, "default_root_dir": tmp_path, **QUIET}
    with pytest.raises(MisconfigurationException, match="peft.PeftModel, but CausalLanguageModel holds none"):
        pl.Trainer(callbacks=[SaveAdapter()], **settings).fit(CausalLanguageModel(config=LLAMA), data())
    run = pl.Trainer(callbacks=[SaveAdapter(network="net.base_model.model.1")], **settings)
    with pytest.raises(MisconfigurationException, match="but `net.base_model.model.1` of Adapted holds none"):
        run.fit(Adapted(), Data())
    assert not list(tmp_path.iterdir())
