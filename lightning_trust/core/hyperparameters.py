"""Arguments of a module that a checkpoint keeps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import lightning.pytorch as pl


def save_arguments(module: pl.LightningModule, objects: Sequence[str] = ()) -> None:
    """Save the arguments that the caller, the ``__init__`` of a module, was given, so that checkpoints load.

    Objects are left out: a checkpoint would pickle them, and ``load_from_checkpoint`` wants them again. Where
    LightningCLI makes the module it hands over plain data for every argument, and all are kept.

    Args:
        module: The module.
        objects: Names of the arguments that are objects.

    Example:
        >>> class Module(pl.LightningModule):
        ...     def __init__(self, width, net):
        ...         super().__init__()
        ...         save_arguments(self, ["net"])
        >>> Module(3, object()).hparams
        "width": 3

    """
    frame = inspect.currentframe()
    caller = None if frame is None else frame.f_back
    module.save_hyperparameters(ignore=list(objects), frame=caller)
    if "_instantiator" in module.hparams:
        module.save_hyperparameters(frame=caller)
