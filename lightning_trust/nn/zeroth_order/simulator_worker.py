"""What the worker process of a simulator runs.

It is started as a script, with ``connection`` and ``simulator`` among its globals, so that it imports the simulator and
nothing else of this package.
"""

from __future__ import annotations

import importlib
import signal
from typing import Any


def imported(path: str) -> Any:
    """The object at an import path, ``"package.module.name"``; names may be nested in classes."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # a longer name than that of a module; what a module itself misses is an error
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue
            raise
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"no module is at the start of '{path}'")


def serve(connection: Any, simulator: Any) -> None:
    """Say when the simulator is imported, and answer until the other side hangs up."""
    try:
        # arrays come in, whatever the simulator imports
        importlib.import_module("numpy")
        run = imported(simulator) if isinstance(simulator, str) else simulator
        if not callable(run):
            raise TypeError(f"{type(run).__name__} is not callable")
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", None))
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        if arguments is None:
            return
        try:
            reply = ("answer", run(*arguments))
        except Exception as error:
            reply = ("error", f"{type(error).__name__}: {error}")
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            connection.send(("error", f"its answer cannot be sent back: {type(error).__name__}: {error}"))


if "connection" in globals():
    # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(globals()["connection"], globals()["simulator"])
