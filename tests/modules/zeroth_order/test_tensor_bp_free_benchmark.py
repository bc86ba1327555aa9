"""The benchmark runs, at sizes that take no time, and its runs are what it says."""

from __future__ import annotations

import pytest

from benchmarks import tensor_bp_free as benchmark
from lightning_trust.nn import SteinDerivatives


def test_every_run_on_two_steps():
    found = list(benchmark.rows((1,), benchmark.smoke()))
    assert len(found) == len(benchmark.smoke()) * len(benchmark.TRAININGS)
    for row in found:
        assert set(benchmark.COLUMNS) <= set(row)
        steps = 0 if row["run"].endswith("not trained") else 2
        if row["run"].endswith("back-propagation") or steps == 0:
            assert row["evaluations"] == steps * 2 * row["points_per_point"]
    parameters = {row["parameters"] for row in found if row["scenario"].startswith("HJB")}
    assert parameters == {1929}


def test_stein_draws_make_as_many_evaluations_as_the_grid():
    for dim, draws in ((2, 6), (3, 12), (21, 462)):
        rivals = benchmark.grid_and_rivals(dim, 0.1)
        equal = rivals[f"Stein, {draws} draws"](0)
        assert isinstance(equal, SteinDerivatives)
        assert equal.points_per_point(dim) == rivals["sparse grid"](0).points_per_point(dim)


def test_a_seed_decides_a_row():
    key = ("Poisson, 2 dimensions", "Stein, 6 draws")
    chosen = {key: benchmark.smoke()[key]}
    (first,), (again,), (other,) = (list(benchmark.rows((seed,), chosen)) for seed in (1, 1, 2))
    assert first["rel_l2"] == pytest.approx(again["rel_l2"])
    assert first["rel_l2"] != other["rel_l2"]
