"""A data module around the user's: what it does not change stays the user's own."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

# what stays the user's own where the user's data module brings it, and Lightning's where it does not
_HOOKS = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
)
_SETTINGS = (
    "prepare_data_per_node",
    "allow_zero_length_dataloader_with_multiple_devices",
    "_log_hyperparams",
    "_hparams",
    "_hparams_initial",
    "_hparams_name",
)


class WrappedDataModule(LightningDataModule):
    """Base of data modules around the user's that change what training gets.

    Validation, test and prediction data, transfer hooks, hyperparameters and attributes are the user's own.

    Args:
        datamodule: The user's data module.

    """

    def __init__(self, datamodule: LightningDataModule) -> None:
        super().__init__()
        self.datamodule = datamodule
        for setting in _SETTINGS:
            if setting in datamodule.__dict__:
                self.__dict__[setting] = datamodule.__dict__[setting]
        for hook in _HOOKS:
            if getattr(type(datamodule), hook, None) is not getattr(LightningDataModule, hook, None):
                setattr(self, hook, getattr(datamodule, hook))

    def __getattr__(self, name: str) -> Any:
        # whoever asks the data module of the run for something of the user's finds it
        if name.startswith("_") or "datamodule" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.datamodule, name)

    def prepare_data(self) -> None:
        """Prepare the user's data."""
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()

    def setup(self, stage: str) -> None:
        """Set up the user's data."""
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage)

    def teardown(self, stage: str) -> None:
        """Tear the user's data down."""
        self.datamodule.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Tell the user's data module."""
        self.datamodule.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """State of the user's data module."""
        return {"datamodule": self.datamodule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the user's data module."""
        self.datamodule.load_state_dict(state_dict["datamodule"])

    def one_loader(self, datamodule: LightningDataModule) -> DataLoader[Any]:
        """The training loader of a data module.

        Raises:
            MisconfigurationException: If there are several, or one that is no ``DataLoader``.

        """
        loader = datamodule.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                f"{type(self).__name__} wants one DataLoader, but `{type(datamodule).__name__}.train_dataloader` gave"
                f" {type(loader).__name__}."
            )
        return loader

    def rows_loader(self, datamodule: LightningDataModule) -> DataLoader[Any]:
        """The training loader of a data module, over a dataset whose rows have numbers.

        Raises:
            MisconfigurationException: If there are several, one that is no ``DataLoader``, or one over an
                ``IterableDataset``.

        """
        loader = self.one_loader(datamodule)
        if isinstance(loader.dataset, IterableDataset):
            raise MisconfigurationException(
                f"{type(self).__name__} wants a map-style dataset, but `{type(datamodule).__name__}.train_dataloader`"
                " gave a DataLoader over an IterableDataset."
            )
        return loader


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Settings of a user's loader that do not concern its order."""
    keys = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    settings = {key: getattr(loader, key) for key in keys}
    if loader.num_workers > 0:
        settings.update(prefetch_factor=loader.prefetch_factor, persistent_workers=loader.persistent_workers)
    return settings
