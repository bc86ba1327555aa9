"""Ways to call a simulator: in this process, in worker processes, as a command."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import queue
import runpy
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_trust.nn.zeroth_order.simulator_worker import imported

Array = NDArray[np.float64]
Format = Literal["json", "npy"]
# a simulator that takes longer to be imported is taken for one that hangs
_START_SECONDS = 120.0
_WORKER = str(Path(__file__).with_name("simulator_worker.py"))


class FailedCallError(Exception):
    """One call failed; says how, in words that follow "the simulator"."""


class Call(Protocol):
    """One way to call a simulator."""

    def open(self) -> None:
        """Get ready: start what has to be started."""

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """What the simulator makes of points, and of seeds where it takes some.

        Raises:
            FailedCallError: If it raises, hangs, or dies.

        """

    def close(self) -> None:
        """Let go of all that was started."""


class InProcess:
    """Calls a function in this process.

    A thread cannot be stopped: a call that does not end in time is left to itself, in a thread that does not keep the
    interpreter from ending.
    """

    def __init__(self, run: Callable[..., Any] | str, timeout: float | None) -> None:
        self.run: Callable[..., Any] = imported_simulator(run) if isinstance(run, str) else run
        self.timeout = timeout

    def open(self) -> None:
        """Nothing is to be started."""

    def close(self) -> None:
        """Nothing was started."""

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """The function's answer."""
        if self.timeout is None:
            return self._answer(arguments)
        box: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put((True, self._answer(arguments)))
            except FailedCallError as error:
                box.put((False, error))

        threading.Thread(target=work, daemon=True, name="simulator").start()
        try:
            good, found = box.get(timeout=self.timeout)
        except queue.Empty:
            raise FailedCallError(f"did not answer within {self.timeout} s") from None
        if not good:
            raise found
        return found

    def _answer(self, arguments: tuple[Any, ...]) -> Any:
        try:
            return self.run(*arguments)
        except Exception as error:
            raise FailedCallError(f"raised {type(error).__name__}: {error}") from error


class _WorkerProcess:
    """One process that answers calls, started anew after it was killed or has died."""

    def __init__(self, run: Callable[..., Any] | str) -> None:
        self.run = run
        self.process: Any = None
        self.connection: Any = None
        self.ready = False

    def start(self) -> None:
        if self.process is not None:
            return
        # spawn: a fork would inherit the threads' locks and the state of CUDA
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=runpy.run_path,
            args=(_WORKER,),
            kwargs={"init_globals": {"connection": other, "simulator": self.run}},
            daemon=True,
            name="simulator",
        )
        self.process.start()
        other.close()
        self.ready = False

    def wait_until_ready(self) -> None:
        """The time that the simulator takes to be imported is not that of a call."""
        self.start()
        if self.ready:
            return
        if not self.connection.poll(_START_SECONDS):
            self.kill()
            raise FailedCallError(f"did not start within {_START_SECONDS} s")
        kind, found = self.connection.recv()
        if kind == "error":
            self.kill()
            raise FailedCallError(f"cannot be imported: {found}")
        self.ready = True

    def ask(self, arguments: tuple[Any, ...], timeout: float | None) -> Any:
        try:
            self.wait_until_ready()
            self.connection.send(arguments)
            if not self.connection.poll(timeout):
                self.kill()
                raise FailedCallError(f"did not answer within {timeout} s, and its process was killed")
            kind, found = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5.0)
            code = self.process.exitcode
            self.kill()
            raise FailedCallError(f"ended its process, with exit code {code}") from None
        if kind == "error":
            raise FailedCallError(f"raised {found}")
        return found

    def stop(self) -> None:
        if self.process is not None:
            try:
                self.connection.send(None)
                self.process.join(1.0)
            except OSError:
                pass
            self.kill()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.connection.close()
            self.process = self.connection = None


class WorkerProcesses:
    """Calls a function in processes of its own; one that does not answer in time is killed."""

    def __init__(self, run: Callable[..., Any] | str, workers: int, timeout: float | None) -> None:
        self.timeout = timeout
        self.members = [_WorkerProcess(run) for _ in range(workers)]
        self.idle: queue.LifoQueue[_WorkerProcess] = queue.LifoQueue()
        for member in self.members:
            self.idle.put(member)

    def open(self) -> None:
        """Start the processes."""
        for member in self.members:
            member.start()

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """The function's answer, from the next process that is free."""
        member = self.idle.get()
        try:
            return member.ask(arguments, self.timeout)
        finally:
            self.idle.put(member)

    def close(self) -> None:
        """End the processes."""
        for member in self.members:
            member.stop()


class Command:
    """Runs a command for every call: points on its standard input, answers on its standard output.

    ``form="json"``: the input is ``{"points": [[...], ...], "seeds": [...]}``, the seeds where the simulator takes
    some; the output is ``[[...], ...]``.

    ``form="npy"``: the input is the float64 array ``(n, d)`` as ``numpy.save`` writes it, followed by that of the int64
    seeds ``(n,)``; the output is such an array ``(n, m)``. A pipe has no positions, which numpy wants: a
    program in Python loads from and saves to an ``io.BytesIO``, whose content it reads and writes.
    """

    def __init__(self, command: Sequence[str] | str, form: Format, timeout: float | None) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        self.form = form
        self.timeout = timeout

    def open(self) -> None:
        """Nothing is to be started."""

    def close(self) -> None:
        """Nothing was started that has not ended."""

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """What the command writes."""
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command, without a shell
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise FailedCallError(f"cannot be started: {error}") from None
        try:
            output, errors = process.communicate(self._written(arguments), timeout=self.timeout)
        except BaseException as error:
            # with all that it has started, which would hold on to the pipes
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise FailedCallError(f"did not answer within {self.timeout} s, and was killed") from None
            raise
        words = errors.decode(errors="replace").strip().splitlines()[-3:]
        if process.returncode != 0:
            raise FailedCallError(f"ended with exit code {process.returncode}, saying {' / '.join(words)!r}")
        try:
            return self._read(output)
        except (ValueError, EOFError, OSError) as error:
            raise FailedCallError(f"wrote what is no {self.form} of numbers ({error}): {output[:80]!r}") from None

    def _written(self, arguments: tuple[Any, ...]) -> bytes:
        if self.form == "json":
            names = ("points", "seeds")
            return json.dumps({name: each.tolist() for name, each in zip(names, arguments, strict=False)}).encode()
        file = io.BytesIO()
        for each in arguments:
            np.save(file, each)
        return file.getvalue()

    def _read(self, output: bytes) -> Any:
        if self.form == "json":
            return json.loads(output)
        return np.load(io.BytesIO(output), allow_pickle=False)


def imported_simulator(path: str) -> Callable[..., Any]:
    """The callable at an import path.

    Raises:
        ValueError: If there is none.

    """
    try:
        found = imported(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected the simulator to be the import path of a callable, but got '{path}', which cannot be imported:"
            f" {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"Expected '{path}' to be callable, but got {type(found).__name__}.")
    return found
