"""Data of zeroth-order training."""

from lightning_trust.datamodules.zeroth_order.burgers import BurgersDataModule, burgers_step, burgers_trajectory
from lightning_trust.datamodules.zeroth_order.element_density import ElementDensityDataModule, crystal_density
from lightning_trust.datamodules.zeroth_order.oscillator import OscillatorDataModule, oscillator_trajectory
from lightning_trust.datamodules.zeroth_order.pde import HJB20, BlackScholes1D, Heat, PDEProblem, Poisson
from lightning_trust.datamodules.zeroth_order.pde_data_module import CollocationPoints, PDEDataModule

__all__ = [
    "HJB20",
    "BlackScholes1D",
    "BurgersDataModule",
    "CollocationPoints",
    "ElementDensityDataModule",
    "Heat",
    "OscillatorDataModule",
    "PDEDataModule",
    "PDEProblem",
    "Poisson",
    "burgers_step",
    "burgers_trajectory",
    "crystal_density",
    "oscillator_trajectory",
]
