"""No method is listed without its parts: classes, configurations, docs page, proofs, results."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from lightning_trust.catalog import FAMILIES, METHODS, MethodEntry, method, methods

ROOT = Path(__file__).parents[1]
each_method = pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)


@each_method
def test_classes_import_from_their_room(entry: MethodEntry) -> None:
    assert entry.classes
    for path in entry.classes:
        room, _, name = path.rpartition(".")
        module = importlib.import_module(room)
        assert name in module.__all__
        assert getattr(module, name).__name__ == name


@each_method
def test_files_have_the_methods_one_name(entry: MethodEntry) -> None:
    file = f"{entry.family}/{entry.name.replace('-', '_')}"
    assert entry.config == f"configs/{file}.yaml"
    assert entry.docs == f"docs/{file}.md"
    assert any(proof.endswith(f"/{entry.family}/test_{entry.name.replace('-', '_')}.py") for proof in entry.proofs)


@each_method
@pytest.mark.parametrize("part", ["config", "paper_config", "overlay_config", "docs", "results"])
def test_files_exist(entry: MethodEntry, part: str) -> None:
    path = ROOT / getattr(entry, part)
    assert path.is_file()
    assert path.read_text(encoding="utf-8").strip()


@each_method
def test_proofs_exist_and_test_the_class(entry: MethodEntry) -> None:
    assert entry.proofs
    text = "".join((ROOT / proof).read_text(encoding="utf-8") for proof in entry.proofs)
    assert "def test_" in text
    assert entry.classes[0].rpartition(".")[2] in text


@each_method
def test_overlay_appends_to_the_users_callbacks(entry: MethodEntry) -> None:
    text = (ROOT / entry.overlay_config).read_text(encoding="utf-8")
    assert re.search(r"^\s*callbacks\+:", text, flags=re.MULTILINE)
    assert not re.search(r"^\s*callbacks:", text, flags=re.MULTILINE)


@each_method
def test_words_are_filled_in(entry: MethodEntry) -> None:
    assert entry.family in FAMILIES
    assert entry.title
    assert not entry.title.endswith(".")
    for paper in entry.papers:
        assert paper.title
        assert re.search(r"\b(19|20)\d\d\b", paper.venue)


def test_names_and_classes_are_unique() -> None:
    names = [entry.name for entry in METHODS]
    classes = [path.rpartition(".")[2] for entry in METHODS for path in entry.classes]
    assert len(names) == len(set(names))
    assert len(classes) == len(set(classes))


def test_methods_of_a_family() -> None:
    assert methods() == METHODS
    assert {entry.family for entry in methods("unlearning")} == {"unlearning"}
    assert methods("theory") == ()
    with pytest.raises(ValueError, match=r"`family` to be one of .*, but got 'unlearn'. Did you mean 'unlearning'\?"):
        methods("unlearn")


def test_method_by_name_or_class() -> None:
    assert method("fine-tune") is method("FineTune")
    with pytest.raises(ValueError, match=r"but got 'fine_tune'. Did you mean 'fine-tune'\?"):
        method("fine_tune")
    with pytest.raises(ValueError, match=r"but got 'salum'. Did you mean 'salun'\?"):
        method("salum")
    with pytest.raises(ValueError, match=r"but got 'zzz'\.$"):
        method("zzz")
