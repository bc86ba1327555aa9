"""fit, validate, test and predict: LightningCLI that knows the rooms and can wrap a user's data module."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from types import MethodType, UnionType
from typing import Any, Union, get_args, get_origin

import lightning.pytorch as pl
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    instantiate_class,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

# short names in YAML resolve among the classes that are imported
import lightning_trust.callbacks
import lightning_trust.datamodules
import lightning_trust.modules
import lightning_trust.nn
import lightning_trust.optim  # noqa: F401
from lightning_trust.cli.configs import check_order


class TrainingCLI(LightningCLI):
    """LightningCLI with ``data_wrapper``, and with optimizers that are built when the network is complete."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``trainer``, ``model`` and ``data``.

        Args:
            parser: The parser of one subcommand.

        """
        with _integers_first():
            super().add_core_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``data_wrapper``, ``optimizer`` and ``lr_scheduler``.

        Args:
            parser: The parser of one subcommand.

        """
        parser.add_argument(
            "--data_wrapper",
            type=Callable[[pl.LightningDataModule], pl.LightningDataModule] | None,
            default=None,
            help="A data module that takes the one of `data` as its first argument, such as ForgetSplit.",
        )
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; calls from Python get no warning about the command line of the calling program.

        Args:
            parser: The parser.
            args: The command line.

        """
        if isinstance(args, list):
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Refuse what would be ignored; keep the wrapper out of the data module's saved hyperparameters."""
        wrapper = self._get(self.config, "data_wrapper")
        if wrapper is not None and self._get(self.config, "data") is None:
            raise MisconfigurationException(
                "`data_wrapper` wraps the data module of `data`, but there is no `data`. Name your LightningDataModule:"
                " `data: my_package.MyDataModule`."
            )
        if self._get(self.config, "lr_scheduler") and not self._get(self.config, "optimizer"):
            raise MisconfigurationException(
                "`lr_scheduler` needs `optimizer` beside it: alone it would be ignored, since the LightningModule's own"
                " `configure_optimizers` makes its optimizer."
            )
        if wrapper is not None and "class_path" in wrapper:
            # LightningCLI hands the hyperparameters of `data` to every data module that it makes
            room, _, name = wrapper["class_path"].rpartition(".")
            kind = getattr(importlib.import_module(room), name)
            self.parser.add_instantiator(_plain, kind, subclasses=False, prepend=True)

    def after_instantiate_classes(self) -> None:
        """Wrap the data module, and give the model the optimizer that was named."""
        wrapper = self._get(self.config_init, "data_wrapper")
        if wrapper is not None:
            self.datamodule = wrapper(self.datamodule)
        optimizer = self._get(self.config_init, "optimizer")
        if optimizer:
            if is_overridden("configure_optimizers", self.model):
                rank_zero_warn(
                    f"`{type(self.model).__name__}.configure_optimizers` is replaced by the `optimizer` of the"
                    " configuration."
                )
            scheduler = self._get(self.config_init, "lr_scheduler")
            configure = functools.partial(_configure_optimizers, optimizer=optimizer, scheduler=scheduler)
            # Lightning asks `is_overridden`, which looks at what is wrapped
            functools.update_wrapper(configure, _configure_optimizers)
            self.model.configure_optimizers = MethodType(configure, self.model)


def _configure_optimizers(model: pl.LightningModule, optimizer: Any, scheduler: Any) -> Any:
    # now, not when the command line is read: a network built or wrapped in `setup` or `configure_model` is complete
    made = instantiate_class(model.parameters(), optimizer)
    return LightningCLI.configure_optimizers(model, made, instantiate_class(made, scheduler) if scheduler else None)


def _plain(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
    return kind(*args, **kwargs)


@contextlib.contextmanager
def _integers_first() -> Iterator[None]:
    """Lightning's ``Union[int, float]`` in that order while the parser is made.

    ``typing`` keeps the first of two unions that differ in order only. Where another package (rich does) asked for
    ``Union[float, int]`` before Lightning was imported, jsonargparse would take ``limit_train_batches: 1``, one batch,
    for 1.0, all of them.
    """
    annotations = inspect.unwrap(pl.Trainer.__init__).__annotations__
    found = {name: get_args(hint) for name, hint in annotations.items() if get_origin(hint) in (Union, UnionType)}
    before = {
        name: annotations[name]
        for name, kinds in found.items()
        if {int, float} <= set(kinds) and kinds.index(float) < kinds.index(int)
    }
    for name in before:
        # `|` makes a union anew, with the order that it is given
        annotations[name] = functools.reduce(operator.or_, sorted(found[name], key=lambda kind: kind is float))
    try:
        yield
    finally:
        annotations.update(before)


def train(args: Sequence[str]) -> TrainingCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: The command line, without the program's name.

    Returns:
        The finished run: its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        MisconfigurationException: If the order of the configuration files would lose something, or ``data_wrapper`` or
            ``lr_scheduler`` has nothing to act on.

    """
    check_order(args)
    return TrainingCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-trust"},
        args=list(args),
    )
