"""Curves of accuracy against forward passes: what tables and drawings take from them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks.curve_results import Curve, CurveResult, drawing

CURVES = [
    Curve("a", 1, [3, 30, 300], [0.2, 0.5, 0.9], 3.0, 1.0),
    Curve("a", 2, [3, 30, 300], [0.4, 0.7, 0.8], 3.0, 1.0),
    Curve("b & c", 1, [10, 100], [0.1, 0.3], 10.0, 2.0),
]


def result() -> CurveResult:
    return CurveResult.measured_here("awp", "words", CURVES)


def test_values_within_a_budget():
    assert [CURVES[0].at(budget) for budget in (2, 3, 299, 300, 1e6)] == [None, 0.2, 0.5, 0.9, 0.9]
    assert [CURVES[0].to_reach(level) for level in (0.2, 0.6, 0.95)] == [3, 300, None]
    found = result()
    assert found.median_at("a", 30) == pytest.approx(0.6)
    assert found.median_at("b & c", 3) is None
    assert found.median_to_reach("a", 0.6) == 165
    assert found.median_to_reach("a", 0.85) is None


def test_written_and_read(tmp_path):
    path = result().write(tmp_path / "curves.json")
    assert CurveResult.read(path).rows == CURVES


def test_drawing_shows_every_run_where_it_is():
    root = ET.fromstring(drawing(result()))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2
    points = [[float(v) for v in point.split(",")] for point in lines[0].get("points").split()]
    # a factor of ten is a third of the axis from 1 to 1,000, and what is better stands higher
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] > points[1][1] > points[2][1]
    words = "".join(root.itertext())
    assert "b & c" in words
    assert "forward passes" in words


def test_seeds_with_points_at_different_places_are_drawn():
    curves = [
        Curve("a", 1, [0, 1, 100], [0.1, 0.2, 0.6], 3.0, 1.0),
        Curve("a", 2, [0, 10, 1000], [0.1, 0.4, 0.8], 3.0, 1.0),
    ]
    root = ET.fromstring(drawing(CurveResult.measured_here("awp", "words", curves)))
    (line,) = [element for element in root.iter() if element.tag.endswith("polyline")]
    points = [[float(v) for v in point.split(",")] for point in line.get("points").split()]
    # from 10, where both have begun, to 100, where the first ends: medians 0.3 and 0.5
    assert len(points) == 2
    assert points[0][1] - points[1][1] == pytest.approx(0.2 * 300, abs=0.2)


def test_a_colour_that_comes_again_is_dashed():
    curves = [Curve(f"run {place}", 1, [1, 10], [0.1, 0.2], 3.0, 1.0) for place in range(9)]
    root = ET.fromstring(drawing(CurveResult.measured_here("awp", "words", curves)))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert lines[8].get("stroke") == lines[0].get("stroke")
    assert [bool(line.get("stroke-dasharray")) for line in lines] == [False] * 8 + [True]
