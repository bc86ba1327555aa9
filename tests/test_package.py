"""The package as a whole: importing it, its version, its rooms and their names."""

import configparser
import importlib
import pkgutil
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import lightning_trust

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(room.name for room in pkgutil.iter_modules(lightning_trust.__path__) if room.ispkg)
SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg")


def public_names(room):
    return importlib.import_module(f"lightning_trust.{room}").__all__


def natural_order(name):
    """Constants, then classes, then the rest, numbers by value: the order that ruff's RUF022 asks for."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def test_import_is_lazy():
    code = (
        "import sys, lightning_trust;"
        "heavy = {'torch', 'timm', 'lightning', 'torchvision', 'sklearn'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "lightning_trust.nn;"
        "assert 'torch' in sys.modules;"
        "assert 'timm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_is_that_of_setup_cfg():
    assert lightning_trust.__version__ == SETUP["metadata"]["version"]


def test_version_heads_a_section_of_the_changelog_once_released():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert sections[0] == "Unreleased"
    released = sections[1:]
    assert not released or released[0] == lightning_trust.__version__


def test_dependencies_pin_no_torch_and_exclude_the_compromised_lightning():
    required = SETUP["options"]["install_requires"].split()
    assert "torch>=2.6" in required
    assert "lightning>=2.6,!=2.6.2,!=2.6.3,<2.7" in required


def test_rooms_are_attributes_of_the_package():
    assert {"core", "datamodules", "modules", "nn"} <= set(ROOMS)
    for room in ROOMS:
        assert getattr(lightning_trust, room) is importlib.import_module(f"lightning_trust.{room}")
        assert room in dir(lightning_trust)


def test_unknown_room_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_trust' has no attribute 'nonexistent'"):
        lightning_trust.nonexistent  # noqa: B018
    assert not hasattr(lightning_trust, "_private")


def test_missing_dependency_of_a_room_is_not_taken_for_a_missing_room(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.setattr(lightning_trust, "__path__", [*lightning_trust.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        lightning_trust.broken  # noqa: B018


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_sorted_and_importable(room):
    names = public_names(room)
    assert names == sorted(names, key=natural_order)
    assert len(names) == len(set(names))
    module = importlib.import_module(f"lightning_trust.{room}")
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_docstrings(room):
    module = importlib.import_module(f"lightning_trust.{room}")
    assert (module.__doc__ or "").strip()
    named = [(name, getattr(module, name)) for name in public_names(room)]
    assert [name for name, value in named if callable(value) and not (value.__doc__ or "").strip()] == []


def test_public_names_are_unique_over_the_rooms():
    homes = defaultdict(set)
    for room in ROOMS:
        for name in public_names(room):
            if name[0].isupper():
                homes[name].add(room)
    assert {name: rooms for name, rooms in homes.items() if len(rooms) > 1} == {}
