"""The adapter of a run as a folder that peft loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.core.host import find_network
from lightning_trust.core.step import Attachment, HostCallback
from lightning_trust.nn.language import find_adapter

#: A card that peft writes beside an adapter, with nothing in it.
_CARD = "README.md"


class SaveAdapter(HostCallback):
    """Write the adapter of any module whose network is a ``peft.PeftModel``, so that peft loads it.

    At the end of training ``folder`` holds ``adapter_config.json`` and ``adapter_model.safetensors``:
    ``peft.PeftModel.from_pretrained(base, folder)`` gives the network back on the same base. Every file is written
    aside and renamed, by the first rank alone. Checkpoints of Lightning still keep the whole module, and a run is
    resumed from those.

    Args:
        folder: Where the adapter is written; ``adapter`` in the Trainer's ``default_root_dir`` if None.
        with_checkpoints: Whether every checkpoint ``x.ckpt`` has the adapter of its moment beside it, in the folder
            ``x.adapter``, which goes when the checkpoint goes.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.

    Raises:
        MisconfigurationException: Before training, if the host holds no ``peft.PeftModel``.

    Example:
        >>> SaveAdapter("runs/mezo/adapter").folder
        'runs/mezo/adapter'

    """

    def __init__(
        self,
        folder: str | None = None,
        with_checkpoints: bool = False,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.folder = None if folder is None else str(folder)
        self.with_checkpoints = with_checkpoints
        self.network = network
        self._undo = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_undo": ExitStack()}

    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Listen where checkpoints are saved and removed."""
        if self.with_checkpoints and not trainer.fast_dev_run:
            self._after(trainer, "save_checkpoint", lambda path: self._write(trainer, host, _beside(path)))
            self._after(trainer.strategy, "remove_checkpoint", lambda path: _remove(trainer, _beside(path)))

    def _after(self, owner: Any, name: str, action: Callable[[Any], None]) -> None:
        original = getattr(owner, name)

        def listening(filepath: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(filepath, *args, **kwargs)
            action(filepath)
            return result

        owner.__dict__[name] = listening
        self._undo.callback(owner.__dict__.pop, name, None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See that there is an adapter."""
        self._adapter_of(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the adapter."""
        if not trainer.fast_dev_run:
            folder = Path(trainer.default_root_dir, "adapter") if self.folder is None else Path(self.folder)
            self._write(trainer, pl_module, folder)

    def _adapter_of(self, host: nn.Module) -> Any:
        found = find_adapter(host if self.network is None else find_network(host, self.network))
        if found is None:
            where = type(host).__name__ if self.network is None else f"`{self.network}` of {type(host).__name__}"
            raise MisconfigurationException(
                f"SaveAdapter writes the adapter of a peft.PeftModel, but {where} holds none. Wrap the network:"
                " `peft.get_peft_model(network, config)`, or pass `lora` to CausalLanguageModel."
            )
        return found

    def _write(self, trainer: Any, host: nn.Module, folder: Path) -> None:
        if not trainer.is_global_zero:
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
            self._adapter_of(host).save_pretrained(aside)
            for path in sorted(Path(aside).rglob("*")):
                if path.is_file() and path.name != _CARD:
                    target = folder / path.relative_to(aside)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)

    def _leave(self) -> None:
        self._undo.close()
        super()._leave()


def _beside(checkpoint: Any) -> Path:
    return Path(checkpoint).with_suffix(".adapter")


def _remove(trainer: Any, folder: Path) -> None:
    if trainer.is_global_zero and folder.is_dir():
        shutil.rmtree(folder)
