"""Densities of the elements: measured against the formula, folds without a leak."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.datamodules import ElementDensityDataModule, crystal_density


def test_formula_against_measured_densities():
    """CRC Handbook: lattice constant in angstrom, molar mass, structure and density."""
    known = {
        "Po": (3.359, 209.0, 0, 9.20),
        "W": (3.165, 183.84, 1, 19.3),
        "Al": (4.0496, 26.982, 2, 2.70),
        "Si": (5.4307, 28.085, 3, 2.33),
        "Mg": (3.2094, 24.305, 4, 1.74),
    }
    points = np.array([row[:3] for row in known.values()])
    np.testing.assert_allclose(crystal_density(points)[:, 0], [row[3] for row in known.values()], rtol=0.012)


def data(**kwargs):
    pytest.importorskip("mendeleev")
    module = ElementDensityDataModule(**kwargs)
    module.setup()
    return module


def test_elements_are_those_with_a_crystal_of_the_formula():
    module = data()
    assert len(module.symbols) == 61
    assert {"Cu", "W", "Si", "Mg"} <= set(module.symbols)
    assert not {"He", "Ar", "N", "Hg"} & set(module.symbols)
    inputs, targets = (
        torch.cat([getattr(module, f"{part}_dataset").tensors[place] for part in ("train", "test")]) for place in (0, 1)
    )
    assert inputs.shape == (61, 17)
    assert inputs.isfinite().all()
    torch.testing.assert_close(inputs[:, :15].mean(dim=0), torch.zeros(15), rtol=0.0, atol=1e-5)
    assert targets.min() > 0.05
    # with the measured lattice constants the formula is right to a few percent
    rows = module.rows()
    order = torch.cat([rows["train"], rows["test"]])
    points = torch.cat([module.lattice_constants[order].unsqueeze(1), inputs[:, list(module.known)]], dim=1)
    error = np.abs(crystal_density(points.double().numpy()) / targets.numpy() - 1.0)
    assert np.median(error) < 0.02


def test_folds_cover_all_and_never_meet():
    seen = []
    for fold in range(5):
        rows = data(fold=fold, train_fraction=0.4, val_rows=4).rows()
        sizes = {part: len(members) for part, members in rows.items()}
        assert sizes["val"] == 4
        assert sizes["train"] == round(0.4 * 61) - 4
        together = torch.cat(list(rows.values()))
        assert len(together.unique()) == len(together)
        seen += rows["test"].tolist()
    assert sorted(seen) == list(range(61))
    assert torch.equal(data(seed=3).rows()["train"], data(seed=3).rows()["train"])
    assert not torch.equal(data(seed=3).rows()["test"], data(seed=4).rows()["test"])


def test_loaders():
    module = data(batch_size=7)
    inputs, targets = next(iter(module.train_dataloader()))
    assert inputs.shape == (7, 17)
    assert targets.shape == (7, 1)
    assert module.val_dataloader() == []
    whole = data(val_rows=3)
    assert len(next(iter(whole.train_dataloader()))[0]) == 48 - 3
    assert len(next(iter(whole.val_dataloader()))[0]) == 3
    assert len(next(iter(whole.predict_dataloader()))[0]) == 13


def test_bad_input(monkeypatch):
    for arguments, message in (
        ({"folds": 1}, "`folds` to be at least 2, but got 1"),
        ({"fold": 5}, "`fold` to be from 0 to 4, but got 5"),
        ({"train_fraction": 0.9}, r"`train_fraction` to be in \(0, 0.8\], but got 0.9"),
        ({"val_rows": -1}, "`val_rows` to be at least 0, but got -1"),
        ({"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ElementDensityDataModule(**arguments)
    with pytest.raises(MisconfigurationException, match="leave something of the 12 training elements, but got 12"):
        data(train_fraction=0.2, val_rows=12)


def test_a_missing_package_is_named(monkeypatch):
    import sys

    from lightning_trust.datamodules.zeroth_order import element_density

    element_density._elements.cache_clear()
    monkeypatch.setitem(sys.modules, "mendeleev.fetch", None)
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning_trust\[sciml\]"'):
        ElementDensityDataModule().setup()
