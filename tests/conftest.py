"""What no test may leave behind: each fixture restores it, and fails the test that left it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import gc
import logging
import multiprocessing
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.register_assert_rewrite("tests.conformance")

ROOT = Path(__file__).resolve().parent.parent

# what Lightning sets in a plain run; its own tests tolerate the same
TOLERATED_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_MODULE_LOADING",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "POPLAR_ENGINE_OPTIONS",
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}
# what tools, not tests, write beside the code
TOLERATED_FILES = {
    ".coverage",
    ".import_linter_cache",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "data",
    "lightning_trust.egg-info",
}


@pytest.fixture(autouse=True)
def _environment_restored():
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert not changed - TOLERATED_VARIABLES, f"changed environment variables: {sorted(changed - TOLERATED_VARIABLES)}"


@pytest.fixture(autouse=True)
def _log_levels_restored():
    # benchmarks silence Lightning in their `main`, which is theirs to do in a process of their own
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _signal_handlers_restored():
    # SIGALRM is pytest-timeout's, which gives it back in the midst of a test that fails
    fixed = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP", "SIGALRM")}
    valid = [number for number in signal.valid_signals() if number not in fixed]
    before = {number: signal.getsignal(number) for number in valid}
    yield
    after = {number: signal.getsignal(number) for number in valid}
    changed = [number for number in valid if before[number] is not after[number]]
    for number in changed:
        # None: a handler that was not set from Python, which Python cannot set back either
        if before[number] is not None:
            signal.signal(number, before[number])
    # torch's DataLoader watches its workers by SIGCHLD from the first worker on
    changed = [number for number in changed if number != getattr(signal, "SIGCHLD", None)]
    assert not changed, f"changed signal handlers: {[signal.Signals(number).name for number in changed]}"


@pytest.fixture(autouse=True)
def _process_group_destroyed():
    yield
    left = torch.distributed.is_available() and torch.distributed.is_initialized()
    if left:
        torch.distributed.destroy_process_group()
    assert not left, "left a torch.distributed process group"


@pytest.fixture(autouse=True)
def _torch_settings_restored():
    """The random states are Lightning's and the test's own to move, and only restored; the rest must be as it was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    before = _torch_settings()
    yield
    after = _torch_settings()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    # Trainer(deterministic=True) leaves these on
    torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    torch.set_num_threads(before["threads"])
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"changed settings of torch: {changed}"


def _torch_settings():
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _no_threads_left():
    before = set(threading.enumerate())
    yield
    left = _settle(lambda: [t for t in threading.enumerate() if t not in before and t.is_alive() and not t.daemon])
    assert not left, f"left threads: {[thread.name for thread in left]}"


@pytest.fixture(autouse=True)
def _no_processes_left():
    before = _children()
    yield
    left = _settle(lambda: sorted(_children() - before))
    assert not left, f"left child processes: {left} {[_command(pid) for pid in left]}"


def _children():
    """Ids of this process's running children, without the resource tracker, which Python keeps until the end."""
    found = {child.pid for child in multiprocessing.active_children()}
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(int(pid) for pid in listing.read_text().split())
        except OSError:  # the thread has ended since
            continue
    return {pid for pid in found if _runs(pid) and "resource_tracker" not in _command(pid)}


def _runs(pid):
    """Whether a process has not ended; one that waits to be reaped has."""
    # not by its command line, which is empty for a moment while it starts
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _settle(left, seconds=5.0):
    """What is still there after garbage collection and a short wait; at once empty in the usual case."""
    found = left()
    end = time.monotonic() + seconds
    while found and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
        found = left()
    return found


@pytest.fixture(autouse=True)
def _no_files_left():
    folder = Path.cwd()
    before = set(os.listdir(ROOT))
    yield
    moved = Path.cwd() != folder
    os.chdir(folder)
    new = sorted(set(os.listdir(ROOT)) - before - TOLERATED_FILES)
    assert not moved, "changed the working directory"
    assert not new, f"left files in {ROOT}: {new}. Write into tmp_path."
