"""Densities of the elements, and the crystallography that gives a density for a lattice constant."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_trust.datamodules.split_data_module import SplitDataModule

Array = NDArray[np.float64]

#: Crystal structures by their code.
STRUCTURES = ("SC", "BCC", "FCC", "DIA", "HEX")
_ATOMS = np.array([1.0, 2.0, 4.0, 8.0, 2.0])
# volume of the cell over the cube of its lattice constant; hexagonal: two atoms, close packing of spheres
_VOLUME = np.array([1.0, 1.0, 1.0, 1.0, 3**0.5 / 2 * (8 / 3) ** 0.5])
# one atomic mass unit a cubic angstrom, in grams a cubic centimetre
_UNIT = 1.66053906892
_BLOCKS = ("s", "p", "d", "f")
_MEASURED = ("period", "covalent_radius_pyykko", "vdw_radius", "dipole_polarizability", "en_ghosh", "atomic_weight")
# below it an element is a gas when its density is measured, whatever its crystal is
_SOLID = 0.05


def crystal_density(points: Array) -> Array:
    r"""Density of a crystal of one element.

    .. math:: \rho = \frac{Z \, M}{N_A \, V}, \qquad V = f a^3

    with :math:`Z` atoms in a cell of volume :math:`V`; :math:`f` is 1 for cubic cells and :math:`\sqrt 2` for close
    packed hexagonal ones, whose axes are taken to have the ratio of packed spheres.

    Args:
        points: Lattice constant :math:`a` in angstrom, molar mass :math:`M` in g/mol and place of the structure in
            ``("SC", "BCC", "FCC", "DIA", "HEX")``; shape ``(n, 3)``.

    Returns:
        Density in g/cm3, shape ``(n, 1)``.

    Example:
        >>> copper = np.array([[3.61, 63.546, 2]])
        >>> crystal_density(copper).round(2)
        array([[8.97]])

    """
    constant, mass, structure = points.T
    code = structure.astype(int)
    density: Array = _UNIT * _ATOMS[code] * mass / (_VOLUME[code] * constant**3)
    return density[:, None]


@dataclass(frozen=True)
class _Elements:
    """All usable elements."""

    symbols: tuple[str, ...]
    features: Tensor
    known: Tensor
    density: Tensor
    lattice_constant: Tensor


class ElementDensityDataModule(SplitDataModule):
    """Measured densities of 61 solid elements: from what is known of an atom and its structure to g/cm3.

    The numbers are those of the ``mendeleev`` package (extra ``sciml``); nothing is downloaded. The elements are those
    with a cubic, diamond or close-packed hexagonal crystal, a lattice constant and a density above 0.05 g/cm3. The
    lattice constant is no feature: with :func:`crystal_density` in the network, it is what a network has to find.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 17)``, targets float32 ``(B, 1)``. The first 15 columns, of
    mean 0 and variance 1 over all elements, are period, covalent and van der Waals radius, polarisability,
    electronegativity (Ghosh), atomic weight, block (4 columns) and structure (5 columns). The last two, :attr:`known`,
    are the atomic weight in g/mol and the code of the structure, as :func:`crystal_density` takes them.

    Args:
        fold: Which of the folds is for the test.
        folds: In how many folds the elements are dealt.
        train_fraction: Share of all elements to train on, at most those of the other folds.
        val_rows: How many of the training elements are for validation instead.
        batch_size: Rows per batch; all of them if None.
        seed: Seed of the permutation that deals the elements.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: If ``val_rows`` leave nothing to train on, or ``mendeleev`` is not installed.

    """

    #: Columns that the density takes as they are.
    known = (15, 16)

    def __init__(
        self,
        fold: int = 0,
        folds: int = 5,
        train_fraction: float = 0.8,
        val_rows: int = 0,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if folds < 2:
            raise ValueError(f"Expected argument `folds` to be at least 2, but got {folds}.")
        if not 0 <= fold < folds:
            raise ValueError(f"Expected argument `fold` to be from 0 to {folds - 1}, but got {fold}.")
        most = 1.0 - 1.0 / folds
        if not 0.0 < train_fraction <= most + 1e-9:
            raise ValueError(f"Expected argument `train_fraction` to be in (0, {most:g}], but got {train_fraction}.")
        if val_rows < 0:
            raise ValueError(f"Expected argument `val_rows` to be at least 0, but got {val_rows}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be at least 1, but got {batch_size}.")
        self.fold = fold
        self.folds = folds
        self.train_fraction = train_fraction
        self.val_rows = val_rows
        self.batch_size = batch_size
        self.seed = seed

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols of all elements, in order of their numbers."""
        return _elements().symbols

    @property
    def lattice_constants(self) -> Tensor:
        """Measured lattice constants in angstrom, shape ``(61,)``; to compare with."""
        return _elements().lattice_constant

    def rows(self) -> dict[str, Tensor]:
        """Which elements are in ``train``, ``val`` and ``test``."""
        count = len(_elements().symbols)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        test = order[self.fold :: self.folds]
        pool = order[~torch.isin(order, test)]
        # a permutation of each fold's own, so that folds do not train on the same few
        pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed + 1 + self.fold))]
        kept = pool[: max(1, min(len(pool), round(self.train_fraction * count)))]
        if self.val_rows >= len(kept):
            raise MisconfigurationException(
                f"Expected `val_rows` to leave something of the {len(kept)} training elements, but got {self.val_rows}."
            )
        return {"train": kept[self.val_rows :], "val": kept[: self.val_rows], "test": test}

    def setup(self, stage: str | None = None) -> None:
        """Deal the elements."""
        elements = _elements()
        inputs = torch.cat([elements.features, elements.known], dim=1)
        parts = {
            part: TensorDataset(inputs[rows], elements.density[rows].unsqueeze(1)) for part, rows in self.rows().items()
        }
        self.train_dataset, self.val_dataset, self.test_dataset = parts["train"], parts["val"], parts["test"]


@lru_cache(maxsize=1)
def _elements() -> _Elements:
    try:
        from mendeleev.fetch import fetch_table
    except ImportError as error:
        raise MisconfigurationException(
            "ElementDensityDataModule reads the numbers of the package `mendeleev`, which is not installed:"
            ' pip install "lightning_trust[sciml]".'
        ) from error
    table = fetch_table("elements")
    usable = table["lattice_structure"].isin(STRUCTURES) & table["lattice_constant"].notna()
    table = table[usable & (table["density"] > _SOLID)].sort_values("atomic_number")
    blocks = np.stack([table["block"] == block for block in _BLOCKS], axis=1)
    structures = np.stack([table["lattice_structure"] == structure for structure in STRUCTURES], axis=1)
    columns = np.concatenate([table[list(_MEASURED)].to_numpy(np.float64), blocks, structures], axis=1)
    features = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    known = np.stack([table["atomic_weight"].to_numpy(np.float64), structures.argmax(axis=1)], axis=1)
    density, constant = (table[name].to_numpy(np.float64) for name in ("density", "lattice_constant"))
    tensors = (torch.tensor(each, dtype=torch.float32) for each in (features, known, density, constant))
    return _Elements(tuple(table["symbol"]), *tensors)
