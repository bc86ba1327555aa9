"""Passes against closed forms; they leave nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import rank, world_size
from lightning_trust.core.host import named_parameters
from lightning_trust.core.passes import evaluate, gradient_sum, reestimate_batchnorm, timed_pass
from lightning_trust.core.randomness import random_state
from lightning_trust.core.step import HostCallback
from tests.core.hosts import Host, loader, rows, trainer
from tests.two_ranks import fit_on_two_ranks

ROWS = 21


class Pass(Callback):
    """Runs a pass in on_fit_start."""

    def __init__(self, run) -> None:
        self.run = run
        self.result: Any = None

    def on_fit_start(self, trainer, pl_module):
        self.result = self.run(trainer, pl_module)


def in_fit(folder, host, run, **settings):
    callback = Pass(run)
    trainer(folder, callback, max_epochs=0, **settings).fit(host, loader())
    return callback.result


def regression() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(ROWS, 5, generator=generator), torch.randn(ROWS, 1, generator=generator))


def regression_host() -> Host:
    torch.manual_seed(1)
    return Host(nn.Linear(5, 1))


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().mean()


def regression_sum(batch_size: int, spec: BatchSpec | None = None):
    def run(trainer, host):
        shard = Subset(regression(), range(rank(), ROWS, world_size()))
        data = DataLoader(shard, batch_size=batch_size)
        return gradient_sum(trainer, host, host.net, data, half_square, named_parameters(host), spec or BatchSpec())

    return run


def closed_form(host: Host) -> dict[str, np.ndarray]:
    """X^T (X w + b - y), and its sum over the rows."""
    x, y = (tensor.double().numpy() for tensor in regression().tensors)
    error = x @ host.net.weight.detach().double().numpy().T + host.net.bias.detach().double().numpy() - y
    return {"net.weight": (x.T @ error).T, "net.bias": error.sum(0)}


@pytest.mark.parametrize("batch_size", [1, 4, ROWS])
def test_gradient_sum_is_the_closed_form_whatever_the_batch_size(tmp_path, batch_size):
    host = regression_host()
    found = in_fit(tmp_path, host, regression_sum(batch_size))
    expected = closed_form(host)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-4, atol=1e-5)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("batch_size", [2, ROWS])
def test_gradient_sum_is_the_same_on_two_ranks(tmp_path, batch_size):
    host = regression_host()
    callback = Pass(regression_sum(batch_size))
    results = fit_on_two_ranks(
        tmp_path, host, DataLoader(regression(), batch_size=2), [callback], lambda *_: callback.result, max_steps=1
    )
    expected = closed_form(regression_host())
    for found in results:
        for name in expected:
            np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(results[0][name], results[1][name]) for name in expected)


def test_opposite_gradients_cancel(tmp_path):
    host = regression_host()
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5, 1.5]])
    output = host.net(x).detach()
    # residuals of the same row of +1 and -1, in batches of their own
    data = DataLoader(TensorDataset(x.repeat(2, 1), torch.cat([output - 1.0, output + 1.0])), batch_size=1)

    def run(trainer, host):
        parameters = named_parameters(host)
        return [
            gradient_sum(trainer, host, host.net, part, half_square, parameters, BatchSpec()) for part in (data, [])
        ] + [gradient_sum(trainer, host, host.net, [next(iter(data))], half_square, parameters, BatchSpec())]

    both, none, one = in_fit(tmp_path, host, run)
    assert all(value.abs().max() < 1e-6 for value in both.values())
    assert all(not value.any() for value in none.values())
    torch.testing.assert_close(one["net.weight"], x, rtol=1e-4, atol=1e-5)


class Layers(nn.Module):
    """Dropout, BatchNorm that trains, BatchNorm that the user froze, a layer that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.frozen_norm = nn.BatchNorm1d(6, momentum=0.3)
        self.plain_norm = nn.BatchNorm1d(6, track_running_stats=False)
        self.unused = nn.BatchNorm1d(2)
        self.last = nn.Linear(6, 3)
        self.last.weight.requires_grad_(False)

    def forward(self, x):
        x = self.dropout(self.norm(self.first(x)))
        return self.last(self.plain_norm(self.frozen_norm(x)))


class LayersHost(Host):
    """Draws random numbers on the way, and doubles its inputs in its two transfer hooks."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(Layers())
        for norm in (self.net.norm, self.net.frozen_norm, self.net.unused):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return 4.0 * batch[0], batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        torch.rand(1)
        return 0.5 * batch[0], batch[1]


def layers_state(host: Host) -> dict[str, Any]:
    return {
        "modes": [module.training for module in host.modules()],
        "momenta": [module.momentum for module in host.modules() if isinstance(module, nn.BatchNorm1d)],
        "requires_grad": [parameter.requires_grad for parameter in host.parameters()],
        "grads": [parameter.grad for parameter in host.parameters()],
        "weights": {name: parameter.detach().clone() for name, parameter in host.named_parameters()},
        "random": random_state(),
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("modes", "momenta", "requires_grad", "grads"):
        assert before[key] == after[key], key
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    for key, value in before["random"].items():
        assert str(value) == str(after["random"][key]), key
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after["random"][key]), key


def shuffled(batch_size: int = 5) -> DataLoader[Any]:
    return DataLoader(rows(23), batch_size=batch_size, shuffle=True)


def test_gradient_sum_leaves_nothing_behind(tmp_path):
    host = LayersHost()
    host.net.plain_norm = nn.Identity()  # else a row's output depends on its batch

    def run(trainer, host):
        host.net.train()
        host.net.frozen_norm.eval()
        before = layers_state(host)
        buffers = {name: buffer.clone() for name, buffer in host.named_buffers()}
        found = gradient_sum(trainer, host, host.net, shuffled(), F.cross_entropy, named_parameters(host), BatchSpec())
        assert_untouched(before, layers_state(host))
        assert all(torch.equal(buffers[name], buffer) for name, buffer in host.named_buffers())
        return found

    found = in_fit(tmp_path, host, run)
    # what takes no gradient, and what nothing reaches, sums to zero; the rest is that of the network in eval mode
    assert not found["net.last.weight"].any()
    assert not found["net.unused.weight"].any()
    host.eval()
    x, y = rows(23).tensors
    F.cross_entropy(host.net(2.0 * x), y, reduction="sum").backward()
    for name, parameter in host.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)
            assert found[name].any()


def test_gradient_sum_of_a_frozen_network_is_zero(tmp_path):
    host = regression_host().requires_grad_(False)
    host.dummy = nn.Parameter(torch.zeros(1))
    found = in_fit(tmp_path, host, regression_sum(4))
    assert list(found) == ["dummy", "net.weight", "net.bias"]
    assert not any(value.any() for value in found.values())


def test_gradient_sum_in_the_precision_of_the_host(tmp_path):
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    host = Host(Watched(5, 1))
    found = in_fit(tmp_path, host, regression_sum(4), precision="bf16-mixed")
    expected = closed_form(host)
    assert set(seen) == {torch.bfloat16}
    for name in expected:
        assert found[name].dtype == torch.float32
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=0.1, atol=0.1)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------
def expected_statistics(host: Host, batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        hidden = [host.net.first(2.0 * batch).double() for batch in batches]
    # the mean of all rows, exactly; the variance within batches, each with its rows
    rows = sum(len(h) for h in hidden)
    return torch.cat(hidden).mean(0), sum(len(h) * h.var(0) for h in hidden) / rows


def reestimated(batch_size: int):
    def run(trainer, host):
        data = Subset(rows(24), range(rank(), 24, world_size()))
        reestimate_batchnorm(trainer, host, host.net, DataLoader(data, batch_size=batch_size), BatchSpec())
        return {name: buffer.clone() for name, buffer in host.named_buffers()}

    return run


def test_reestimated_batchnorm_is_the_mean_over_the_batches(tmp_path):
    host = LayersHost()
    kept = {name: buffer.clone() for name, buffer in host.net.unused.named_buffers()}

    def run(trainer, host):
        host.net.train()
        host.net.frozen_norm.eval()
        before = layers_state(host)
        found = reestimated(7)(trainer, host)
        assert_untouched(before, layers_state(host))
        return found

    found = in_fit(tmp_path, host, run)
    x = rows(24).tensors[0]
    mean, var = expected_statistics(host, list(x.split(7)))
    torch.testing.assert_close(found["net.norm.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["net.norm.running_var"].double(), var, rtol=1e-4, atol=1e-5)
    assert found["net.norm.num_batches_tracked"].item() == 4
    for name, value in kept.items():
        assert torch.equal(found[f"net.unused.{name}"], value)


def test_reestimated_batchnorm_on_two_ranks(tmp_path):
    callback = Pass(reestimated(4))
    data = DataLoader(rows(4), batch_size=2)
    zero, one = fit_on_two_ranks(tmp_path, LayersHost(), data, [callback], lambda *_: callback.result, max_steps=1)
    x = rows(24).tensors[0]
    mean, var = expected_statistics(LayersHost(), [part for shard in (x[0::2], x[1::2]) for part in shard.split(4)])
    torch.testing.assert_close(zero["net.norm.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zero["net.norm.running_var"].double(), var, rtol=1e-4, atol=1e-5)
    assert zero["net.norm.num_batches_tracked"].item() == 6
    assert all(torch.equal(zero[name], one[name]) for name in zero)


def test_reestimation_without_data_keeps_what_was(tmp_path):
    host = LayersHost()
    before = {name: buffer.clone() for name, buffer in host.named_buffers()}

    def run(trainer, host):
        reestimate_batchnorm(trainer, host, host.net, [], BatchSpec())

    in_fit(tmp_path, host, run)
    assert all(torch.equal(buffer, before[name]) for name, buffer in host.named_buffers())


def test_reestimation_that_fails_restores_modes_and_momenta(tmp_path):
    host = LayersHost()

    def run(trainer, host):
        host.net.train()
        before = layers_state(host)
        with pytest.raises(ValueError, match="Expected `BatchSpec.inputs`"):
            reestimate_batchnorm(trainer, host, host.net, shuffled(), BatchSpec("image"))
        after = layers_state(host)
        assert before["modes"] == after["modes"]
        assert before["momenta"] == after["momenta"]

    in_fit(tmp_path, host, run)


# -- evaluation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("leave", [False, True])
def test_evaluate(tmp_path, precision, leave):
    host = LayersHost()

    def run(trainer, host):
        host.net.train()
        host.net.frozen_norm.eval()
        host.net.plain_norm.eval()
        before = layers_state(host)
        found = []
        batches = evaluate(trainer, host, host.net, shuffled(), BatchSpec())
        for outputs, targets in batches:
            assert not host.net.training
            assert not outputs.requires_grad
            found.append((outputs, targets))
            if leave:
                break
        batches.close()
        assert_untouched(before, layers_state(host))
        return found

    found = in_fit(tmp_path, host, run, precision=precision)
    assert sum(len(targets) for _, targets in found) == (5 if leave else 23)
    assert all(outputs.dtype == torch.float32 for outputs, _ in found)
    assert all(outputs.shape == (len(targets), 3) for outputs, targets in found)


def test_evaluate_goes_through_the_transfer_hooks(tmp_path):
    host = LayersHost()
    host.net.plain_norm = nn.Identity()

    def run(trainer, host):
        data = DataLoader(rows(23), batch_size=5)
        return [torch.cat(part) for part in zip(*evaluate(trainer, host, host.net, data, BatchSpec()), strict=True)]

    outputs, targets = in_fit(tmp_path, host, run)
    x, y = rows(23).tensors
    torch.testing.assert_close(outputs, host.eval().net(2.0 * x).detach())
    assert torch.equal(targets, y)


def test_seconds_of_passes_are_counted(tmp_path):
    class Timed(HostCallback):
        def begin(self, trainer, host):
            assert self.attachment.pass_seconds == 0.0
            regression_sum(4)(trainer, host)
            self.first = self.attachment.pass_seconds
            with pytest.raises(ValueError, match="inside"), timed_pass(host):
                raise ValueError("inside")
            self.second = self.attachment.pass_seconds

    callback = Timed()
    trainer(tmp_path, callback, max_epochs=0).fit(regression_host(), loader())
    assert 0.0 < callback.first < callback.second < 10.0
    # a host that nothing is attached to
    with timed_pass(regression_host()):
        pass
