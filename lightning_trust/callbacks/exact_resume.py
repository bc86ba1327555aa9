"""A killed run, resumed, equals the run that was never killed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_trust.core.distributed import from_all_ranks, rank, world_size
from lightning_trust.core.randomness import random_state, set_random_state


class ExactResume(Callback):
    """Resume a run where it was killed: same order of data, same random numbers, bit for bit.

    Lightning restores weights, optimizers and progress, but a run that is resumed within an epoch starts the epoch's
    data anew, with other random numbers. This callback keeps the random state of every rank from which the epoch's
    data iterator was made, how many batches it has served, and the random state at the time of saving. On resume it
    makes the iterator from the first, drops the batches that were served, and sets the last. Validation no longer moves
    the random state of training.

    Exact for a kill between two optimizer steps, on the same number of ranks, with sized map-style data: shuffling,
    dropout, augmentation from the global generators, any number of workers, any ``set_epoch`` sampler. Not exact:
    iterable datasets, a kill inside an accumulation window, ``reload_dataloaders_every_n_epochs``, loaders with a
    ``generator`` of their own, CUDA kernels that are not deterministic, and epoch means of ``self.log`` with whatever
    monitors them, for they are means over the batches since the resume.

    Raises:
        MisconfigurationException: If a run is resumed on another number of ranks, or from a checkpoint that was saved
            while an exception was handled on several ranks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [ExactResume(), ModelCheckpoint(every_n_train_steps=100, save_last=True)]
        >>> trainer = Trainer(callbacks=callbacks, accelerator="cpu", logger=False)

    """

    def __init__(self) -> None:
        self.served = 0
        self._iterator_state: dict[str, Any] | None = None
        self._training_state: dict[str, Any] | None = None
        self._saved: dict[str, Any] | None = None
        self._failing = False
        self._undo = ExitStack()

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return type(self).__qualname__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_undo": ExitStack()}

    # -- saving --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Random states of all ranks and the number of batches served in the epoch."""
        own = {"iterator": self._iterator_state, "now": self._training_state or random_state()}
        # other ranks may never come to a collective while an exception is handled
        ranks = [own] if self._failing else from_all_ranks(own)
        return {"served": self.served, "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit starts."""
        self._saved = state_dict

    # -- hooks ---------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Listen where Lightning makes the iterator over the training data."""
        self._undo.close()
        self._failing = False
        self._saved = None
        if stage == "fit":
            self.served = 0
            self._around(trainer.fit_loop, "setup_data", self._setup_data)
            self._around(trainer.fit_loop, "on_advance_start", self._on_advance_start)
            self._around(trainer.fit_loop.epoch_loop, "on_run_start", self._on_run_start)
            for name in ("run", "increment_progress_to_evaluation_end"):
                self._around(trainer.fit_loop.epoch_loop.val_loop, name, self._validate)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a checkpoint of another number of ranks."""
        self._own_state()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self.served += 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The next epoch makes an iterator of its own."""
        self.served = 0

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop listening."""
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop listening; a checkpoint that is saved now holds the states of this rank alone."""
        self._failing = True
        self._undo.close()

    # -- where the iterator is made ------------------------------------------------------------------------------------
    def _around(self, loop: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(loop, name)

        def listening(*args: Any, **kwargs: Any) -> Any:
            return wrapper(loop, original, *args, **kwargs)

        loop.__dict__[name] = listening
        self._undo.callback(loop.__dict__.pop, name, None)

    def _own_state(self) -> dict[str, Any] | None:
        if self._saved is None:
            return None
        if len(self._saved["ranks"]) != world_size():
            raise MisconfigurationException(
                f"ExactResume resumes on as many ranks as saved their random state ({len(self._saved['ranks'])}),"
                f" but got {world_size()}. Use as many devices, or remove ExactResume from `callbacks`."
            )
        return self._saved["ranks"][rank()]

    def _setup_data(self, loop: Any, original: Callable[[], None]) -> None:
        # a host that asks for `estimated_stepping_batches` comes here before on_fit_start
        if loop._combined_loader is not None and not loop._should_reload_train_dl:
            return original()
        saved = self._own_state()
        if saved is not None and saved["iterator"] is not None and saved["iterator"]["epoch"] == 0:
            set_random_state(saved["iterator"]["random"])
        self._iterator_state = {"epoch": 0, "random": random_state()}
        return original()

    def _on_advance_start(self, loop: Any, original: Callable[[], None]) -> None:
        saved = self._own_state()
        if saved is not None and self._between_epochs(loop.trainer):
            # go on from there; the iterator is made below
            set_random_state(saved["now"])
        return original()

    def _between_epochs(self, trainer: Any) -> bool:
        """Whether the checkpoint was saved when the data of an epoch were used up: then the next epoch comes."""
        served = 0 if self._saved is None else self._saved["served"]
        return served == 0 or served >= trainer.num_training_batches

    def _on_run_start(self, loop: Any, original: Callable[[Any], None], data_fetcher: Any) -> None:
        trainer, saved = loop.trainer, self._own_state()
        if saved is None or self._saved is None:
            if trainer.current_epoch > 0:
                self._iterator_state = {"epoch": trainer.current_epoch, "random": random_state()}
        elif self._between_epochs(trainer):
            if loop.batch_progress.current.ready >= trainer.num_training_batches:
                # saved in the validation after the last batch: this pass ends the epoch, the data are for the next one
                self.served, self._iterator_state = self._saved["served"], saved["iterator"]
                return original(data_fetcher)
            self._saved, self.served = None, 0
            self._iterator_state = {"epoch": trainer.current_epoch, "random": random_state()}
            made = trainer.fit_loop._combined_loader._iterator
            original(data_fetcher)
            if trainer.fit_loop._combined_loader._iterator is made:
                # Lightning goes on with the iterator from before the checkpoint was restored
                iter(data_fetcher)
            return None
        else:
            self.served = self._saved["served"]
            self._iterator_state = saved["iterator"]
            if trainer.current_epoch > 0:
                set_random_state(saved["iterator"]["random"])
                iter(data_fetcher)
            for _ in range(self.served):
                next(data_fetcher.iterator)
            set_random_state(saved["now"])
        self._saved = None
        return original(data_fetcher)

    def _validate(self, loop: Any, original: Callable[[], Any]) -> Any:
        # a resumed run may skip a validation that the first one had done, so it must not move what training draws;
        # a checkpoint that is saved meanwhile keeps what training goes on with
        self._training_state = random_state()
        try:
            return original()
        finally:
            set_random_state(self._training_state)
            self._training_state = None
