"""Data of zeroth-order training."""

from lightning_trust.datamodules.zeroth_order.pde import HJB20, BlackScholes1D, Heat, PDEProblem, Poisson
from lightning_trust.datamodules.zeroth_order.pde_data_module import CollocationPoints, PDEDataModule

__all__ = ["HJB20", "BlackScholes1D", "CollocationPoints", "Heat", "PDEDataModule", "PDEProblem", "Poisson"]
