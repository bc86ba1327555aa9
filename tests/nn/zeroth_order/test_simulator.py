"""Simulator: answers, workers, time limits, failures, memory."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.nn import Simulator, SimulatorAnswerError, SimulatorError
from tests.two_ranks import run_on_two_ranks

POINTS = np.random.default_rng(0).normal(size=(7, 3))
# as a user's module: it imports nothing heavy
SIMULATORS = """
import os
import time

import numpy as np


def good(points):
    return np.stack([np.sin(points).sum(axis=1), np.cos(points).sum(axis=1)], axis=1)


def per_row(point):
    return [float(np.sin(point).sum()), float(np.cos(point).sum())]


def process_id(points):
    time.sleep(0.05)
    return np.full((len(points), 2), os.getpid())


def raises(points):
    if (points[:, 0] > 50.0).any():
        raise ZeroDivisionError("no convergence")
    return good(points)


def hangs(points):
    if (points[:, 0] > 50.0).any():
        time.sleep(60.0)
    return good(points)


def dies(points):
    if (points[:, 0] > 50.0).any():
        os._exit(7)
    return good(points)


def not_a_number(points):
    values = good(points)
    values[points[:, 0] > 50.0, 1] = np.nan
    return values


class Nested:
    @staticmethod
    def run(points):
        return good(points)
"""
SCRIPT = """
import json
import math
import os
import sys

form, what = sys.argv[1:3]
if form == "json":
    points = json.load(sys.stdin)["points"]
else:
    import io

    import numpy as np

    points = np.load(io.BytesIO(sys.stdin.buffer.read())).tolist()
bad = any(point[0] > 50.0 for point in points)
if bad and what == "hangs":
    # a program that has started another one, which holds on to the pipes
    os.system("sleep 60")
if bad and what == "raises":
    sys.exit("no convergence")
if bad and what == "noise":
    print("hello")
values = [[sum(point), -point[0]] for point in points]
if form == "json":
    json.dump(values, sys.stdout)
else:
    file = io.BytesIO()
    np.save(file, np.array(values))
    sys.stdout.buffer.write(file.getvalue())
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's."""
    (tmp_path / "my_simulators.py").write_text(textwrap.dedent(SIMULATORS))
    (tmp_path / "my_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("my_simulators")
    sys.modules.pop("my_simulators", None)


def expected(of_command=False):
    if of_command:
        return np.array([[sum(point.tolist()), -point[0]] for point in POINTS])
    return np.stack([np.sin(POINTS).sum(axis=1), np.cos(POINTS).sum(axis=1)], axis=1)


def with_bad(row=4):
    points = POINTS.copy()
    points[row, 0] = 99.0
    return points


def command(form, what="good"):
    return [sys.executable, "my_script.py", form, what]


# -- answers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        {"run": "my_simulators.good"},
        {"run": "my_simulators.Nested.run", "batch_size": 2},
        {"run": "my_simulators.per_row", "batched": False},
        {"run": "my_simulators.good", "timeout": 20.0},
        {"run": "my_simulators.good", "executor": "threads", "workers": 3},
        {"run": "my_simulators.per_row", "batched": False, "executor": "threads", "workers": 2},
        {"run": "my_simulators.good", "executor": "processes", "workers": 2},
        {"command": "npy", "command_format": "npy"},
        {"command": "json", "executor": "threads", "workers": 2, "timeout": 20.0},
    ],
    ids=str,
)
def test_every_way_to_call_gives_the_same_answers(mine, arguments):
    of_command = "command" in arguments
    if of_command:
        arguments = {**arguments, "command": command(arguments["command"])}
    simulator = Simulator(out_dim=2, **arguments)
    for _ in range(2):
        found = simulator.ask(POINTS)
        np.testing.assert_array_equal(found.values, expected(of_command))
        assert found.valid.all()
    assert simulator.counts.queries == 14
    assert simulator.counts.seconds > 0.0
    simulator.close()
    # workers are started again when they are needed
    np.testing.assert_array_equal(simulator.ask(POINTS).values, expected(of_command))
    simulator.close()


def test_one_number_may_come_without_a_dimension():
    simulator = Simulator(lambda points: points.sum(axis=1))
    np.testing.assert_array_equal(simulator.ask(POINTS).values, POINTS.sum(axis=1, keepdims=True))
    single = Simulator(lambda point: float(point.sum()), batched=False)
    np.testing.assert_array_equal(single.ask(POINTS).values, POINTS.sum(axis=1, keepdims=True))


def test_processes_are_several_and_not_this_one(mine):
    simulator = Simulator(mine.process_id, out_dim=2, executor="processes", workers=2, batch_size=1)
    found = set(simulator.ask(POINTS).values[:, 0])
    assert len(found) == 2
    assert os.getpid() not in found
    simulator.close()


def test_threads_ask_at_the_same_time():
    meeting = threading.Barrier(2, timeout=10.0)

    def both(points):
        meeting.wait()
        return points

    simulator = Simulator(both, out_dim=3, executor="threads", workers=2)
    np.testing.assert_array_equal(simulator.ask(POINTS).values, POINTS)
    simulator.close()


def test_the_points_are_the_simulators_own():
    def works_in_place(points):
        points *= 2.0
        return points

    mine = POINTS.copy()
    np.testing.assert_array_equal(Simulator(works_in_place, out_dim=3).ask(mine).values, 2.0 * POINTS)
    np.testing.assert_array_equal(mine, POINTS)


def test_seeds_go_along(tmp_path, monkeypatch):
    def noisy(points, seeds):
        return np.array([np.random.default_rng(seed).normal() for seed in seeds])

    simulator = Simulator(noisy, seeded=True, cache=10)
    seeds = np.array([1, 2, 1, 1, 2, 3, 4])
    found = simulator.ask(POINTS, seeds).values[:, 0]
    np.testing.assert_array_equal(found, noisy(POINTS, seeds))
    # another seed is another question
    assert simulator.ask(POINTS, seeds + 1).values[0, 0] == noisy(POINTS, [2])[0]
    assert simulator.counts.queries == 14
    script = tmp_path / "seeds.py"
    script.write_text(
        "import json, sys\n"
        "asked = json.load(sys.stdin)\n"
        "print([p[0] + s for p, s in zip(asked['points'], asked['seeds'])])"
    )
    by_command = Simulator(command=f"{sys.executable} {script}", seeded=True)
    np.testing.assert_array_equal(by_command.ask(POINTS, seeds).values[:, 0], POINTS[:, 0] + seeds)
    with pytest.raises(ValueError, match="`seeds` to be given, but got None"):
        simulator.ask(POINTS)


# -- failures ----------------------------------------------------------------------------------------------------------
WAYS = {
    "raises here": ({"run": "my_simulators.raises"}, "raised ZeroDivisionError: no convergence"),
    "raises in a process": (
        {"run": "my_simulators.raises", "executor": "processes"},
        "raised ZeroDivisionError: no convergence",
    ),
    "raises in a command": ({"command": ("json", "raises")}, "ended with exit code 1, saying 'no convergence'"),
    "hangs here": ({"run": "my_simulators.hangs", "timeout": 0.3}, "did not answer within 0.3 s"),
    "hangs in a process": (
        {"run": "my_simulators.hangs", "executor": "processes", "timeout": 0.5},
        "did not answer within 0.5 s, and its process was killed",
    ),
    "hangs in a command": (
        {"command": ("json", "hangs"), "timeout": 1.0},
        "did not answer within 1.0 s, and was killed",
    ),
    "dies": ({"run": "my_simulators.dies", "executor": "processes"}, "ended its process, with exit code 7"),
    "is no number": ({"run": "my_simulators.not_a_number"}, r"finite numbers .* answered \[.*, nan\]"),
    "writes noise": ({"command": ("json", "noise")}, r"wrote what is no json of numbers .*b'hello"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_quotes_the_row_or_is_dropped(mine, way):
    arguments, message = WAYS[way]
    of_command = "command" in arguments
    if of_command:
        arguments = {**arguments, "command": command(*arguments["command"])}
    points = with_bad()
    simulator = Simulator(out_dim=2, batch_size=4, on_failure="drop", **arguments)
    found = simulator.ask(points)
    assert found.valid.tolist() == [True] * 4 + [False] + [True] * 2
    assert np.isnan(found.values[4]).all()
    np.testing.assert_array_equal(found.values[found.valid], expected(of_command)[found.valid])
    assert simulator.counts.failures == 1
    simulator.on_failure = "raise"
    start = time.monotonic()
    with pytest.raises(SimulatorError, match=r"for the input \[99.0, .*" + message.split(" .* ")[-1]) as error:
        simulator.ask(points[4:5])
    assert time.monotonic() - start < 10.0
    np.testing.assert_array_equal(error.value.point, points[4])
    assert isinstance(error.value, ValueError) == (way == "is no number")
    # what was killed or has died is started again
    np.testing.assert_array_equal(simulator.ask(POINTS).values, expected(of_command))
    simulator.close()


def test_the_cause_of_an_error_is_kept():
    def fails(points):
        raise ZeroDivisionError("here")

    with pytest.raises(SimulatorError) as error:
        Simulator(fails).ask(POINTS)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda points: points[:-1], r"7 input rows, the first of which is \[0.12.*shape \(7, 2\), but got \(6, 3\)"),
        (lambda points: points, r"shape \(7, 2\), but got \(7, 3\)"),
        (lambda points: None, "got NoneType"),
        (lambda points: ["a"] * len(points), "Expected numbers .* got list"),
    ],
)
@pytest.mark.parametrize("on_failure", ["raise", "drop"])
def test_a_wrong_shape_always_raises(answer, message, on_failure):
    if message == "got NoneType":
        message = r"but got \(\)"
    with pytest.raises(SimulatorAnswerError, match=message) as error:
        Simulator(answer, out_dim=2, on_failure=on_failure, retries=3).ask(POINTS)
    assert isinstance(error.value, ValueError)


def test_retries_back_off(monkeypatch):
    waited, calls = [], []
    monkeypatch.setattr(time, "sleep", waited.append)

    def third_time(points):
        calls.append(len(points))
        if (points[:, 0] > 50.0).any() and len(calls) < 5:
            return np.full(len(points), np.inf) if len(calls) == 3 else 1 / 0
        return points.sum(axis=1)

    simulator = Simulator(third_time, retries=3, backoff=0.5)
    np.testing.assert_array_equal(simulator.ask(with_bad(0)).values[:, 0], with_bad(0).sum(axis=1))
    # all rows; the bad one alone, again, and again; then the others
    assert calls == [7, 1, 1, 1, 1, *[1] * 6]
    assert waited == [0.5, 1.0, 2.0]
    assert (simulator.counts.retries, simulator.counts.failures) == (3, 0)
    with pytest.raises(SimulatorError, match="raised .* in 3 attempts"):
        Simulator(lambda points: 1 / 0, retries=2).ask(POINTS[:1])


def test_nearest_answer_stands_in():
    def fails(points):
        answers = points.sum(axis=1)
        answers[points[:, 0] > 50.0] = np.nan
        return answers

    simulator = Simulator(fails, on_failure="nearest")
    points = np.array([[0.0, 0.0], [10.0, 0.0], [60.0, 1.0]])
    found = simulator.ask(points)
    assert found.values[:, 0].tolist() == [0.0, 10.0, 10.0]
    assert found.valid.tolist() == [True, True, False]
    # answers of earlier calls count as well
    simulator.ask(np.array([[40.0, 1.0]]))
    assert simulator.ask(points[2:]).values[0, 0] == 41.0
    with pytest.raises(SimulatorError, match=r"needs an answer to go by, .* failed on \[60.0, 1.0\]"):
        Simulator(fails, on_failure="nearest").ask(points[2:])


# -- memory ------------------------------------------------------------------------------------------------------------
def test_cache_forgets_what_was_used_least_recently():
    simulator = Simulator(lambda points: points.sum(axis=1), cache=2)
    ask = lambda *rows: simulator.ask(POINTS[list(rows)]).values[:, 0].tolist()  # noqa: E731
    sums = POINTS.sum(axis=1).tolist()
    assert ask(0, 0, 1) == [sums[0], sums[0], sums[1]]
    assert (simulator.counts.queries, simulator.counts.hits) == (2, 1)
    assert ask(0) == [sums[0]]
    assert ask(2) == [sums[2]]  # 1 is forgotten
    assert ask(0, 1) == [sums[0], sums[1]]
    assert (simulator.counts.queries, simulator.counts.hits) == (4, 3)


def test_without_a_cache_nothing_is_remembered():
    simulator = Simulator(lambda points: points.sum(axis=1))
    simulator.ask(POINTS[[0, 0]])
    simulator.ask(POINTS[[0, 0]])
    assert (simulator.counts.queries, simulator.counts.hits) == (4, 0)


def good(points):
    return np.stack([np.sin(points).sum(axis=1), np.cos(points).sum(axis=1)], axis=1)


def test_answers_outlive_the_run_and_a_kill(tmp_path):
    path = tmp_path / "folder" / "answers.jsonl"
    Simulator(good, out_dim=2, results=path).ask(POINTS)
    head, *lines = path.read_text().splitlines()
    assert json.loads(head)["version"] == 1
    assert len(lines) == 7
    again = Simulator(good, out_dim=2, results=path)
    np.testing.assert_array_equal(again.ask(POINTS).values, expected())
    assert (again.counts.queries, again.counts.hits) == (0, 7)
    # killed while it wrote the last line
    path.write_bytes(path.read_bytes()[:-9])
    killed = Simulator(good, out_dim=2, results=path)
    np.testing.assert_array_equal(killed.ask(POINTS).values, expected())
    assert killed.counts.queries == 1
    assert len(path.read_text().splitlines()) == 8
    last = Simulator(good, out_dim=2, results=path)
    last.ask(POINTS)
    assert last.counts.queries == 0
    # killed while it wrote the first line
    path.write_bytes(b'{"kind": "lig')
    assert Simulator(good, out_dim=2, results=path).ask(POINTS).valid.all()
    assert len(path.read_text().splitlines()) == 8


def test_failures_are_asked_again_in_the_next_run(tmp_path):
    path = tmp_path / "answers.jsonl"

    def bad(points):
        return np.where(points[:, :1] > 50.0, np.nan, points[:, :1])

    Simulator(bad, on_failure="drop", results=path, cache=9).ask(with_bad())
    again = Simulator(bad, on_failure="drop", results=path)
    again.ask(with_bad())
    assert (again.counts.queries, again.counts.hits) == (1, 6)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    Simulator(good, out_dim=2, results=path).ask(POINTS)
    with pytest.raises(ValueError, match="to hold the answers of .*numpy.sin"):
        Simulator("numpy.sin", out_dim=3, results=path).ask(POINTS)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="it is damaged"):
        Simulator(good, out_dim=2, results=path).ask(POINTS)


# -- life --------------------------------------------------------------------------------------------------------------
def test_pickle_and_copy(mine):
    simulator = Simulator(mine.good, out_dim=2, executor="threads", workers=2, cache=4)
    simulator.ask(POINTS)
    twin = pickle.loads(pickle.dumps(simulator))
    np.testing.assert_array_equal(twin.ask(POINTS).values, expected())
    # a copy of a network asks the same simulator
    assert copy.deepcopy(simulator) is simulator
    simulator.close(), twin.close()


def test_workers_end_with_the_simulator(mine):
    simulator = Simulator(mine.good, out_dim=2, executor="processes")
    simulator.ask(POINTS)
    member = simulator._call.members[0].process
    assert member.is_alive()
    del simulator
    with pytest.raises(ValueError, match="closed"):
        member.is_alive()


def test_one_instance_answers_all_ranks(tmp_path):
    def on_rank(rank):
        here = os.getpid()

        def counted(points):
            return np.concatenate([points, np.full((len(points), 1), here)], axis=1)

        simulator = Simulator(counted, out_dim=4, rank_zero_service=True)
        found = simulator.ask(POINTS[: 2 + 3 * rank]).values
        error = None
        try:
            Simulator(lambda points: points, out_dim=4, rank_zero_service=True).ask(POINTS)
        except SimulatorAnswerError as raised:
            error = str(raised)
        return found, simulator.counts.queries, error

    (first, asked, error), (second, asked_too, error_too) = run_on_two_ranks(tmp_path, on_rank)
    np.testing.assert_array_equal(first[:, :3], POINTS[:2])
    np.testing.assert_array_equal(second[:, :3], POINTS[:5])
    assert first[0, 3] == second[0, 3]
    assert (asked, asked_too) == (7, 0)
    assert error == error_too
    assert "but got (14, 3)" in error


def test_a_fork_starts_workers_of_its_own(tmp_path, mine):
    simulator = Simulator(mine.good, out_dim=2, executor="threads", workers=2)
    simulator.ask(POINTS)
    found = run_on_two_ranks(tmp_path / "ranks", lambda rank: simulator.ask(POINTS).values)
    np.testing.assert_array_equal(found[1], expected())
    simulator.close()


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_dim": 0}, "`out_dim` to be at least 1, but got 0"),
        ({"workers": 0}, "`workers` to be at least 1, but got 0"),
        ({"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
        ({"timeout": 0.0}, "`timeout` to be positive, but got 0.0"),
        ({"retries": -1}, "`retries` to be at least 0, but got -1"),
        ({"backoff": -0.1}, "`backoff` to be at least 0, but got -0.1"),
        ({"cache": -1}, "`cache` to be at least 0, but got -1"),
        ({"executor": "fork"}, r"`executor` to be one of \['serial', 'threads', 'processes'\], but got 'fork'"),
        ({"on_failure": "ignore"}, "`on_failure` to be one of .*, but got 'ignore'"),
        ({"command_format": "csv"}, "`command_format` to be one of .*, but got 'csv'"),
        ({"run": "numpy.sinn"}, "'numpy.sinn', which cannot be imported"),
        ({"run": "no_such_module.f"}, "'no_such_module.f', which cannot be imported: no module"),
        ({"run": "numpy.pi"}, "'numpy.pi' to be callable, but got float"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Simulator(**{"run": "numpy.sin", **arguments})


def test_processes_that_cannot_import_say_so():
    simulator = Simulator("no_such_module.f", executor="processes")
    with pytest.raises(SimulatorError, match="cannot be imported: ModuleNotFoundError: no module"):
        simulator.ask(POINTS)
    simulator.close()


def test_bad_combinations():
    with pytest.raises(MisconfigurationException, match="exactly one of the arguments `run` and `command`"):
        Simulator()
    with pytest.raises(MisconfigurationException, match="exactly one"):
        Simulator("numpy.sin", command="ls")
    with pytest.raises(MisconfigurationException, match="processes can import, but got <function"):
        Simulator(lambda points: points, executor="processes")
    with pytest.raises(SimulatorError, match="cannot be started: .*no_such_program"):
        Simulator(command="no_such_program").ask(POINTS)
    with pytest.raises(ValueError, match=r"shape \(n, d\), but got \(3,\)"):
        Simulator("numpy.sin").ask(POINTS[0])
