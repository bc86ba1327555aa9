"""FairnessReprogramming on text: hard and soft triggers before the sentences of a model of transformers."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_trust.callbacks import FairnessReprogramming
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.wrapping import checksum
from lightning_trust.metrics import EqualizedOddsGap
from lightning_trust.nn import HardTextTrigger, SoftTextTrigger
from tests.callbacks.prompting.test_fairness_reprogram import Images, loaders, made, sgd


class Sentences(pl.LightningModule):
    """A user's classifier of text on a model of transformers."""

    def __init__(self, positional: bool = False) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        self.positional = positional
        self.model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                max_position_embeddings=12,
                initializer_range=0.5,
            )
        )

    def training_step(self, batch, batch_idx):
        if self.positional:
            outputs = self.model(batch["input_ids"], batch["attention_mask"])
            return F.cross_entropy(outputs.logits, batch["labels"])
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.1, weight_decay=0.01)


class Words(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(20, (32, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index):
        members = torch.tensor([index % 2, index // 2 % 2, 1])
        mask = (torch.arange(6) < 4 + index % 3).long()
        return {
            "input_ids": self.ids[index],
            "attention_mask": mask,
            "labels": int(self.ids[index, 0]) % 2,
            "groups": members,
        }


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("kind", [SoftTextTrigger, HardTextTrigger])
def test_text(tmp_path, kind, positional):
    host = Sentences(positional)
    before = checksum(host)
    callback = FairnessReprogramming(
        kind(num_tokens=2),
        "eo",
        lmbda=1.0,
        num_groups=3,
        hidden=[4, 4],
        overlapping=True,
        optimizer=None,
        sensitive="groups",
        batch_spec=BatchSpec("input_ids", "labels"),
    )
    data = DataLoader(Words(), batch_size=8)
    trainer = made(tmp_path, callback)
    trainer.fit(host, data, data)
    assert checksum(host) == before
    assert trainer.global_step == 8
    trigger = callback.trigger.eval()
    assert trigger.weight.shape == (2, 20)
    assert not torch.equal(trigger.weight, trigger.weight.round())
    # what was logged is what the model says of the text with the trigger
    batch = next(iter(DataLoader(Words(), batch_size=32)))
    logits = host.model.eval()(**trigger(batch["input_ids"], batch["attention_mask"])).logits
    metric = EqualizedOddsGap(3)
    metric.update(logits, batch["labels"], batch["groups"])
    assert float(trainer.callback_metrics["trust/eo_gap"]) == pytest.approx(metric.compute().item(), abs=1e-6)
    with pytest.raises(ValueError, match="adds 2 tokens to sentences of 11, but the model takes 12"):
        trigger(torch.zeros(1, 11, dtype=torch.int64))


def test_text_triggers_need_a_model_of_text(tmp_path):
    callback = FairnessReprogramming(SoftTextTrigger(), optimizer=sgd)
    with pytest.raises(MisconfigurationException, match="SoftTextTrigger looks for .* a Sequential has no"):
        made(tmp_path, callback).fit(Images(), **loaders())

    class ByKeyword(Images):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(input=batch[0]), batch[1])

    own = FairnessReprogramming(SoftTextTrigger(nn.Embedding(5, 2)), optimizer=sgd)
    with pytest.raises(MisconfigurationException, match="called with `input_ids`, .* but got .*'input'"):
        made(tmp_path, own).fit(ByKeyword(), loaders()["train_dataloaders"])
