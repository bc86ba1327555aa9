"""The fixtures of conftest.py fail a test that leaves something behind, and put it back."""

import os
import signal
from pathlib import Path

import pytest
import torch

LEAKS = {
    "environment": ("import os; os.environ['LEFT_BY_A_TEST'] = '1'", "LEFT_BY_A_TEST"),
    "signal": ("import signal; signal.signal(signal.SIGUSR1, lambda *_: None)", "SIGUSR1"),
    "process group": (
        "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)",
        "process group",
    ),
    "dtype": ("import torch; torch.set_default_dtype(torch.float64)", "default dtype"),
    "grad mode": ("import torch; torch.set_grad_enabled(False)", "grad mode"),
    "threads": ("import torch; torch.set_num_threads(2)", "threads"),
    "directory": ("import os; os.chdir('/')", "working directory"),
    "file": ("import conftest; (conftest.ROOT / 'left_by_a_test.txt').touch()", "left_by_a_test.txt"),
    "thread": (
        "import threading\n    threading.Thread(target=threading.Event().wait, args=(3,), name='straggler').start()",
        "straggler",
    ),
    "process": ("import subprocess; subprocess.Popen(['sleep', '3'])", "sleep 3"),
}


@pytest.fixture
def in_a_folder(pytester):
    """A test suite of one test, under this suite's conftest.py, with less patience for stragglers."""

    def run(body):
        source = (Path(__file__).parent / "conftest.py").read_text()
        pytester.makeconftest(source.replace("seconds=5.0", "seconds=0.2"))
        pytester.makepyfile(f"def test_one():\n    {body}\n")
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:timeout", "--import-mode=prepend")

    return run


@pytest.mark.parametrize("leak", LEAKS)
def test_leak_fails_the_test_and_is_undone(leak, in_a_folder):
    body, named = LEAKS[leak]
    before = _state()
    result = in_a_folder(body)
    result.assert_outcomes(passed=1, errors=1)
    assert named in result.stdout.str().partition("ERROR at teardown")[2]
    assert not torch.distributed.is_initialized()
    assert before == _state()


def _state():
    return {
        "environment": os.environ.get("LEFT_BY_A_TEST"),
        "signal": signal.getsignal(signal.SIGUSR1),
        "dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "directory": Path.cwd(),
    }


def test_random_states_and_determinism_are_restored(in_a_folder):
    state = torch.get_rng_state()
    result = in_a_folder("import torch; torch.rand(3); torch.use_deterministic_algorithms(True)")
    result.assert_outcomes(passed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
