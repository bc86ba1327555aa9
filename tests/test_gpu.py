"""The callbacks, attacks and estimators on a GPU: skipped where there is none.

The conformance suite of every callback runs anew with ``accelerator="gpu"``, in bf16 and fp16 as well, and with one
rank of NCCL in the place of two of gloo. ``LIGHTNING_TRUST_GPU_TESTS=cpu`` runs the same on the CPU: what then fails is
the test, not the GPU.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_trust import attacks
from lightning_trust.callbacks import QuantizedAllReduce
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.nn import SmallCNN
from lightning_trust.optim import CGE, RGE, ForwardGradient, MeZO
from tests.conformance import BATCH, CallbackConformance, Data, Host

ON_CPU = os.environ.get("LIGHTNING_TRUST_GPU_TESTS") == "cpu"
if not torch.cuda.is_available() and not ON_CPU:
    pytest.skip("needs a GPU", allow_module_level=True)

DEVICE = torch.device("cpu" if ON_CPU else "cuda")
ACCELERATOR, BACKEND = ("cpu", "gloo") if ON_CPU else ("gpu", "nccl")


@pytest.fixture
def one_rank():
    """DDP with one rank in this process, of which Lightning leaves the process group and variables behind."""
    before = dict(os.environ)
    yield DDPStrategy(process_group_backend=BACKEND)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class OnDevice:
    """What is otherwise in the conformance suite of a callback."""

    def trainer(self, folder, callbacks, **kwargs):
        return super().trainer(folder, callbacks, **{"accelerator": ACCELERATOR, **kwargs})

    def test_fit_is_on_the_device(self, tmp_path):
        devices = set()

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                devices.update(each.device.type for each in (*pl_module.parameters(), *pl_module.buffers()))

        host, _, _ = self.fitted(tmp_path, Watch())
        assert devices == {DEVICE.type}
        assert all(torch.isfinite(value).all() for value in host.state_dict().values())

    #: needs two devices
    test_two_ranks = None

    def test_one_rank_of_nccl(self, tmp_path, one_rank):
        """Collectives, hooks and their types, if not their sums."""
        host, _, trainer = self.fitted(tmp_path, strategy=one_rank)
        assert trainer.global_step > 0
        assert all(torch.isfinite(value).all() for value in host.state_dict().values())

    def test_fp16(self, tmp_path):
        """Trains with a gradient scaler, or is refused in words before the first step."""
        refused = None
        try:
            host, _, _ = self.fitted(tmp_path, precision="16-mixed")
        except MisconfigurationException as error:
            refused = str(error)
        if refused is None:
            assert all(value.dtype in (torch.float32, torch.int64) for value in host.state_dict().values())
        else:
            assert any(word in refused for word in ("16-mixed", "fp16", "GradScaler", "scale")), refused


def conformance_classes():
    """Every subclass of the conformance suite in the tests of callbacks."""
    root = Path(__file__).resolve().parent
    for path in sorted((root / "callbacks").rglob("test_*.py")):
        if "CallbackConformance" not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for kind in vars(importlib.import_module(name)).values():
            if isinstance(kind, type) and issubclass(kind, CallbackConformance) and kind.__module__ == name:
                yield kind


for _kind in conformance_classes():
    if _kind.__name__.startswith("Test"):
        _name = f"{_kind.__name__}{_kind.callback.__name__}"
        globals()[_name] = type(_name, (OnDevice, _kind), {"__module__": __name__})


# -- gradients that cross in few bits ----------------------------------------------------------------------------------
def test_quantised_gradients_train(tmp_path, one_rank):
    host = Host()
    before = host.net[0].weight.detach().clone()
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        strategy=one_rank,
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QuantizedAllReduce(bits=8)],
        default_root_dir=tmp_path,
    )
    trainer.fit(host, Data(batch_size=BATCH))
    assert (host.net[0].weight.detach().cpu() - before).abs().max() > 0.01
    trainer.validate(host, Data(), verbose=False)
    assert trainer.callback_metrics["val_loss"] < 0.7


# -- attacks -----------------------------------------------------------------------------------------------------------
ATTACKS = {
    "FGSM": lambda: attacks.FGSM(eps=0.1),
    "RFGSM": lambda: attacks.RFGSM(eps=0.1),
    "FastFGSM": lambda: attacks.FastFGSM(eps=0.1),
    "PGD": lambda: attacks.PGD(eps=0.1, step_size=0.02, steps=5),
    "PGD, l2": lambda: attacks.PGD(eps=1.0, step_size=0.2, steps=5, norm="l2"),
    "PGD, l1": lambda: attacks.PGD(eps=8.0, step_size=2.0, steps=5, norm="l1"),
    "MIFGSM": lambda: attacks.MIFGSM(eps=0.1, steps=5),
    "MSD": lambda: attacks.MSD(eps_linf=0.1, eps_l2=1.0, eps_l1=8.0, steps=5),
    "CWL2": lambda: attacks.CWL2(steps=5),
    "DeepFool": lambda: attacks.DeepFool(steps=5),
    "APGD": lambda: attacks.APGD(eps=0.1, steps=5),
    "FAB": lambda: attacks.FAB(eps=0.1, steps=5),
    "Square": lambda: attacks.Square(eps=0.1, n_queries=20),
    "AutoAttack": lambda: attacks.AutoAttack(eps=0.1),
    "NES": lambda: attacks.NES(eps=0.1),
}


@pytest.fixture(scope="module")
def fooled():
    """A network, images that it knows, and their classes."""
    torch.manual_seed(0)
    network = SmallCNN().to(DEVICE).eval()
    images = torch.rand(8, 1, 28, 28, device=DEVICE)
    with torch.no_grad():
        return network, images, network(images).argmax(dim=1)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks(name, fooled):
    network, images, targets = fooled
    found = ATTACKS[name]()(network, images, targets)
    assert found.device == images.device
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    assert not found.requires_grad
    with torch.no_grad():
        assert F.cross_entropy(network(found), targets) >= F.cross_entropy(network(images), targets)


def test_random_starts_are_those_of_the_cpu(fooled):
    network, images, targets = fooled
    attack = attacks.PGD(eps=0.1, step_size=0.02, steps=3, random_start=True)

    def crafted(device):
        rows = SampleDraws(torch.arange(8, device=device), seed=1)
        return attack(network.to(device), images.to(device), targets.to(device), draws=rows).cpu()

    on_cpu, on_device = crafted(torch.device("cpu")), crafted(DEVICE)
    # a sign of a gradient near zero may turn
    assert ((on_device - on_cpu).abs() > 1e-5).float().mean() < 0.01


# -- estimates ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", [CGE(mu=1e-5, central=True), RGE(q=4000, mu=1e-5), ForwardGradient(q=4000)])
def test_estimates(estimator):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(DEVICE).double()
    x, y = torch.randn(6, 4, device=DEVICE).double(), torch.arange(6, device=DEVICE) % 2

    def loss():
        return F.cross_entropy(network(x), y)

    expected = torch.cat([each.flatten() for each in torch.autograd.grad(loss(), list(network.parameters()))])
    estimator.estimate(loss, dict(network.named_parameters()), module=network)
    found = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert found.device.type == DEVICE.type
    tolerance = 1e-8 if isinstance(estimator, CGE) else 0.2 * float(expected.norm())
    assert (found - expected).norm() < tolerance


def test_mezo_draws_the_same_direction_again():
    torch.manual_seed(0)
    network = nn.Linear(64, 64).to(DEVICE)
    before = network.weight.detach().clone()
    x = torch.randn(8, 64, device=DEVICE)
    optimizer = MeZO(network.parameters(), lr=0.0)
    optimizer.step(lambda: network(x).square().mean())
    # moved there and back along one direction, up to rounding
    torch.testing.assert_close(network.weight.detach(), before, rtol=0.0, atol=1e-6)
    optimizer = MeZO(network.parameters(), lr=1e-2)
    losses = [float(optimizer.step(lambda: network(x).square().mean())) for _ in range(200)]
    assert losses[-1] < 0.9 * losses[0]
