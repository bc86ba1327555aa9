"""A black box that takes its time and may fail: called from several workers, with time limits, retries and a memory."""

from __future__ import annotations

import os
import pickle
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray

from lightning_trust.core.distributed import from_all_ranks, from_first_rank, rank, world_size
from lightning_trust.nn.zeroth_order.answer_file import AnswerFile, point_key
from lightning_trust.nn.zeroth_order.simulator_attempts import Attempts, Seeds, SimulatorCounts, SimulatorError, quoted
from lightning_trust.nn.zeroth_order.simulator_calls import Array, Call, Command, Format, InProcess, WorkerProcesses

Executor = Literal["serial", "threads", "processes"]
OnFailure = Literal["raise", "drop", "nearest"]

# how many answers "nearest" looks through
_RECENT = 1024


@dataclass(frozen=True)
class SimulatorAnswers:
    """Answers to some rows.

    Attributes:
        values: Shape ``(n, m)``; a row that was left without an answer is NaN, or that of the nearest row with one.
        valid: Whether a row was answered, shape ``(n,)``.

    """

    values: Array
    valid: NDArray[np.bool_]


class Simulator:
    """An unmodified simulator, compiled program or rule base as a function of rows of numbers.

    It is a Python callable, here or in worker processes, or a command that is run for every call. Answers may be
    remembered, and kept in a file from which a later run takes them.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Shape:
        - points: float64 ``(n, d)``, a row a sample, or ``(d,)`` with ``batched=False``.
        - answers: numbers ``(n, m)``, or ``(n,)`` where ``m`` is 1; of one row ``(m,)`` or a number.

    Args:
        run: A callable, or the import path of one; it is imported and called: a path from an untrusted file runs
            untrusted code.
        command: A command in place of ``run``, one string or its words, run without a shell. It reads points on its
            standard input and writes answers, and nothing else, on its standard output.
        out_dim: Numbers in an answer, ``m``.
        batched: Whether it takes many rows a call; else one.
        batch_size: Rows a call; all that are asked, in equal shares for the workers, if None.
        executor: ``"serial"``: calls in this thread, one after another. ``"threads"``: for simulators that release the
            GIL, wait for something, or are commands. ``"processes"``: spawned processes that import the callable.
        workers: Number of threads or processes.
        timeout: Seconds a call may take. Processes and commands that take longer are killed; a callable in this
            process is left to itself.
        retries: How many times a row that failed is asked again.
        backoff: Seconds to wait before a row is asked again, doubled each time.
        on_failure: What becomes of a row that failed all the same (the simulator raised, hung, died, or its answer is
            not finite): ``"raise"`` quotes it in an error; ``"drop"`` leaves its answer NaN; ``"nearest"`` gives it the
            answer of the nearest row among the last 1,024 with one. An answer of the wrong shape always raises.
        cache: How many answers to remember; the ones used least recently are forgotten.
        results: File (JSON lines) to which answers are appended, and from which those of earlier runs are taken; a
            simulator in worker processes gives the same answers as one in this process, and may share it.
        seeded: Whether the simulator is stochastic and takes a second argument, int64 seeds ``(n,)``; both sides of a
            difference get the same.
        command_format: ``"json"`` or ``"npy"``; what the command reads and writes, see
            :class:`~lightning_trust.nn.zeroth_order.simulator_calls.Command`.
        rank_zero_service: Whether only rank 0 calls it, for all ranks, where a licence or a single instance wants it
            so. Every rank must then ask as often as the others.

    Raises:
        ValueError: If a number is out of its range, or nothing callable is at an import path.
        MisconfigurationException: If not exactly one of ``run`` and ``command`` is given, or worker processes cannot
            import ``run``.

    Example:
        >>> simulator = Simulator("numpy.cbrt", out_dim=2, cache=8)
        >>> simulator.ask(np.array([[8.0, 27.0], [8.0, 27.0]])).values
        array([[2., 3.],
               [2., 3.]])
        >>> simulator.counts.queries, simulator.counts.hits
        (1, 1)

    """

    def __init__(
        self,
        run: Callable[..., Any] | str | None = None,
        command: Sequence[str] | str | None = None,
        out_dim: int = 1,
        batched: bool = True,
        batch_size: int | None = None,
        executor: Executor = "serial",
        workers: int = 1,
        timeout: float | None = None,
        retries: int = 0,
        backoff: float = 0.1,
        on_failure: OnFailure = "raise",
        cache: int = 0,
        results: str | Path | None = None,
        seeded: bool = False,
        command_format: Format = "json",
        rank_zero_service: bool = False,
    ) -> None:
        if (run is None) == (command is None):
            raise MisconfigurationException(
                f"Expected exactly one of the arguments `run` and `command`, but got run={run!r}, command={command!r}."
            )
        for name, value, least in (
            ("out_dim", out_dim, 1),
            ("workers", workers, 1),
            ("retries", retries, 0),
            ("cache", cache, 0),
        ):
            if value < least:
                raise ValueError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be at least 1, but got {batch_size}.")
        if timeout is not None and not timeout > 0.0:
            raise ValueError(f"Expected argument `timeout` to be positive, but got {timeout}.")
        if not backoff >= 0.0:
            raise ValueError(f"Expected argument `backoff` to be at least 0, but got {backoff}.")
        for name, chosen, known in (
            ("executor", executor, Executor),
            ("on_failure", on_failure, OnFailure),
            ("command_format", command_format, Format),
        ):
            if chosen not in get_args(known):
                raise ValueError(
                    f"Expected argument `{name}` to be one of {list(get_args(known))}, but got {chosen!r}."
                )
        if executor == "processes" and callable(run):
            _check_importable(run)
        self.run = run
        self.command = command
        self.out_dim = out_dim
        self.batched = batched
        self.batch_size = batch_size
        self.executor: Executor = executor
        self.workers = workers
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.on_failure: OnFailure = on_failure
        self.cache = cache
        self.results = results
        self.seeded = seeded
        self.command_format: Format = command_format
        self.rank_zero_service = rank_zero_service
        self.counts = SimulatorCounts()
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._remembered: OrderedDict[bytes, Array] = OrderedDict()
        self._recent: OrderedDict[bytes, tuple[Array, Array]] = OrderedDict()
        self._kept: dict[bytes, Array] = {}
        self._read = False
        self._call: Call | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._finalizer: Any = None
        self._process = os.getpid()
        if self.executor != "processes" and self.command is None:
            # an import path that leads nowhere is told at once; worker processes import it themselves
            self._call = self._new_call()

    # a handle, a pool, a memory: none of them goes into a pickle; a copy of a network asks the same simulator
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_afresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulator:
        return self

    @property
    def name(self) -> str:
        """What an error and a file call it."""
        if self.command is not None:
            return self.command if isinstance(self.command, str) else " ".join(self.command)
        if isinstance(self.run, str):
            return self.run
        kind: Any = self.run if hasattr(self.run, "__qualname__") else type(self.run)
        return f"{kind.__module__}.{kind.__qualname__}"

    # -- what was started ----------------------------------------------------------------------------------------------
    def open(self) -> Call:
        """Start the workers, if they do not run yet; called before a backward pass may need them."""
        if self._process != os.getpid():
            # a fork: the parent's workers stay the parent's
            self._call = self._threads = self._finalizer = None
            self._process = os.getpid()
        if self._call is None:
            self._call = self._new_call()
        if self._finalizer is not None:
            return self._call
        if self.executor != "serial":
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="simulator")
        self._call.open()
        self._finalizer = weakref.finalize(self, _shut_down, self._call, self._threads, os.getpid())
        return self._call

    def close(self) -> None:
        """End the workers; they are started again when they are needed."""
        if self._finalizer is not None and self._process == os.getpid():
            self._finalizer()
        self._threads = self._finalizer = None
        if self.executor == "processes":
            self._call = None

    def _new_call(self) -> Call:
        if self.run is None:
            return Command(self.command or "", self.command_format, self.timeout)
        if self.executor == "processes":
            return WorkerProcesses(self.run, self.workers, self.timeout)
        return InProcess(self.run, self.timeout)

    # -- questions -----------------------------------------------------------------------------------------------------
    def ask(self, points: Array, seeds: Seeds | None = None) -> SimulatorAnswers:
        """Answers to some rows.

        Args:
            points: Shape ``(n, d)``.
            seeds: Non-negative int64, shape ``(n,)``, where the simulator takes seeds.

        Raises:
            SimulatorError: If the simulator raises, hangs or dies on a row, under ``on_failure="raise"``.
            SimulatorAnswerError: If an answer is not finite, under the same, or has the wrong shape. It is a
                ValueError.

        """
        points = np.ascontiguousarray(points, dtype=np.float64)
        if points.ndim != 2:
            raise ValueError(f"Expected argument `points` to have the shape (n, d), but got {points.shape}.")
        if self.seeded == (seeds is None):
            raise ValueError(f"Expected argument `seeds` to be {'given' if self.seeded else 'None'}, but got {seeds}.")
        if not self.rank_zero_service or world_size() == 1:
            return self._answers(points, seeds)
        return self._served(points, seeds)

    def _served(self, points: Array, seeds: Seeds | None) -> SimulatorAnswers:
        parts = from_all_ranks((points, seeds))
        found: Any = None
        if rank() == 0:
            every = np.concatenate([part[0] for part in parts])
            try:
                found = self._answers(every, None if seeds is None else np.concatenate([part[1] for part in parts]))
            except SimulatorError as error:
                # the others wait for an answer, and get the same error
                found = error
        found = from_first_rank(found)
        if isinstance(found, SimulatorError):
            raise found
        start = sum(len(part[0]) for part in parts[: rank()])
        mine = slice(start, start + len(points))
        answers: SimulatorAnswers = found
        return SimulatorAnswers(answers.values[mine], answers.valid[mine])

    def _answers(self, points: Array, seeds: Seeds | None) -> SimulatorAnswers:
        # without a memory each row is asked for itself, equal ones too
        values = self._from_memory(points, seeds) if self._remembers else self._timed(points, seeds)
        valid = np.asarray(np.isfinite(values).all(axis=1))
        if self.on_failure == "nearest":
            self._put_nearest(points, seeds, values, valid)
        return SimulatorAnswers(values, valid)

    def _timed(self, points: Array, seeds: Seeds | None) -> Array:
        if not len(points):
            return np.empty((0, self.out_dim))
        start = time.perf_counter()
        try:
            return self._asked(points, seeds)
        finally:
            self.counts.seconds += time.perf_counter() - start

    # -- memory --------------------------------------------------------------------------------------------------------
    @property
    def _remembers(self) -> bool:
        return self.cache > 0 or self.results is not None

    @property
    def _file(self) -> AnswerFile | None:
        return None if self.results is None else AnswerFile(self.results, self.name, self.out_dim, rank())

    def _from_memory(self, points: Array, seeds: Seeds | None) -> Array:
        """Answers that are known, and those to the first row of each point that is not."""
        file = self._file
        if not self._read and file is not None:
            self._kept = file.read()
        self._read = True
        values = np.full((len(points), self.out_dim), np.nan)
        keys = _keys(points, seeds)
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            known = self._remembered.get(key)
            if known is not None:
                self._remembered.move_to_end(key)
            else:
                known = self._kept.get(key)
            if known is not None:
                values[row] = known
            if known is not None or key in first:
                self.counts.hits += 1
            else:
                first[key] = row
        rows = np.fromiter(first.values(), dtype=np.int64)
        values[rows] = self._timed(points[rows], None if seeds is None else seeds[rows])
        self._remember(points, seeds, keys, values, rows)
        return values[[first.get(key, row) for row, key in enumerate(keys)]]

    def _remember(
        self, points: Array, seeds: Seeds | None, keys: list[bytes], values: Array, rows: NDArray[np.int64]
    ) -> None:
        rows = rows[np.isfinite(values[rows]).all(axis=1)]
        file = self._file
        if file is not None and len(rows):
            file.append(points[rows], values[rows], None if seeds is None else seeds[rows])
            self._kept.update({keys[row]: values[row].copy() for row in rows})
        if self.cache > 0:
            self._remembered.update({keys[row]: values[row].copy() for row in rows})
            while len(self._remembered) > self.cache:
                self._remembered.popitem(last=False)

    def _put_nearest(self, points: Array, seeds: Seeds | None, values: Array, valid: NDArray[np.bool_]) -> None:
        keys = _keys(points, seeds)
        for row in np.flatnonzero(valid):
            self._recent[keys[row]] = (points[row].copy(), values[row].copy())
            self._recent.move_to_end(keys[row])
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        if valid.all():
            return
        if not self._recent:
            row = np.flatnonzero(~valid)[0]
            raise SimulatorError(
                f"on_failure='nearest' needs an answer to go by, but {self.name} has not given one yet: it failed on"
                f" {quoted(points[row])}.",
                points[row],
            )
        near, known = (np.stack(part) for part in zip(*self._recent.values(), strict=True))
        unit = near.std(axis=0)
        unit[unit == 0.0] = 1.0
        for row in np.flatnonzero(~valid):
            values[row] = known[np.square((near - points[row]) / unit).sum(axis=1).argmin()]

    # -- calls ---------------------------------------------------------------------------------------------------------
    def _asked(self, points: Array, seeds: Seeds | None) -> Array:
        call = self.open()
        size = 1 if not self.batched else self.batch_size or -(-len(points) // self.workers)
        parts = [
            (points[start : start + size], None if seeds is None else seeds[start : start + size])
            for start in range(0, len(points), size)
        ]
        attempts = Attempts(
            self.name,
            call,
            self.out_dim,
            self.batched,
            self.retries,
            self.backoff,
            self.on_failure == "raise",
            self.counts,
        )
        if self._threads is None:
            return np.concatenate([attempts(*part) for part in parts])
        waiting = [self._threads.submit(attempts, *part) for part in parts]
        try:
            return np.concatenate([each.result() for each in waiting])
        except BaseException:
            for each in waiting:
                each.cancel()
            raise


def _keys(points: Array, seeds: Seeds | None) -> list[bytes]:
    return [point_key(point, None if seeds is None else seeds[row]) for row, point in enumerate(points)]


def _check_importable(run: Callable[..., Any]) -> None:
    try:
        pickle.dumps(run)
    except Exception as error:
        raise MisconfigurationException(
            f"executor='processes' needs a simulator that worker processes can import, but got {run!r}: {error}. Put it"
            " in a module, and pass it or its import path."
        ) from error


def _shut_down(call: Call, threads: ThreadPoolExecutor | None, process: int) -> None:
    # a forked child is not to end the workers of its parent
    if process != os.getpid():
        return
    call.close()
    if threads is not None:
        threads.shutdown(wait=True, cancel_futures=True)
