"""The page is one whole document that needs nothing else."""

from __future__ import annotations

import errno
import os
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lightning_trust.report import collect, headline, write_page

VOID = {"meta", "br", "link", "img"}


class Outline(HTMLParser):
    """Checks nesting and gathers identifiers, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "xlink:href") if name in values]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def runs(tmp_path, make_record):
    folder = tmp_path / "runs"
    make_record(
        "Retrain", role="retrain", seed=1, UA=9.5, MIA=13.0, seconds={"steps": 45.0, "passes": 0, "fit": 50}
    ).write(folder / "retrain")
    make_record("Retrain", role="retrain", seed=2, UA=9.1, MIA=12.6).write(folder / "retrain-2")
    make_record("SalUn").write(folder / "salun")
    make_record("Fine<Tune> & co", UA=3.0, sparsity=0.9).write(folder / "fine")
    make_record("SalUn", scenario="class 0", hash="two").write(folder / "class")
    return folder


def parsed(path):
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    outline.close()
    assert outline.stack == []
    return outline


def test_page_is_whole_self_contained_and_escaped(runs, tmp_path):
    path = write_page(collect([runs]), tmp_path / "out" / "report.html")
    outline = parsed(path)
    text = path.read_text(encoding="utf-8")
    assert all(link.startswith("#") for link in outline.links)
    assert {link[1:] for link in outline.links} <= set(outline.ids)
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert "Fine<Tune>" not in text
    assert "Fine<Tune> & co" in outline.text
    for word in (
        "Unlearning report",
        "How it was measured",
        "Definitions",
        "A CPU, 2 cores usable",
        "RBF SVC",
        "1,234",
    ):
        assert word in outline.text


def test_every_figure_is_there_and_follows_the_page_colours(runs, tmp_path):
    text = write_page(collect([runs]), tmp_path / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    # gap, time and confidence where there is a Retrain; confidence alone where there is none
    assert len(figures) == 4
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "var(--" in figure
        assert "#0a0b" not in figure
    assert "Retrain spread 0.20" in figures[1]


def test_page_is_the_same_for_the_same_runs(runs, tmp_path):
    first = write_page(collect([runs]), tmp_path / "a.html").read_text(encoding="utf-8")
    assert write_page(collect([runs]), tmp_path / "b.html").read_text(encoding="utf-8") == first


def test_headlines_are_sentences(runs, tmp_path, make_record):
    without, with_retrain = collect([runs]).scenarios
    assert headline(with_retrain) == (
        "SalUn is 0.6 points from Retrain on average, two Retrains differ by 0.2; it took 10 % of Retrain's time."
        " Before unlearning, the model was 5.0 points away."
    )
    assert headline(without) == "There is no Retrain to compare SalUn with, so the distance to it is not measured."
    make_record("Retrain", role="retrain").write(tmp_path / "only")
    (only,) = collect([tmp_path / "only"]).scenarios
    assert headline(only) == "Only Retrain was run; there is no method to compare with it yet."


def test_retrain_alone_and_zero_times_still_make_a_page(tmp_path, make_record):
    nothing = {"steps": 0, "passes": 0, "fit": 0}
    make_record("Retrain", role="retrain", seconds=nothing).write(tmp_path / "a")
    parsed(write_page(collect([tmp_path]), tmp_path / "report.html"))
    make_record("SalUn", seconds=nothing).write(tmp_path / "b")
    outline = parsed(write_page(collect([tmp_path]), tmp_path / "report.html"))
    assert "SalUn is 0.0 points from Retrain on average." in outline.text


def test_damaged_records_are_listed(runs, tmp_path):
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    outline = parsed(write_page(collect([runs]), tmp_path / "report.html"))
    assert "Left out" in outline.text
    assert "broken/run.json" in outline.text


def test_missing_matplotlib_names_the_extra(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_trust\[report\]"'):
        write_page(collect([runs]), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_full_disk_leaves_the_old_page(runs, tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "out" / "report.html"
    write_page(collect([runs / "salun"]), path)
    old = path.read_text(encoding="utf-8")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_page(collect([runs]), path)
    assert path.read_text(encoding="utf-8") == old
    assert list(path.parent.iterdir()) == [path]
