"""Arguments that a checkpoint keeps."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from lightning_trust.core.hyperparameters import save_arguments


class Module(pl.LightningModule):
    def __init__(self, width: int, net: nn.Module, depth: int = 2, **extra: object) -> None:
        super().__init__()
        save_arguments(self, ["net"])


class Below(Module):
    def __init__(self, width: int, net: nn.Module, names: tuple[str, ...] = ()) -> None:
        super().__init__(width, net)


def test_arguments_without_objects():
    assert dict(Module(3, nn.Identity()).hparams) == {"width": 3, "depth": 2}


def test_a_subclass_keeps_its_own_too():
    assert dict(Below(3, nn.Identity(), names=("a",)).hparams) == {"width": 3, "depth": 2, "names": ("a",)}


def test_all_of_them_where_the_command_line_hands_over_plain_data():
    plain = {"class_path": "torch.nn.Identity"}
    module = Module(3, plain, _instantiator="lightning.pytorch.cli.instantiate_module")
    assert module.hparams["net"] == plain
    assert module.hparams["width"] == 3
