"""The benchmark runs, at sizes that take no time, and its runs are what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import tensor_bp_free as benchmark
from benchmarks.table_results import TableResult
from lightning_trust.nn import SteinDerivatives

SMALL = {"train_rows": 200, "test_rows": 50}


def test_every_run_on_two_steps(tmp_path):
    chosen = {key: replace(run, losses=40) for key, run in benchmark.smoke().items()}
    # coordinates of the network for Poisson's equation, at two steps
    chosen["Poisson, 2 dimensions", "tensor train, sparse grid"] = replace(
        chosen["Poisson, 2 dimensions", "tensor train, sparse grid"], losses=1000
    )
    found = list(benchmark.rows((1,), chosen))
    assert len(found) == sum(len(run.trainings) for run in chosen.values())
    for row in found:
        assert set(benchmark.COLUMNS) - {"accuracy"} <= set(row)
        steps = 0 if row["run"].endswith("not trained") else 2
        if row["run"].endswith("back-propagation") or steps == 0:
            assert (row["steps"], row["losses"]) == (steps, steps)
        else:
            small = row["scenario"].startswith("HJB") or row["run"].startswith("dense")
            assert row["losses"] == pytest.approx(40 if small else 1000, rel=0.1)
    parameters = {row["parameters"] for row in found if row["scenario"].startswith("HJB")}
    assert parameters == {1929}
    result = TableResult.read(benchmark.write(found, tmp_path / "result.json"))
    assert [row.values["rel_l2"] for row in result.rows] == [row["rel_l2"] for row in found]
    assert {row.values["accuracy"] for row in result.rows} == {None}


def test_trainings_from_losses_have_as_many_of_them():
    runs = benchmark.image_runs(20_000)
    for name in ("tensor train, back-propagation", "tensor train, RGE"):
        row = benchmark.measured_images(replace(runs[name], steps=3), 1, **SMALL)
        assert (row["steps"], row["parameters"]) == (3, 1504)
        assert row["losses"] == (3 if name.endswith("back-propagation") else 60)
        assert 0.0 <= row["accuracy"] <= 1.0
    assert [runs[name].steps for name in ("tensor train, RGE", "dense, RGE", "dense, back-propagation")] == [1000] * 3
    # 500 steps of 20 losses and 33 of about 302, or 66 of these
    assert [runs[f"tensor train, {name}"].steps for name in ("HybridZO", "CGE")] == [533, 66]
    coordinates = benchmark.measured_images(replace(runs["tensor train, CGE"], steps=1), 1, **SMALL)
    assert coordinates["losses"] == pytest.approx(302, rel=0.2)


def test_stein_draws_make_as_many_evaluations_as_the_grid():
    for dim, draws in ((2, 6), (3, 12), (21, 462)):
        rivals = benchmark.grid_and_rivals(dim, 0.1)
        equal = rivals[f"Stein, {draws} draws"](0)
        assert isinstance(equal, SteinDerivatives)
        assert equal.points_per_point(dim) == rivals["sparse grid"](0).points_per_point(dim)


def test_a_seed_decides_a_row():
    key = ("Poisson, 2 dimensions", "dense, Stein, 6 draws")
    chosen = {key: benchmark.smoke()[key]}
    (first,), (again,), (other,) = (list(benchmark.rows((seed,), chosen)) for seed in (1, 1, 2))
    assert first["rel_l2"] == pytest.approx(again["rel_l2"])
    assert first["rel_l2"] != other["rel_l2"]


def test_what_is_done_is_not_done_again():
    key = ("Poisson, 2 dimensions", "dense, Stein, 6 draws")
    chosen, shown = {key: benchmark.smoke()[key]}, f"{key[1]}, back-propagation"
    (row,) = benchmark.rows((1, 2), chosen, {(key[0], shown, 1)})
    assert (row["run"], row["seed"]) == (shown, 2)
    every = {(benchmark.SCENARIO, name, 1) for name in benchmark.image_runs()}
    assert not list(benchmark.image_rows((1,), done=every))
